"""Drawings of who may read whom: lines of text, and pictures in the manner of the survey's.

Source: Lin et al. 2021 (A Survey of Transformers, arXiv:2106.04554), figures 4 to 6, for the look of the pictures.
"""

import statistics
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, BlockWindow, Globals, Listed, Part, Patches, Scope, Window
from hf_sparse.patterns import Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the kinds of edges and their colours; an edge of several kinds takes the first
KINDS = {"global": "#e07b39", "neighbours": "#4878a8", "random or chosen blocks": "#4fa06b", "other": "#9a78b4"}
SUFFIXES = (".png", ".svg", ".pdf")
# cells a side: up to the first number lines are drawn between them, beyond the second one stands for several pairs
_MOST_RULED, _MOST_CELLS = 64, 256
_PANELS_A_ROW = 4


def drawing(mask: Tensor, *, width: int) -> Iterator[str]:
    """Yield the lines of a drawing of a mask; heads that are equal are drawn once, under their names.

    A pair is two characters wide where that fits, else one of half the height; a longer mask is shaded by the share of
    pairs that a character covers.

    Args:
        mask: bool ``[H, T, T]``.
        width: characters of a line, at least 8.
    """
    for name, head in _different(mask):
        if len(mask) > 1:
            yield name
        yield from _lines(head, width=width)


def reading(mask: Tensor) -> dict[str, float]:
    """Return how many keys a query reads, at least, in the median and at most, and the density, over all heads.

    Args:
        mask: bool ``[H, T, S]``.
    """
    keys = mask.sum(-1).flatten().tolist()
    return {
        "least_keys": min(keys),
        "median_keys": statistics.median(keys),
        "most_keys": max(keys),
        "density": sum(keys) / mask.numel(),
    }


def reading_lines(mask: Tensor) -> list[str]:
    """Return :func:`reading` as two lines of text."""
    said = reading(mask)
    return [
        f"keys a query reads: least {said['least_keys']}, median {said['median_keys']:g}, most {said['most_keys']}",
        f"density {said['density']:.4f} of {mask.shape[1]} x {mask.shape[2]} pairs",
    ]


def edge_kinds(pattern: Pattern, scope: Scope) -> Tensor:
    """Say which kind every edge is of.

    Returns:
        uint8 ``[H, T, T]``: 0 where there is no edge, else the rank of its kind: the number of kinds for the first of
        ``KINDS``, 1 for the last.
    """
    mask = pattern.mask(scope.length, heads=scope.heads, layer=scope.layer, is_causal=scope.is_causal)
    # not the scope's length: a mask may hold nodes behind the tokens
    position = torch.arange(mask.shape[-1])
    is_of_node = (position[:, None] >= scope.length) | (position[None, :] >= scope.length)
    kinds = mask.to(torch.uint8)
    for part in pattern.parts(scope):
        rank = torch.full_like(is_of_node, len(KINDS) - list(KINDS).index(_kind(part)), dtype=torch.uint8)
        allowed = part.allows(position[:, None], position[None, :])
        if part.has_nodes:
            # what joins a token and a node is global, whatever part it comes from
            rank = rank.masked_fill(is_of_node, len(KINDS))
        else:
            allowed = allowed & ~is_of_node
        for head in range(scope.heads) if part.heads is None else part.heads:
            own = mask[head] & allowed[head if len(allowed) > 1 else 0]
            kinds[head] = torch.where(own, torch.maximum(kinds[head], rank), kinds[head])
    return kinds


def write_picture(path: Path, pattern: Pattern, scope: Scope) -> None:
    """Draw a pattern as a file.

    Args:
        path: ends in one of ``SUFFIXES``, which says the form.
        pattern: the pattern.
        scope: length, heads, layer and causality of what is drawn.

    Raises:
        ValueError: if the suffix is another one, or matplotlib is missing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"a picture's name must end in one of {', '.join(SUFFIXES)}; got {str(path)!r}")
    if find_spec("matplotlib") is None:
        raise ValueError("a picture needs matplotlib: pip install 'hf-sparse[plot]'")
    picture(pattern, scope).savefig(path, dpi=120)


def picture(pattern: Pattern, scope: Scope) -> "Figure":
    """Return a figure of a pattern: a panel for each head that differs, what colours mean, and what a query reads."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds = edge_kinds(pattern, scope)
    panels = list(_different(kinds))
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    inches = 3.2 if kinds.shape[-1] <= _MOST_RULED else 5.6
    figure = Figure(figsize=(columns * inches, rows * (inches + 0.1) + 0.7), layout="compressed")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for (name, head), axes in zip(panels, grid, strict=False):
        _draw_panel(axes, head, tokens=scope.length)
        if len(panels) > 1:
            axes.set_title(textwrap.shorten(name, 36, placeholder=" ..."), fontsize=9)
    for axes in grid[len(panels) :]:
        axes.remove()
    ranks = reversed(kinds.unique().tolist())
    names = [list(KINDS)[len(KINDS) - rank] for rank in ranks if rank]
    patches = [Patch(color=KINDS[name], label=name) for name in names]
    figure.legend(
        handles=patches, loc="outside upper center", ncols=2 if columns == 1 else 4, fontsize=8, frameon=False
    )
    caption = reading_lines(kinds > 0)
    step = _pairs_a_cell(kinds.shape[-1])
    if step > 1:
        caption.append(f"a cell stands for {step} x {step} pairs and is filled if one is an edge")
    figure.supxlabel("\n".join(caption), fontsize=8)
    return figure


def _draw_panel(axes: "Axes", kinds: Tensor, *, tokens: int) -> None:
    """Draw the kinds of one head, uint8 ``[T, T]``."""
    from matplotlib.colors import ListedColormap

    size = len(kinds)
    step = _pairs_a_cell(size)
    cells = torch.nn.functional.max_pool2d(kinds[None].float(), step, ceil_mode=True)[0]
    end = len(cells) * step - 0.5
    colours = ListedColormap(["white", *reversed(KINDS.values())])
    axes.imshow(
        cells.numpy(), cmap=colours, vmin=0, vmax=len(KINDS), interpolation="none", extent=(-0.5, end, end, -0.5)
    )
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="key", ylabel="query")
    # thin: a frame covers half of its width of the outermost cells, which may be the only global ones
    axes.spines[:].set_linewidth(0.5)
    axes.tick_params(labelsize=8)
    axes.locator_params(integer=True, min_n_ticks=1)
    if size <= _MOST_RULED:
        between = [place + 0.5 for place in range(size - 1)]
        axes.set_xticks(between, minor=True)
        axes.set_yticks(between, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color="#cccccc", linewidth=0.4)
    if size > tokens:
        for line in (axes.axhline, axes.axvline):
            line(tokens - 0.5, color="black", linewidth=0.8)


def _pairs_a_cell(size: int) -> int:
    """Return how many positions a side of one cell of a picture covers."""
    return -(-size // _MOST_CELLS)


def _kind(part: Part) -> str:
    match part:
        case Globals():
            return "global"
        case BlockWindow() | Patches() | Listed():
            return "neighbours"
        case Window(before=before, after=after) if before is not None or after is not None:
            return "neighbours"
        case BlockTable():
            return "random or chosen blocks"
    return "other"


def _different(heads: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what differs among the heads of ``[H, T, T]``, each with the names of the heads that have it."""
    left = list(range(len(heads)))
    while left:
        same = [head for head in left if torch.equal(heads[head], heads[left[0]])]
        yield f"{'head' if len(same) == 1 else 'heads'} {' '.join(map(str, same))}", heads[same[0]]
        left = [head for head in left if head not in same]


def _lines(mask: Tensor, *, width: int) -> Iterator[str]:
    """Yield the lines of one head, bool ``[T, T]``."""
    length, room = len(mask), max(width, 8) - 2
    has_blocks = "utf" in (sys.stdout.encoding or "").lower()
    edge, full, shades = ("│", "█", " ░▒▓█") if has_blocks else ("|", "#", " .:*#")
    if 2 * length <= room:
        for row in mask.tolist():
            yield edge + "".join(2 * (full if pair else " ") for pair in row) + edge
        return
    step = -(-length // room)
    for top in range(0, length, 2 * step):
        cells = [mask[top : top + 2 * step, left : left + step] for left in range(0, length, step)]
        yield edge + "".join(_cell(cell, shades, has_halves=has_blocks and step == 1) for cell in cells) + edge


def _cell(pairs: Tensor, shades: str, *, has_halves: bool) -> str:
    """Return the character of some pairs: any edge shows, and only where all are edges it is full."""
    if has_halves:
        return " ▄▀█"[2 * int(pairs[0, 0]) + int(pairs[1:, 0].any())]
    share = pairs.float().mean().item()
    return shades[min(3, 1 + int(share * 3)) if 0 < share < 1 else 4 * int(share)]
