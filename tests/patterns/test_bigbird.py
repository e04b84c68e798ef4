"""BigBird: a window of blocks, global end blocks, random blocks, published or over the full length."""

import pytest
import torch

import hf_sparse
from tests.pattern_cases import Setting, random_table
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import rules, system_rules
from tests.support.published_bigbird import published_blocks

PLANS = ("published", "full_length")
FIELDS = "block_size, num_random_blocks, seed, random_plan, length, num_external_global"


# drawn by hand: the nodes are all that is global
NODES = {"block_size": 1, "num_random_blocks": 0, "num_external_global": 2}
PAIRS = {"block_size": 2, "num_random_blocks": 0, "num_external_global": 1}
DRAWINGS = {
    "single": Drawing(NODES, ("xx.. xx", "xxx. xx", ".xxx xx", "..xx xx", "xxxx xx", "xxxx xx"), 4),
    "single_causal": Drawing(NODES, ("x... xx", "xx.. xx", ".xx. xx", "..xx xx", ".... xx", ".... xx"), 4, True),
    "pairs": Drawing(PAIRS, ("xxxx. x", "xxxx. x", "xxxxx x", "xxxxx x", "..xxx x", "xxxxx x"), 5),
    "pairs_causal": Drawing(PAIRS, ("x.... x", "xx... x", "xxx.. x", "xxxx. x", "..xxx x", "..... x"), 5, True),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


def full_length(blocks: int, *, count: int = 2, heads: int = 1, is_causal: bool = False) -> list[list[set[int]]]:
    """Return the random blocks of the plan over the full length, at one token a block."""
    pattern = hf_sparse.pattern("bigbird", block_size=1, num_random_blocks=count, random_plan="full_length")
    return random_table(pattern, Setting(blocks, 0, is_causal), heads=heads)


def candidates(row: int, blocks: int, *, is_causal: bool) -> set[int]:
    """Return the blocks that a row may draw: neither its window nor a global one."""
    if is_causal:
        return set(range(1, row - 1))
    return {block for block in range(1, blocks - 1) if abs(block - row) > 1}


def test_window_and_ends_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=1, num_random_blocks=0)
    checks.check_drawn_by_hand(pattern, "xxxxxx", "xxx..x", "xxxx.x", "x.xxxx", "x..xxx", "xxxxxx")
    rows = ("x.....", "xx....", "xxx...", "x.xx..", "x..xx.", "x...xx")
    checks.check_drawn_by_hand(pattern, *rows, is_causal=True)


def test_a_last_block_cut_short_is_global_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=5, num_random_blocks=0)
    checks.check_drawn_by_hand(pattern, *["xxxxxx"] * 6)


@checks.both_ways
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("block", "count"), [(1, 2), (8, 2), (8, 3), (64, 1)])
def test_masks_equal_the_rule_for_the_drawn_table(block: int, count: int, plan: str, is_causal: bool) -> None:
    for n in checks.lengths(8):
        pattern = hf_sparse.pattern("bigbird", block_size=block, num_random_blocks=count, random_plan=plan)
        table = random_table(pattern, Setting(n, 2, is_causal), heads=2)
        rule = rules.bigbird(block, n, table, is_causal=is_causal)
        checks.check_mask(pattern, rule, n, heads=2, layer=2, is_causal=is_causal)


@by_drawing
def test_the_rule_with_nodes_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    block, nodes = drawing.fields["block_size"], drawing.fields["num_external_global"]
    table: list[list[set[int]]] = [[set()] * drawing.n]
    drawn = system_rules.bigbird_external(drawing.n, block, table, nodes, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_nodes_instead_of_global_blocks_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("bigbird", drawing)


@checks.both_ways
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("block", "count", "nodes"), [(1, 2, 1), (8, 3, 5), (8, 0, 2), (64, 1, 20)])
def test_masks_with_nodes_equal_the_rule_for_the_table_without(
    block: int, count: int, nodes: int, plan: str, is_causal: bool
) -> None:
    fields = {"block_size": block, "num_random_blocks": count, "random_plan": plan}
    for n in checks.lengths(block, longest=257):
        # window and random blocks stay as they are
        table = random_table(hf_sparse.pattern("bigbird", **fields), Setting(n, 2, is_causal), heads=2)
        wanted = system_rules.bigbird_external(n, block, table, nodes, is_causal=is_causal)
        pattern = hf_sparse.pattern("bigbird", **fields, num_external_global=nodes)
        checks.check_table(pattern, wanted, n, layer=2, is_causal=is_causal)


def test_there_are_as_many_nodes_as_external_globals() -> None:
    for n in (1, 2, 257):
        assert hf_sparse.pattern("bigbird").num_nodes(n) == 0
        assert hf_sparse.pattern("bigbird", num_external_global=7).num_nodes(n) == 7


def test_no_path_through_nodes_reaches_the_future() -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=2, num_random_blocks=1, num_external_global=3)
    checks.check_no_leak(pattern, 21)


@pytest.mark.parametrize("layer", [0, 1, 11])
@pytest.mark.parametrize(
    ("n", "block", "count"),
    [
        *((n, 64, 3) for n in (1024, 2048, 3072, 4096)),
        (1024, 16, 3),
        (1024, 128, 3),
        (2048, 32, 2),
        (4096, 128, 1),
        *((320, 16, count) for count in (1, 2, 3)),
        *((1536, 64, count) for count in (1, 2, 3)),
        *((512, 64, 3), (768, 64, 3), (8192, 64, 3)),
    ],
)
def test_the_published_plan_equals_the_published_code(n: int, block: int, count: int, layer: int) -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=block, num_random_blocks=count)
    wanted = published_blocks(n, block, count, heads=3, layer=layer)
    table = random_table(pattern, Setting(n, layer), heads=3)
    for head, published in zip(table, wanted, strict=True):
        # the first and the last block read everything and need no draw
        assert head[1:-1] == list(published[1:-1])


def test_the_published_plan_of_a_length_that_divides_nothing_is_that_of_its_blocks() -> None:
    pattern = hf_sparse.pattern("bigbird")
    for short, whole in ((1000, 1024), (1473, 1536), (4090, 4096)):
        assert random_table(pattern, Setting(short)) == random_table(pattern, Setting(whole))


def test_a_seed_shifts_the_published_layers() -> None:
    shifted = hf_sparse.pattern("bigbird", seed=3)
    assert random_table(shifted, Setting(1536, 2)) == random_table(hf_sparse.pattern("bigbird"), Setting(1536, 5))


def test_a_pair_published_twice_counts_once() -> None:
    # at 1024 tokens a published draw may hit the last block, which is global as well
    published = published_blocks(1024, 64, 3, heads=8, layer=0)
    assert any(15 in row for head in published for row in head)
    pattern = hf_sparse.pattern("bigbird")
    assert pattern.density(1024, heads=2) == float(pattern.mask(1024, heads=2).double().mean())


@pytest.mark.parametrize("plan", PLANS)
def test_sequences_too_short_for_all_random_blocks_get_those_there_are(plan: str) -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=1, num_random_blocks=5, random_plan=plan)
    for blocks in range(1, 9):
        for head in random_table(pattern, Setting(blocks), heads=2):
            for row in range(1, blocks - 1):
                assert head[row] <= candidates(row, blocks, is_causal=False)
                if plan == "full_length":
                    assert len(head[row]) == min(5, len(candidates(row, blocks, is_causal=False)))


@checks.both_ways
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 6, 7, 30])
def test_full_length_blocks_are_distinct_and_legal(blocks: int, count: int, is_causal: bool) -> None:
    for head in full_length(blocks, count=count, heads=4, is_causal=is_causal):
        for row, drawn in enumerate(head):
            # the ends read everything already
            if row not in (0, blocks - 1) or is_causal:
                legal = candidates(row, blocks, is_causal=is_causal)
                assert drawn <= legal
                assert len(drawn) == min(count, len(legal))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_longer_sequence_replaces_blocks_only_by_new_ones(count: int) -> None:
    for old in (4, 7, 12, 40):
        shorter = full_length(old, count=count, heads=4)
        for new in (old + 1, old + 2, 90):
            longer = full_length(new, count=count, heads=4)
            for head, other in zip(shorter, longer, strict=True):
                for drawn, grown in zip(head[1:-1], other[1 : old - 1], strict=True):
                    # the old last block was global; now it may be drawn
                    assert {block for block in grown if block < old - 1} <= drawn


def test_a_longer_sequence_has_no_edge_between_old_tokens_that_the_shorter_lacks() -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=2, random_plan="full_length")
    for old in (9, 31, 32, 60):
        shorter = pattern.mask(old, heads=3)
        longer = pattern.mask(150, heads=3)[:, :old, :old]
        assert not (longer & ~shorter).any()


@pytest.mark.parametrize("plan", PLANS)
def test_a_causal_pattern_is_the_same_at_every_length(plan: str) -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=2, random_plan=plan)
    longest = pattern.mask(150, heads=3, is_causal=True)
    for n in (1, 4, 31, 64, 149):
        assert torch.equal(pattern.mask(n, heads=3, is_causal=True), longest[:, :n, :n])


@checks.both_ways
def test_full_length_reaches_every_block_about_evenly(is_causal: bool) -> None:
    blocks, count, heads = 30, 3, 1500
    table = full_length(blocks, count=count, heads=heads, is_causal=is_causal)
    for row in (5, 14, 27):
        legal = candidates(row, blocks, is_causal=is_causal)
        # each of the three slots draws evenly from a third of the candidates, rounded up or down
        least, most = 1 / -(-len(legal) // count), 1 / max(1, len(legal) // count)
        for block in legal:
            hits = sum(block in head[row] for head in table)
            # five standard deviations of a binomial count
            low, high = (heads * p + side * 5 * (heads * p * (1 - p)) ** 0.5 for p, side in ((least, -1), (most, 1)))
            assert low <= hits <= high, f"row {row} hits block {block} {hits} times"


def test_full_length_leaves_the_first_1024_tokens_that_the_published_plan_stays_in() -> None:
    tables = {plan: random_table(hf_sparse.pattern("bigbird", random_plan=plan), Setting(4096)) for plan in PLANS}
    furthest = {plan: max(max(row) for head in table for row in head[1:-1]) for plan, table in tables.items()}
    assert furthest == {"published": 15, "full_length": 62}


def test_fields_and_defaults() -> None:
    defaults = {"block_size": 64, "num_random_blocks": 3, "seed": 0, "random_plan": "published", "length": "real"}
    checks.check_fields("bigbird", {**defaults, "num_external_global": 0})


def test_it_survives_json() -> None:
    checks.check_round_trip(
        hf_sparse.pattern("bigbird", block_size=3, seed=5, random_plan="full_length", length="padded")
    )
    checks.check_round_trip(hf_sparse.pattern("bigbird", num_external_global=7))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("bigbird", FIELDS)


@pytest.mark.parametrize(
    ("field", "least"), [("block_size", 1), ("num_random_blocks", 0), ("seed", 0), ("num_external_global", 0)]
)
def test_bad_counts_are_refused(field: str, least: int) -> None:
    checks.check_count_field("bigbird", field, least=least)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**40])
def test_a_seed_that_is_accepted_draws(seed: int, plan: str) -> None:
    try:
        pattern = hf_sparse.pattern("bigbird", block_size=4, seed=seed, random_plan=plan)
    except ValueError as error:
        assert f"got {seed}" in str(error)  # noqa: PT017
    else:
        assert pattern.mask(60, layer=11).any()


@pytest.mark.parametrize(
    ("field", "known"), [("random_plan", "published, full_length, evaluation"), ("length", "real, padded")]
)
def test_bad_choices_are_refused_with_the_known_ones(field: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one of {known}; got 'full'"):
        hf_sparse.pattern("bigbird", **{field: "full"})


def test_a_block_larger_than_the_model_is_refused() -> None:
    checks.check_fits_model(hf_sparse.pattern("bigbird", block_size=16), 16)


def test_it_varies_by_layer_and_only_a_padded_length_reads_padding() -> None:
    assert hf_sparse.pattern("bigbird").varies_by_layer
    assert not hf_sparse.pattern("bigbird").reads_padding
    assert hf_sparse.pattern("bigbird", length="padded").reads_padding
