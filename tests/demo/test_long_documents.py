"""The table of long documents says what was measured."""

import pytest

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from hf_sparse.demo.long_documents import END, EXPERIMENTS, HERE, RESULTS, START, _section


def test_the_page_says_what_the_results_say() -> None:
    page = (HERE / "README.md").read_text(encoding="utf-8")
    wanted = [line for name in EXPERIMENTS if (RESULTS / name).is_dir() for line in _section(name, RESULTS / name)]
    held = page[page.index(START) + len(START) : page.index(END)]
    assert held.split() == "\n".join(wanted).split()
