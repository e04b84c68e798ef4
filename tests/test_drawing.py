"""Drawings: lines of text, kinds of edges, pictures."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import drawing
from hf_sparse.parts import Globals, Part, Scope, Window, edge_mask
from hf_sparse.patterns import Pattern
from tests.support.pictures import png_size

GLOBAL, NEIGHBOUR, CHOSEN, OTHER = 4, 3, 2, 1


class WithNodes(Pattern):
    """A band over the tokens, and two nodes behind them that everyone reads."""

    key = "with_nodes"

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return (Window(before=1, after=1), Globals(positions=(scope.length, scope.length + 1)))

    def mask(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> Tensor:
        position = torch.arange(n + 2)
        parts = self.parts(Scope(n, heads))
        return edge_mask(parts, position[:, None], position[None], heads=heads, is_causal=is_causal)


@pytest.mark.parametrize(
    ("length", "width", "lines"),
    [
        (3, 8, ["│██    │", "│  ██  │", "│    ██│"]),
        (4, 8, ["│▀▄  │", "│  ▀▄│"]),
        (5, 8, ["│▀▄   │", "│  ▀▄ │", "│    ▀│"]),
        (12, 8, ["│░░    │", "│  ░░  │", "│    ░░│"]),
    ],
)
def test_a_drawing_fits_its_width(length: int, width: int, lines: list[str]) -> None:
    drawn = list(drawing.drawing(torch.eye(length, dtype=torch.bool)[None], width=width))
    assert [len(line) <= width for line in drawn] == [True] * len(drawn)
    assert drawn == lines


def test_the_kinds_of_edges_drawn_by_hand() -> None:
    pattern = (
        hf_sparse.pattern("strided", stride=3)
        | hf_sparse.pattern("band", radius=1)
        | hf_sparse.pattern("global", positions=(1,))
    )
    want = [
        [3, 4, 0, 1, 0],
        [4, 4, 4, 4, 4],
        [0, 4, 3, 3, 0],
        [1, 4, 3, 3, 3],
        [0, 4, 0, 3, 3],
    ]
    assert drawing.edge_kinds(pattern, Scope(5, 1)).tolist() == [want]
    causal = drawing.edge_kinds(pattern, Scope(5, 1, is_causal=True))
    assert causal.tolist() == [torch.tensor(want).tril().tolist()]


@pytest.mark.parametrize(
    ("key", "fields", "kinds"),
    [
        ("band", {"radius": 2}, {NEIGHBOUR}),
        ("dilated", {"radius": 2}, {NEIGHBOUR}),
        ("block_local", {"block_size": 4}, {NEIGHBOUR}),
        ("strided", {"stride": 4}, {OTHER}),
        ("random", {"block_size": 2}, {CHOSEN}),
        ("longformer", {"window": 2, "global_tokens": (0,)}, {GLOBAL, NEIGHBOUR}),
        ("bigbird", {"block_size": 2}, {GLOBAL, NEIGHBOUR, CHOSEN}),
    ],
)
def test_an_edge_has_a_kind_and_nothing_else_has_one(key: str, fields: dict[str, object], kinds: set[int]) -> None:
    pattern = hf_sparse.pattern(key, **fields)
    drawn = drawing.edge_kinds(pattern, Scope(33, 2, layer=1))
    assert torch.equal(drawn > 0, pattern.mask(33, heads=2, layer=1))
    assert set(drawn.unique().tolist()) - {0} == kinds


def test_a_head_has_the_kinds_of_its_own_parts() -> None:
    pattern = hf_sparse.by_head({0: hf_sparse.pattern("band", radius=0), 1: hf_sparse.pattern("strided", stride=1)})
    assert drawing.edge_kinds(pattern, Scope(2, 2)).tolist() == [[[3, 0], [0, 3]], [[1, 1], [1, 1]]]


def test_what_a_query_reads_is_counted_over_all_heads() -> None:
    pattern = hf_sparse.by_head({0: hf_sparse.pattern("band", radius=1), 1: hf_sparse.pattern("global")})
    said = drawing.reading(pattern.mask(4, heads=2))
    assert said == {"least_keys": 1, "median_keys": 2, "most_keys": 4, "density": pattern.density(4, heads=2)}
    assert drawing.reading_lines(pattern.mask(2, heads=2)[:, :1]) == [
        "keys a query reads: least 2, median 2, most 2",
        "density 1.0000 of 1 x 2 pairs",
    ]


@pytest.mark.parametrize("length", [1, 7, 64, 65, 300])
def test_a_panel_shows_the_kinds(length: int) -> None:
    pattern = hf_sparse.pattern("longformer", window=2, global_tokens=(0,))
    (axes,) = drawing.picture(pattern, Scope(length, 2)).axes
    cells = torch.as_tensor(axes.images[0].get_array().data).to(torch.uint8)
    kinds = drawing.edge_kinds(pattern, Scope(length, 1))[0]
    step = 2 if length > 256 else 1
    want = [[kinds[i : i + step, j : j + step].max() for j in range(0, length, step)] for i in range(0, length, step)]
    assert torch.equal(cells, torch.tensor(want))
    assert axes.get_xlim() == (-0.5, length - 0.5)
    assert axes.get_ylim() == (length - 0.5, -0.5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    assert len(axes.get_xticks(minor=True)) == (length - 1 if length <= 64 else 0)


def titles(pattern: Pattern, heads: int) -> Sequence[str]:
    return [axes.get_title() for axes in drawing.picture(pattern, Scope(8, heads)).axes]


def test_heads_that_differ_get_a_panel_each_with_a_title() -> None:
    random = hf_sparse.pattern("random", block_size=1)
    assert titles(random, 1) == [""]
    assert titles(random, 5) == [f"head {head}" for head in range(5)]
    pair = {range(2): hf_sparse.pattern("band", radius=1), 2: hf_sparse.pattern("global")}
    assert titles(hf_sparse.by_head(pair), 3) == ["heads 0 1", "head 2"]


def test_nodes_stand_behind_a_line() -> None:
    (axes,) = drawing.picture(WithNodes(), Scope(4, 1)).axes
    across, down = axes.lines
    assert set(across.get_ydata()) == set(down.get_xdata()) == {3.5}
    assert axes.images[0].get_array().shape == (6, 6)
    (axes,) = drawing.picture(hf_sparse.pattern("band"), Scope(4, 1)).axes
    assert list(axes.lines) == []


@pytest.mark.parametrize(("suffix", "opens_with"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_picture_is_written_in_the_form_of_its_suffix(tmp_path: Path, suffix: str, opens_with: bytes) -> None:
    path = tmp_path / f"mask{suffix}"
    drawing.write_picture(path, hf_sparse.pattern("bigbird", block_size=2), Scope(32, 2))
    assert path.read_bytes().startswith(opens_with)
    if suffix == ".png":
        width, height = png_size(path)
        assert 600 < width < 1000
        assert 300 < height < 600


def test_a_picture_says_what_its_name_or_matplotlib_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, band = tmp_path / "mask.gif", hf_sparse.pattern("band")
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf; got .*mask\.gif"):
        drawing.write_picture(path, band, Scope(4, 1))
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs matplotlib: pip install 'hf-sparse\[plot\]'"):
        drawing.write_picture(path.with_suffix(".png"), band, Scope(4, 1))
    assert list(tmp_path.iterdir()) == []
