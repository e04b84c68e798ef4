"""Plans hold every edge of a pattern exactly once, and cost no more than the blocks that are read."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import cutter as cutter_module
from hf_sparse.backends.plans import PLANS, PlanCache
from hf_sparse.parts import BlockTable, BlockWindow, Globals, Scope, Window, with_global_positions
from hf_sparse.patterns import Pattern
from hf_sparse.plan import make_plan, make_positional_plan, make_whole_plan
from hf_sparse.tiles import Gather as GatherWork
from hf_sparse.tiles import Group, MaskByHead, Plan, Run, Tile
from tests.pattern_cases import CASES, HEADS, WITH_GLOBALS, Case, Setting, case_name, case_of
from tests.support.softmax import random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
Work = Tile | Run | GatherWork
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])


def pieces(work: Work, group: Group, n: int) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor, Tensor]]:
    """Yield heads, positions of queries ``[Tq]`` and keys ``[Sk]``, and bool ``[heads, Tq, Sk]`` of each block."""
    position = torch.arange(n)
    mask = None if work.mask is None else work.mask.boolean()
    if isinstance(work, Tile):
        q, k = position[work.q], position[work.k]
        full = torch.ones(len(q), len(k), dtype=torch.bool) if mask is None else mask
        yield group.heads, q, k, full.reshape(-1, len(q), len(k)).expand(len(group.heads), -1, -1)
        return
    heads = group.heads if isinstance(work, Run) else tuple(group.heads[i] for i in work.heads)
    blocks = work.blocks if isinstance(work, Run) else len(work.index)
    own: Tensor | None
    for i in range(blocks):
        first = work.first + i * work.block
        if isinstance(work, Run):
            lane = position[work.offset :: work.step]
            assert first - work.back >= 0
            q, k = lane[first : first + work.block], lane[first - work.back :][: work.width]
            own = mask
        else:
            q, k = position[first : first + work.block], position_of_keys(work, i)
            own = None if mask is None else mask[i]
        assert len(q) == work.block
        own = torch.ones(len(q), len(k), dtype=torch.bool) if own is None else own
        yield heads, q, k, own.expand(len(heads), -1, -1)


def position_of_keys(work: GatherWork, i: int) -> Tensor:
    """Return the positions of the keys that block ``i`` reads."""
    return (work.index[i][:, None] * work.unit + torch.arange(work.unit)).flatten()


def count_pairs(plan: Plan, n: int) -> Tensor:
    """Return how often a plan counts each pair, int ``[HEADS, n, n]``, and check who writes first."""
    counts = torch.zeros(HEADS, n, n, dtype=torch.int64)
    served: list[int] = []
    for group in plan.groups:
        served += group.heads
        is_written = torch.zeros(HEADS, n, dtype=torch.bool)
        rows = torch.zeros_like(counts)
        inner = torch.zeros_like(counts)
        for work in group.work:
            for heads, q, k, mask in pieces(work, group, n):
                at = torch.tensor(heads)[:, None], q[None, :]
                is_row = isinstance(work, Tile) and work.is_row
                assert not (work.is_first and not is_row and is_written[at].any()), "a first tile overwrites another"
                is_written[at] = True
                for h, own in zip(heads, mask, strict=True):
                    target = (rows if is_row else inner)[h]
                    target.index_put_((q[:, None], k[None, :]), own.long(), accumulate=True)
        inner[:, group.rows] = 0
        counts += inner + rows
    assert sorted(served) == list(range(HEADS))
    return counts


def plan_of(case: Case, setting: Setting, *, invalid: tuple[int, ...] = (), rows: str = "all") -> Plan:
    """Return the plan of a case."""
    scope = Scope(setting.n, HEADS, setting.layer, setting.is_causal)
    parts = with_global_positions(case.pattern.parts(scope), setting.positions)
    return make_plan(parts, scope, invalid=invalid, rows=rows)


def check(case: Case, setting: Setting, *, invalid: tuple[int, ...] = ()) -> None:
    """Compare a plan with the drawing, at real queries."""
    counts = count_pairs(plan_of(case, setting, invalid=invalid), setting.n)
    wanted = case.mask(setting).clone()
    wanted[:, :, list(invalid)] = False
    is_real = torch.ones(setting.n, dtype=torch.bool)
    is_real[list(invalid)] = False
    assert counts[:, is_real].max() <= 1, "a pair is counted twice"
    assert torch.equal(counts[:, is_real].bool(), wanted[:, is_real])


@both_ways
@pytest.mark.parametrize("n", [1, 7, 65, 200, 331])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_plan_holds_every_edge_once(case: Case, n: int, is_causal: bool) -> None:
    check(case, Setting(n, 1, is_causal))


@both_ways
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_plan_in_small_slices_holds_every_edge_once(
    case: Case, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # long sequences are cut into slices of limited size; a small limit cuts short ones
    monkeypatch.setattr(cutter_module, "MAX_SCORES", 60)
    monkeypatch.setattr(cutter_module, "BLOCK_SCORES", 60)
    check(case, Setting(65, 1, is_causal))


@both_ways
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_plan_in_runs_and_slices_holds_every_edge_once(
    case: Case, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 331
    # one block of 64 queries against a narrow window still fits
    monkeypatch.setattr(cutter_module, "MAX_SCORES", 6000)
    monkeypatch.setattr(cutter_module, "BLOCK_SCORES", 6000)
    scope = Scope(n, HEADS, 1, is_causal)
    counts = count_pairs(make_plan(case.pattern.parts(scope), scope), n)
    assert torch.equal(counts, case.pattern.mask(n, heads=HEADS, layer=1, is_causal=is_causal).long())


def test_the_lengths_above_reach_every_kind_of_work() -> None:
    kinds: dict[str, set[type]] = {}
    for case in CASES:
        works = [work for group in plan_of(case, Setting(331)).groups for work in group.work]
        kinds[case.name] = {type(work) for work in works}
    assert kinds["band"] == {Tile, Run}
    assert kinds["random"] == {GatherWork}
    assert kinds["union_of_all_atoms"] == {Tile, Run, GatherWork}


@pytest.mark.parametrize("most", [1, 500, 10**6])
def test_a_run_is_cut_into_pieces_that_together_are_the_run(most: int) -> None:
    run = Run(offset=1, step=2, first=6, blocks=11, block=4, stride=4, back=6, width=13, mask=None, is_first=True)
    wanted = [6 + 4 * i for i in range(11)]
    for pieces in (list(run.consecutive(most)), list(run.apart(most))):
        assert sorted(piece.first + i * piece.stride for piece in pieces for i in range(piece.blocks)) == wanted
        assert all(piece.blocks == 1 or piece.scores(0) <= most for piece in pieces)
    for piece in run.apart(most):
        assert piece.blocks == 1 or piece.stride >= run.width


@both_ways
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_nobody_reads_invalid_positions(case: Case, is_causal: bool) -> None:
    check(case, Setting(200, 1, is_causal), invalid=(0, 3, 5, 77, 78, 79, 130, 199))


@both_ways
@pytest.mark.parametrize("positions", [(), (0, 1, 2, 3), (5, 66, 67, 129)])
@pytest.mark.parametrize("case", WITH_GLOBALS, ids=case_name)
def test_global_positions_of_a_sample_hold_every_edge_once(
    case: Case, positions: tuple[int, ...], is_causal: bool
) -> None:
    check(case, Setting(130, 0, is_causal, positions), invalid=(3, 66, 100))


@both_ways
@pytest.mark.parametrize("name", ["longformer", "longformer_dilated_by_head"])
def test_rows_with_projections_of_their_own_can_be_left_out_or_run_alone(name: str, is_causal: bool) -> None:
    setting = Setting(65, 0, is_causal, (2, 9, 40))
    is_row = torch.zeros(65, dtype=torch.bool)
    is_row[[2, 9, 40]] = True
    mask = case_of(name).mask(setting)
    own = count_pairs(plan_of(case_of(name), setting, rows="own"), 65)
    shared = count_pairs(plan_of(case_of(name), setting, rows="shared"), 65)
    assert torch.equal(own, (mask & is_row[:, None]).long())
    # what those rows get here is overwritten later
    assert torch.equal(shared[:, ~is_row], mask[:, ~is_row].long())


def test_rows_without_projections_of_their_own_are_shared() -> None:
    case, setting = case_of("global"), Setting(65, positions=(2, 9, 40))
    assert torch.equal(count_pairs(plan_of(case, setting, rows="shared"), 65), case.mask(setting).long())
    assert not count_pairs(plan_of(case, setting, rows="own"), 65).any()


@both_ways
@pytest.mark.parametrize("n", [3, 20, 65])
def test_tables_of_any_content_hold_every_edge_once(n: int, is_causal: bool) -> None:
    # repeated blocks, the row's own, blocks ahead, blocks beyond the end, none
    rows = [[r, r + 1, r, 0, 99] if r % 3 else [-1, r - 1, -1, r - 1, 3] for r in range(-(-n // 4))]
    shared = BlockTable(block=4, table=torch.tensor([rows]))
    by_head = BlockTable(block=4, table=torch.tensor([rows, rows[::-1], rows, rows[::-1]]))
    coarse = BlockTable(block=8, table=torch.tensor([rows])[:, : -(-n // 8), :2], heads=frozenset({1, 3}))
    position = torch.arange(n)
    allowed = torch.tensor([[[k // 4 in rows[q // 4] for k in range(n)] for q in range(n)]]).expand(HEADS, -1, -1)
    turned = torch.tensor([[k // 4 in rows[::-1][q // 4] for k in range(n)] for q in range(n)])
    wide = torch.tensor([[k // 8 in rows[q // 8][:2] for k in range(n)] for q in range(n)])
    own_head = torch.stack([allowed[0], turned, allowed[0], turned])
    only_odd = wide & torch.tensor([False, True, False, True])[:, None, None]
    unions = {
        (shared,): allowed,
        (by_head,): own_head,
        (shared, by_head): allowed | own_head,
        (BlockWindow(block=4, before=4), by_head, coarse): (block_lag(n) <= 1) & (block_lag(n) >= 0)
        | own_head
        | only_odd,
    }
    for parts, wanted in unions.items():
        counts = count_pairs(make_plan(parts, Scope(n, HEADS, 0, is_causal)), n)
        past = position[None, :] <= position[:, None] if is_causal else torch.tensor(True)
        assert torch.equal(counts, (wanted & past).long())


def block_lag(n: int) -> Tensor:
    """Return by how many blocks of four a key lies behind a query."""
    block = torch.arange(n) // 4
    return block[:, None] - block[None, :]


@both_ways
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_plan_of_positions_holds_the_edges_between_them(case: Case, is_causal: bool) -> None:
    # in no order, with gaps and a key that is padding
    q, k = torch.tensor([64, 0, 17, 30, 9]), torch.tensor([3, 64, 0, 30, 31, 9, 8, 50])
    is_real = torch.arange(8) != 4
    scope = Scope(65, HEADS, 0, is_causal)
    plan = make_positional_plan(case.pattern.parts(scope), scope, q, k, is_real)
    (group,) = plan.groups
    masks = [work.mask.boolean()[0] for work in group.work if isinstance(work, Tile) and work.mask is not None]
    wanted = case.mask(Setting(65, 0, is_causal))[:, q][:, :, k] & is_real
    assert torch.equal(torch.cat(masks, 1), wanted)


def scores_of(pattern: Pattern, n: int, *, is_causal: bool = False) -> int:
    """Return how many scores a plan computes over two heads, without making its masks."""
    scope = Scope(n, 2, 0, is_causal)
    return make_plan(pattern.parts(scope), scope).count_work()[0]


LONG = [
    hf_sparse.pattern("longformer", window=512, global_tokens=(0,)),
    hf_sparse.pattern("bigbird", block_size=64),
    hf_sparse.pattern("bigbird", block_size=64, random_plan="full_length"),
    hf_sparse.pattern("band", radius=256) | hf_sparse.pattern("random", block_size=64),
    hf_sparse.pattern("dilated", radius=64, dilation=4),
]


@both_ways
@pytest.mark.parametrize("pattern", LONG, ids=["longformer", "bigbird", "bigbird_full_length", "union", "dilated"])
def test_cost_grows_with_the_length_and_not_its_square(pattern: Pattern, is_causal: bool) -> None:
    short, long = (scores_of(pattern, n, is_causal=is_causal) for n in (8192, 65536))
    # eight times the length, and what the borders of the short one saved
    assert long <= 8.5 * short
    # blocks of 64 queries read a window rounded up to whole blocks, and a causal block reads its own end in vain
    edges = pattern.density(8192, heads=2, is_causal=is_causal) * 2 * 8192**2
    assert edges <= short <= 2.5 * edges


def test_a_plan_of_a_long_sequence_keeps_no_mask_of_all_pairs() -> None:
    n = 65536
    scope = Scope(n, 1)
    for pattern in LONG:
        held = 0
        masks: dict[int, Tensor] = {}
        for group in make_plan(pattern.parts(scope), scope).groups:
            for work in group.work:
                tensors = [work.index] if isinstance(work, GatherWork) else []
                if isinstance(work, Tile):
                    tensors += [at for at in (work.q, work.k) if isinstance(at, Tensor)]
                held += sum(tensor.numel() for tensor in tensors)
                if isinstance(work, Run) and work.mask is not None:
                    masks[id(work.mask)] = work.mask.boolean()
        held += sum(mask.numel() for mask in masks.values())
        # a few positions for each token
        assert held <= 32 * n, pattern


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_density_is_the_share_of_edges(case: Case) -> None:
    for n in (1, 7, 65):
        for is_causal in (False, True):
            wanted = float(case.mask(Setting(n, 1, is_causal)).double().mean())
            assert case.pattern.density(n, heads=HEADS, layer=1, is_causal=is_causal) == wanted


def test_global_positions_beyond_the_end_are_left_out() -> None:
    scope = Scope(4, HEADS)
    plan = make_plan((Globals(positions=(1, 4, 90)),), scope)
    counts = count_pairs(plan, 4)
    wanted = torch.zeros(4, 4, dtype=torch.int64)
    wanted[1] = wanted[:, 1] = 1
    assert torch.equal(counts, wanted.expand(HEADS, -1, -1))


@pytest.mark.parametrize(("name", "plans"), [("longformer", 1), ("bigbird_full_length", 3)])
def test_layers_share_a_plan_unless_the_pattern_differs_by_layer(name: str, plans: int) -> None:
    tensors = random_tensors(tokens=70, width=4)
    PLANS.clear()
    for step in (1, 2):
        for layer in range(3):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            out = hf_sparse.sparse_attention(*leaves, case_of(name).pattern, layer=layer, backend="gather")
            assert isinstance(out, Tensor)
            out.sum().backward()
        # nothing is planned again for the backward pass, nor in a second step
        assert PLANS.misses == plans, step


def test_plans_are_kept_up_to_a_size_and_the_oldest_go_first() -> None:
    def make(size: int) -> Plan:
        gather = GatherWork((0,), 0, 1, torch.zeros(size, 1, dtype=torch.int64), 1, None, True)
        return Plan(size, (Group((0,), (gather,), torch.empty(0), torch.empty(0)),))

    cache = PlanCache(most_bytes=120)
    plans = {key: cache.get(key, lambda: make(4)) for key in "abc"}
    assert plans["a"].kept_bytes == 32
    # used again, it is not the oldest any more
    assert cache.get("a", lambda: make(4)) is plans["a"]
    cache.get("d", lambda: make(4))
    assert (len(cache), cache.misses) == (3, 4)
    assert cache.get("a", lambda: make(4)) is plans["a"]
    assert cache.get("b", lambda: make(4)) is not plans["b"]
    # one that is too large stays alone
    large = cache.get("e", lambda: make(40))
    assert len(cache) == 1
    assert cache.get("e", lambda: make(40)) is large


def test_masks_that_are_made_later_count_as_well() -> None:
    plan = make_plan((Window(before=3, after=3),), Scope(200, HEADS))
    before = plan.kept_bytes
    kept = [work.mask.additive(torch.zeros(1)) for work in plan.groups[0].work if work.mask is not None]
    assert plan.kept_bytes >= before + sum(term.numel() * 4 for term in kept) > before


def test_layers_at_many_lengths_keep_their_plans() -> None:
    """Random blocks differ by layer: twelve layers at as many lengths are planned once."""
    pattern = hf_sparse.pattern("bigbird", block_size=4)
    PLANS.clear()
    for _ in range(2):
        for n in range(64, 112, 4):
            tensors = random_tensors(tokens=n, width=4)
            for layer in range(12):
                hf_sparse.sparse_attention(*tensors, pattern, layer=layer, backend="gather")
    assert PLANS.misses == 12 * 12


@pytest.mark.parametrize("n", [64, 61])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("invalid", [(), (5,)])
def test_a_mask_by_head_says_what_was_drawn(n: int, is_causal: bool, invalid: tuple[int, ...]) -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=8, num_random_blocks=1)
    scope = Scope(n, HEADS, 0, is_causal)
    plan = make_whole_plan(pattern.parts(scope), scope, invalid=invalid)
    mask = plan.groups[0].work[0].mask
    assert isinstance(mask, MaskByHead)
    drawn = pattern.mask(n, heads=HEADS, is_causal=is_causal)
    drawn[:, list(invalid)] = False
    drawn[:, :, list(invalid)] = False
    assert torch.equal(mask.boolean()[0], drawn)
    room = torch.full((2 * mask.size,), 7.0)
    for heads in (slice(0, 2), slice(2, HEADS)):
        wanted = torch.zeros(drawn[heads].shape).masked_fill(~drawn[heads], float("-inf"))
        assert torch.equal(mask.of_heads(heads, room, room)[0], wanted)
        assert mask.of_heads(heads, torch.empty(0, dtype=torch.float64)).dtype == torch.float64
    # an entry for each block where there is nothing finer, else two bytes for each pair
    is_of_blocks = not (is_causal or invalid)
    drawn_bytes = HEADS * n * n
    assert mask.kept_bytes == drawn_bytes + 2 * (HEADS * 8 * 8 if is_of_blocks else drawn_bytes)


def test_a_plan_is_whole_if_each_group_of_heads_has_one_tile() -> None:
    """One group has two whole tiles here, and the other nothing at all."""
    one, none = (hf_sparse.pattern("global", positions=held) for held in (tuple(range(16)), (5000,)))
    pattern = hf_sparse.by_head({0: one, range(1, HEADS): none})
    tensors = random_tensors(tokens=16, heads=HEADS, key_heads=HEADS, width=4)
    assert not make_plan(pattern.parts(Scope(16, HEADS)), Scope(16, HEADS)).is_whole
    for backend in ("auto", "gather"):
        out = hf_sparse.sparse_attention(*tensors, pattern, backend=backend)
        assert isinstance(out, Tensor)
        assert not out[:, 1:].any(), backend
        assert out[:, 0].all(), backend
