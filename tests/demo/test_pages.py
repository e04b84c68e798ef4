"""The tables of the page of recipes say what was measured."""

import json
from types import ModuleType

import pytest

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from hf_sparse.demo import distilled, long_documents, step_speed

PAGE = (long_documents.HERE / "README.md").read_text(encoding="utf-8")


def test_the_page_says_what_the_results_say() -> None:
    names = [name for name in long_documents.EXPERIMENTS if (long_documents.RESULTS / name).is_dir()]
    assert names
    wanted = [line for name in names for line in long_documents._section(name, long_documents.RESULTS / name)]
    assert between(long_documents) == "\n".join(wanted).split()


@pytest.mark.parametrize("module", [distilled, step_speed], ids=lambda module: module.__name__)
def test_the_page_says_what_was_measured_of(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    held = json.loads((long_documents.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert between(module) == "\n".join(module._lines(held)).split()


def between(module: ModuleType) -> list[str]:
    return PAGE[PAGE.index(module.START) + len(module.START) : PAGE.index(module.END)].split()
