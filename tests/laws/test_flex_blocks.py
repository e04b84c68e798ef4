"""What FlexAttention is given: blocks and tags together are the pattern, no more and no less, in O(blocks read).

On the CPU torch goes through all pairs and looks at the tags alone, so here the blocks are read as the kernels read them:
a block of the first kind under the tags, one of the second kind whole, all others never.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_sparse
from hf_sparse.backends import flex, flex_blocks
from hf_sparse.backends.dense import draw_edges
from hf_sparse.backends.flex_blocks import cached_layout, positional_layout
from hf_sparse.backends.flex_tags import Layout
from hf_sparse.parts import BlockTable, BlockWindow, Part, Scope
from hf_sparse.patterns import Pattern
from hf_sparse.segments import Segment
from tests.pattern_cases import HEADS, IN_FLEX, Case, Setting, case_name, case_of, sampled
from tests.support.rules import draw_batch

both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
CPU = torch.device("cpu")
MASKS = ("key_padding_mask", "global_mask", "document_ids")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few tokens fill many blocks."""
    monkeypatch.setattr(flex_blocks, "BLOCK", 8)


def lay_out(
    pattern: Pattern, batch: int, n: int, *, is_causal: bool = False, rows: str = "all", layer: int = 0, **masks: Tensor
) -> Layout:
    """Build a layout as the backend does, past the cache."""
    padding, is_global, documents = (masks.get(name) for name in MASKS)
    found = flex._segments(batch, n, padding, documents, is_global, reads_padding=pattern.reads_padding)
    scope = Scope(n, HEADS, layer, is_causal, 0, HEADS)
    return cached_layout.__wrapped__(pattern, scope, *found, batch, rows, CPU)


def listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Return the blocks of a table: bool ``[B, HEADS, rows, columns]``, after a check that none is there twice."""
    times = torch.zeros(*counts.shape, columns, dtype=torch.int64)
    is_listed = torch.arange(indices.shape[-1]) < counts[..., None]
    times.scatter_add_(-1, indices.long(), is_listed.long())
    assert times.max() <= 1
    return (times > 0).expand(-1, HEADS, -1, -1)


def over_tokens(blocks: Tensor, queries: int, keys: int) -> Tensor:
    """Return a table of blocks as one of tokens."""
    size = flex_blocks.BLOCK
    return blocks.repeat_interleave(size, -2).repeat_interleave(size, -1)[..., :queries, :keys]


def seen(layout: Layout, queries: int, keys: int, *, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs that a kernel counts, and the blocks it reads in part and whole: bool ``[B, HEADS, ...]``."""
    rows, columns = (-(-n // flex_blocks.BLOCK) for n in (queries, keys))
    blocks = layout.blocks
    part, whole = (listed(*blocks[i : i + 2], columns) for i in (0, 2))
    for forward, i in ((part, 4), (whole, 6)):
        assert torch.equal(listed(*blocks[i : i + 2], rows).transpose(2, 3), forward)
    assert not (part & whole).any()
    at = [torch.arange(n) for n in (len(part), HEADS, queries, keys)]
    index = [line.view([-1 if i == j else 1 for j in range(4)]) for i, line in enumerate(at)]
    allowed = flex._edges(layout.tags, is_causal)(*index)
    in_part, in_whole = over_tokens(part, queries, keys), over_tokens(whole, queries, keys)
    return in_whole | (in_part & allowed), part, whole


def by_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the blocks that hold an edge and those that hold no other pair; what is beyond the end is no pair."""
    size = flex_blocks.BLOCK
    queries, keys = (-n % size for n in mask.shape[2:])
    tiles = torch.nn.functional.pad(mask, (0, keys, 0, queries)).unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return tiles.any(5).any(3), tiles.all(5).all(3)


def check(layout: Layout, mask: Tensor, *, is_causal: bool, has_holes: bool = False) -> None:
    """Compare a layout with the mask ``[B, HEADS, T, S]``: every edge and no other pair, and no block without an edge."""
    pairs, part, whole = seen(layout, *mask.shape[2:], is_causal=is_causal)
    assert torch.equal(pairs, mask)
    has_edge, is_whole = by_blocks(mask)
    assert not (whole & ~is_whole).any()
    # beside a hole of a dilated window or a table a block may be read in vain
    assert has_holes or torch.equal(part | whole, has_edge)


@both_ways
@pytest.mark.parametrize("n", [1, 7, 65])
@pytest.mark.parametrize("case", IN_FLEX, ids=case_name)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_and_tags_are_the_pattern(case: Case, n: int, is_causal: bool) -> None:
    layout = lay_out(case.pattern, 2, n, is_causal=is_causal, layer=1)
    check(layout, case.mask(Setting(n, 1, is_causal))[None].expand(2, -1, -1, -1), is_causal=is_causal)


def sample_masks(name: str) -> dict[str, Tensor]:
    """Return masks of six rows of 40 tokens: padding on either side, holes, nothing but padding, none; packed rows."""
    column = torch.arange(40)
    real = torch.stack(
        [column >= 11, column < 23, (column > 4) & (column < 31), column % 7 > 1, column < 0, column >= 0]
    )
    documents = torch.stack(
        [column // 9, column // 20, column // 40, (column - 13) // 13, column // 3, column // 25 - 1]
    )
    is_global = torch.stack([column == 12, column % 11 == 3, column < 0, column == 2, column == 5, column >= 38])
    return {
        "padding": {"key_padding_mask": real},
        "documents": {"document_ids": documents},
        "both": {"key_padding_mask": real, "document_ids": documents},
        "globals": {"key_padding_mask": real, "global_mask": is_global},
        "packed_globals": {"document_ids": documents, "global_mask": is_global},
    }[name]


@both_ways
@pytest.mark.parametrize("name", ["padding", "documents", "both", "globals", "packed_globals"])
@pytest.mark.parametrize("case", sampled(IN_FLEX))
@pytest.mark.usefixtures("small_blocks")
def test_padding_documents_and_global_masks_differ_by_row(case: Case, name: str, is_causal: bool) -> None:
    masks = sample_masks(name)
    if "global_mask" in masks and not case.pattern.has_global_tokens:
        masks = {key: mask for key, mask in masks.items() if key != "global_mask"}
    mask = draw_batch(
        lambda length, positions: case.mask(Setting(length, 0, is_causal, positions)),
        batch=6,
        tokens=40,
        heads=HEADS,
        reads_padding=case.pattern.reads_padding,
        **masks,
    )
    layout = lay_out(case.pattern, 6, 40, is_causal=is_causal, **masks)
    check(layout, mask, is_causal=is_causal, has_holes="key_padding_mask" in masks)


@both_ways
@pytest.mark.parametrize("rows", ["all", "shared", "own"])
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_blocks_of_full_size_equal_the_drawn_mask(case: Case, rows: str, is_causal: bool) -> None:
    n = 430
    masks = {"document_ids": torch.stack([torch.zeros(n).long(), torch.arange(n) // 260])}
    query = torch.empty(2, HEADS, n, 0)
    settings: dict[str, Any] = {"pattern": case.pattern.json, "layer": 0, "is_causal": is_causal, "rows": rows}
    mask = draw_edges(
        query, query, None, None, masks["document_ids"], None, None, **settings, head_offset=0, num_heads=4
    )
    check(lay_out(case.pattern, 2, n, is_causal=is_causal, rows=rows, **masks), mask, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("name", ["band", "block_local", "global"])
@pytest.mark.usefixtures("small_blocks")
def test_a_block_that_one_part_fills_is_read_whole(name: str, is_causal: bool) -> None:
    pattern = {
        "band": hf_sparse.pattern("band", radius=19),
        "block_local": hf_sparse.pattern("block_local", block_size=20),
        "global": hf_sparse.pattern("global", positions=tuple(range(3, 26))),
    }[name]
    mask = pattern.mask(90, heads=HEADS, is_causal=is_causal)[None]
    _, part, whole = seen(lay_out(pattern, 1, 90, is_causal=is_causal), 90, 90, is_causal=is_causal)
    assert torch.equal(whole, by_blocks(mask)[1])
    assert whole.any()
    assert part.any()


@both_ways
@pytest.mark.parametrize(
    "pattern", [hf_sparse.pattern("band", radius=30), hf_sparse.pattern("block_local", block_size=64)], ids=str
)
@pytest.mark.usefixtures("small_blocks")
def test_a_block_inside_a_hole_is_not_read(pattern: Pattern, is_causal: bool) -> None:
    real = torch.ones(1, 70, dtype=torch.bool)
    real[0, 14:37] = False
    mask = pattern.mask(70, heads=HEADS, is_causal=is_causal)[None] & real[:, None, :, None] & real[:, None, None]
    check(lay_out(pattern, 1, 70, is_causal=is_causal, key_padding_mask=real), mask, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("case", sampled(IN_FLEX))
@pytest.mark.usefixtures("small_blocks")
def test_queries_that_are_not_the_keys_read_every_block_in_part(case: Case, is_causal: bool) -> None:
    real = torch.arange(60).expand(2, -1) >= torch.tensor([[0], [11]])
    k_positions = torch.arange(60).expand(2, -1) - torch.tensor([[0], [11]])
    q_positions = k_positions[:, 35:]
    scope = Scope(60, HEADS, 0, is_causal, 0, HEADS)
    layout = positional_layout(case.pattern, scope, q_positions, k_positions, real, None, "all")
    query, key = torch.empty(2, HEADS, 25, 0), torch.empty(2, HEADS, 60, 0)
    positions = q_positions, k_positions
    mask = draw_edges(query, key, real, None, None, *positions, case.pattern.json, 0, is_causal, 0, HEADS, "all")
    pairs, part, whole = seen(layout, 25, 60, is_causal=is_causal)
    assert torch.equal(pairs, mask)
    assert part.all()
    assert not whole.any()


@pytest.mark.parametrize("name", ["random", "bigbird_published", "by_head"])
def test_heads_have_tables_of_their_own_only_where_they_differ(name: str) -> None:
    assert lay_out(case_of(name).pattern, 1, 300).blocks[0].shape[1] == HEADS
    assert lay_out(case_of("longformer").pattern, 1, 300).blocks[0].shape[1] == 1


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for held in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(held, Tensor):
                self.elements = max(self.elements, held.numel())
        return result


@pytest.mark.parametrize("documents", [1, 300])
def test_65536_tokens_cost_no_more_than_the_blocks_read(documents: int) -> None:
    n = 65536
    ids = None if documents == 1 else (torch.arange(n) * documents // n)[None]
    masks = {} if ids is None else {"document_ids": ids}
    with Largest() as largest:
        layout = lay_out(hf_sparse.pattern("band", radius=256), 1, n, **masks)
    # 512 blocks of queries, each beside five of keys
    assert sum(indices.numel() for indices in layout.blocks[1::2]) <= 4 * 5 * 512
    assert sum(int(counts.sum()) for counts in (layout.blocks[0], layout.blocks[2])) <= 5 * 512
    # nothing is larger than a few numbers a token
    assert largest.elements <= 4 * n


def test_layers_share_a_layout_unless_the_pattern_varies_by_layer() -> None:
    drawn: dict[str, list[Layout]] = {}
    for name in ("longformer", "bigbird_full_length"):
        for layer in (0, 1):
            with pytest.MonkeyPatch.context() as patch:
                noted = drawn.setdefault(name, [])
                patch.setattr(
                    flex, "run_plainly", lambda q, k, v, layout, *_, noted=noted: noted.append(layout) or (q, q)
                )
                tensor = torch.zeros(1, HEADS, 20, 4)
                hf_sparse.sparse_attention(tensor, tensor, tensor, case_of(name).pattern, layer=layer, backend="flex")
    assert drawn["longformer"][0] is drawn["longformer"][1]
    assert drawn["bigbird_full_length"][0] is not drawn["bigbird_full_length"][1]


def test_parts_that_change_with_the_length_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(self: Pattern, scope: Scope) -> tuple[Part, ...]:
        return (BlockWindow(block=scope.length),)

    monkeypatch.setattr(hf_sparse.PATTERNS["band"], "parts", parts)
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="'band', whose parts change with the length; pass backend='gather'"):
        lay_out(hf_sparse.pattern("band"), 1, 5, document_ids=documents)


def test_a_table_may_be_narrower_at_some_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(self: Pattern, scope: Scope) -> tuple[Part, ...]:
        return (BlockTable(block=1, table=torch.arange(scope.length).expand(1, scope.length, -1)),)

    monkeypatch.setattr(hf_sparse.PATTERNS["band"], "parts", parts)
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    layout = lay_out(hf_sparse.pattern("band"), 1, 5, document_ids=documents)
    wanted = (documents[:, :, None] == documents[:, None, :])[:, None].expand(1, HEADS, 5, 5)
    check(layout, wanted, is_causal=False)


def test_the_cache_tells_alike_rows_from_rows_without_tokens() -> None:
    pattern = hf_sparse.pattern("band", radius=1)
    segment = (Segment(0, 0, 4),)
    scope = Scope(4, 1)
    alike, alone = (functools.partial(cached_layout, pattern, scope, segment, n, 2, "all", CPU)() for n in (1, 2))
    assert torch.equal(alike.tags.k_segment[1], torch.zeros(4))
    assert torch.equal(alone.tags.k_segment[1], torch.full((4,), -2))
