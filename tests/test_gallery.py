"""The page of pictures: it is what ``make docs`` writes now, and no pattern is missing."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_sparse import gallery
from hf_sparse.console import read_pattern
from hf_sparse.patterns import PATTERNS, Pattern
from tests.support.pictures import png_size

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "patterns.md").read_text()


def test_the_page_is_what_the_command_writes() -> None:
    assert gallery.page(PAGE) == PAGE, "run make docs, look at the pictures and commit them"


def test_every_picture_on_the_page_is_a_png_of_sensible_size() -> None:
    named = re.findall(r"\]\((patterns/[^)]*)\)", PAGE)
    assert named
    assert len(set(named)) == len(named)
    assert {f"patterns/{path.name}" for path in (DOCS / "patterns").iterdir()} == set(named)
    for name in named:
        width, height = png_size(DOCS / name)
        assert 300 <= width <= 1600, name
        assert 300 <= height <= 1600, name
        assert (DOCS / name).stat().st_size < 100_000, name


def test_a_pattern_without_a_picture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERNS, "sun", PATTERNS["band"])
    with pytest.raises(ValueError, match=r"add a line for sun to PICTURES in hf_sparse/gallery\.py"):
        gallery.page(PAGE)


@pytest.mark.parametrize("picture", gallery.PICTURES, ids=lambda picture: picture.file)
def test_the_command_below_a_picture_draws_it(picture: gallery.Picture) -> None:
    program, show, text, *rest = shlex.split(gallery.command(picture))
    options = dict(itertools.pairwise(rest))
    settings = [value for option, value in itertools.pairwise(rest) if option == "--set"]
    assert (program, show) == ("hf-sparse", "show")
    assert read_pattern(text, settings) == picture.pattern
    assert int(options["--length"]) == picture.length
    assert int(options.get("--heads", 1)) == picture.heads
    assert ("--causal" in rest) is picture.is_causal
    assert Path(options["--out"]).name == Path(picture.file).name


def test_what_others_wrote_stays() -> None:
    others = f"# Mine\n\n{gallery.START}\nold\n{gallery.END}\n\n## Results\n"
    made = gallery.page(others)
    assert made.startswith("# Mine\n\n")
    assert made.endswith("\n\n## Results\n")
    assert "\nold\n" not in made
    assert gallery.page(made) == made


def test_a_page_without_its_two_lines_is_refused() -> None:
    for text in ("", gallery.START, gallery.END, f"{gallery.END}\n{gallery.START}"):
        with pytest.raises(ValueError, match="must hold the two lines"):
            gallery.page(text)


@dataclass(frozen=True)
class Fern(Pattern):
    """Every token reads ``fronds`` others.

    Args:
        fronds: how many,
            at least 1.
        soil: of any kind.

    Source: A. Botanist 2021,
    section 3.
    """

    key = "fern"
    fronds: int = 3
    soil: str = "peat"

    def parts(self, scope: object) -> tuple[()]:
        return ()


def test_a_section_says_what_the_docstring_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERNS, "fern", Fern)
    pictures = (gallery.Picture(Fern(), "young", length=4), gallery.Picture(Fern(fronds=5), "old", length=4))
    monkeypatch.setattr(gallery, "PICTURES", (*gallery.PICTURES, *pictures))
    section = gallery.page(PAGE).partition("## `fern`")[2].partition("\n## ")[0]
    assert section.splitlines()[2:10] == [
        "Every token reads `fronds` others.",
        "",
        "| field | default | meaning |",
        "| --- | --- | --- |",
        "| `fronds` | `3` | how many, at least 1. |",
        '| `soil` | `"peat"` | of any kind. |',
        "",
        "Source: A. Botanist 2021, section 3.",
    ]
    assert "**young**\n\n![fern young](patterns/fern-young.png)" in section
    assert "hf-sparse show fern --set fronds=5 --length 4 --out fern-old.png" in section
    assert section.count("Keys a query reads: least 0, median 0, most 0; density 0.0000 of 4 x 4 pairs.") == 2
