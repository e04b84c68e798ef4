"""BP-Transformer: a binary tree of spans over the tokens; leaves read the near ones small and the far ones large."""

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules

FIELDS = "nodes_per_level, spans"
ONE, TWO = {"nodes_per_level": 1}, {"nodes_per_level": 2}
# columns: tokens, level 1, level 2, ... , root
NODES_OF_4 = ("xx.. .. .", "..xx .. .", "xxxx .. .")
NODES_OF_5 = (
    *("xx... ... .. .", "..xx. ... .. .", "....x ... .. ."),
    *("xxxx. ... .. .", "....x ... .. .", "xxxxx ... .. ."),
)
NODES_OF_6 = (
    *("xx.... ... .. .", "..xx.. ... .. .", "....xx ... .. ."),
    *("xxxx.. ... .. .", "....xx ... .. .", "xxxxxx ... .. ."),
)
LEAVES_OF_5 = ("xx... .x. .x .", "xxxx. ... .x .", "xxxx. ..x .. .", "..xxx x.. .. .", "..xxx x.. .. .")
PAST_OF_5 = ("x.... ... .. .", "xx... ... .. .", "xxx.. ... .. .", "..xx. x.. .. .", "..xxx x.. .. .")
LEAVES_OF_6 = (
    *("xxxx.. ..x .. .", "xxxx.. ..x .. .", "xxxxxx ... .. ."),
    *("xxxxxx ... .. .", "..xxxx x.. .. .", "..xxxx x.. .. ."),
)
PAST_OF_6 = (
    *("x..... ... .. .", "xx.... ... .. .", "xxx... ... .. ."),
    *("xxxx.. ... .. .", "..xxx. x.. .. .", "..xxxx x.. .. ."),
)
DRAWINGS = {
    "alone": Drawing(ONE, ("x",)),
    "pair": Drawing(ONE, ("xx .", "xx .", "xx ."), 2),
    "pair_causal": Drawing(ONE, ("x. .", "xx .", "xx ."), 2, True),
    "four": Drawing(ONE, ("xx.. .x .", "xxxx .. .", "xxxx .. .", "..xx x. .", *NODES_OF_4), 4),
    "four_causal": Drawing(ONE, ("x... .. .", "xx.. .. .", "xxx. .. .", "..xx x. .", *NODES_OF_4), 4, True),
    "five": Drawing(ONE, LEAVES_OF_5 + NODES_OF_5, 5),
    "five_causal": Drawing(ONE, PAST_OF_5 + NODES_OF_5, 5, True),
    "six_by_two": Drawing(TWO, LEAVES_OF_6 + NODES_OF_6, 6),
    "six_by_two_causal": Drawing(TWO, PAST_OF_6 + NODES_OF_6, 6, True),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = system_rules.bp_transformer(drawing.n, **drawing.fields, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("bp_transformer", drawing)


# what one leaf of a larger tree reads, followed by hand: (tokens, nodes a level, leaf, first and last token of each span)
WALKS = [
    (8, 1, 6, [(0, 3), (4, 4), (5, 5), (6, 6), (7, 7)]),
    (8, 1, 1, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7)]),
    (16, 1, 9, [(0, 3), (4, 5), (6, 7), (8, 8), (9, 9), (10, 10), (11, 11), (12, 15)]),
    (16, 2, 11, [(0, 3), (4, 5), (6, 7), (8, 8), (9, 9), (10, 10), (11, 11), (12, 12), (13, 13), (14, 15)]),
    (13, 1, 3, [(0, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 7), (8, 12)]),
]
by_walk = pytest.mark.parametrize(("n", "nodes_per_level", "leaf", "spans"), WALKS)


@by_walk
def test_the_rule_reads_the_spans_of_a_walk_by_hand(
    n: int, nodes_per_level: int, leaf: int, spans: list[tuple[int, int]]
) -> None:
    leaves = system_rules.leaves_of_nodes(n)
    for is_causal in (False, True):
        read = system_rules.bp_transformer(n, nodes_per_level=nodes_per_level, is_causal=is_causal)[0, leaf]
        found = sorted((leaves[node][0], leaves[node][-1]) for node in read.nonzero().flatten().tolist())
        assert found == [span for span in spans if span[1] <= leaf or not is_causal]


@by_walk
def test_a_leaf_reads_the_spans_of_a_walk_by_hand(
    n: int, nodes_per_level: int, leaf: int, spans: list[tuple[int, int]]
) -> None:
    for is_causal in (False, True):
        mask = hf_sparse.pattern("bp_transformer", nodes_per_level=nodes_per_level).mask(n, is_causal=is_causal)[0]
        under = [[token] for token in range(n)] + [row.nonzero().flatten().tolist() for row in mask[n:]]
        found = sorted((under[node][0], under[node][-1]) for node in mask[leaf].nonzero().flatten().tolist())
        assert found == [span for span in spans if span[1] <= leaf or not is_causal]


def tiles(read: torch.Tensor, leaf: int, leaves: list[list[int]]) -> list[int]:
    """Return the tokens that a leaf reads, itself and through nodes, each as often as it is read."""
    return sorted(token for node in read[leaf].nonzero().flatten().tolist() for token in leaves[node])


@checks.both_ways
@pytest.mark.parametrize("nodes_per_level", [1, 2, 4])
def test_the_nodes_that_the_rule_reads_tile_the_text(nodes_per_level: int, is_causal: bool) -> None:
    for n in range(1, 71):
        leaves = system_rules.leaves_of_nodes(n)
        (read,) = system_rules.bp_transformer(n, nodes_per_level=nodes_per_level, is_causal=is_causal)
        for leaf in range(n):
            wanted = list(range(leaf + 1 if is_causal else n))
            assert tiles(read, leaf, leaves) == wanted, f"leaf {leaf} of {n}"


@checks.both_ways
@pytest.mark.parametrize("nodes_per_level", [1, 2, 4])
def test_the_nodes_that_a_leaf_reads_tile_the_text(nodes_per_level: int, is_causal: bool) -> None:
    pattern = hf_sparse.pattern("bp_transformer", nodes_per_level=nodes_per_level)
    for n in range(1, 71):
        # the nodes' own rows say what lies under them
        (read,) = pattern.mask(n, is_causal=is_causal)
        leaves = [[token] for token in range(n)] + [row.nonzero().flatten().tolist() for row in read[n:]]
        for leaf in range(n):
            wanted = list(range(leaf + 1 if is_causal else n))
            assert tiles(read, leaf, leaves) == wanted, f"leaf {leaf} of {n}"


@checks.both_ways
@pytest.mark.parametrize("nodes_per_level", [1, 2, 3, 4, 64, 300])
def test_masks_equal_the_rule(nodes_per_level: int, is_causal: bool) -> None:
    pattern = hf_sparse.pattern("bp_transformer", nodes_per_level=nodes_per_level)
    for n in sorted({*checks.lengths(8, longest=257), 11, 31, 32, 33}):
        wanted = system_rules.bp_transformer(n, nodes_per_level=nodes_per_level, is_causal=is_causal)
        checks.check_table(pattern, wanted, n, heads=2 if n < 100 else 1, layer=1, is_causal=is_causal)


def test_a_leaf_reads_a_few_nodes_a_level() -> None:
    read = hf_sparse.pattern("bp_transformer", nodes_per_level=2).mask(256)[0]
    # 8 levels below the root, at most 2 nodes of each to either side, and one more that the level above pays for
    assert int(read[:256].sum(-1).max()) <= 1 + 2 * 2 * 8 + 2


def test_no_path_through_spans_reaches_the_future() -> None:
    for n in (8, 13):
        checks.check_no_leak(hf_sparse.pattern("bp_transformer", nodes_per_level=1), n)


# counted by hand
by_count = pytest.mark.parametrize(
    ("n", "nodes"), [(1, 0), (2, 1), (3, 3), (4, 3), (5, 6), (6, 6), (7, 7), (8, 7), (9, 11), (64, 63), (257, 264)]
)


@by_count
def test_the_rule_has_half_as_many_nodes_on_each_level_up_to_the_root(n: int, nodes: int) -> None:
    assert system_rules.number_of_nodes(n) == nodes


@by_count
def test_there_are_half_as_many_nodes_on_each_level_up_to_the_root(n: int, nodes: int) -> None:
    for nodes_per_level in (1, 4):
        assert hf_sparse.pattern("bp_transformer", nodes_per_level=nodes_per_level).num_nodes(n) == nodes


@pytest.mark.parametrize("n", range(1, 71))
def test_every_level_lies_over_the_whole_text(n: int) -> None:
    leaves = system_rules.leaves_of_nodes(n)
    levels = system_rules.tree_levels(n)
    assert [node for level in levels for node in level] == list(range(len(leaves)))
    assert len(levels) == 1 + (n - 1).bit_length()
    for level in levels:
        assert [leaf for node in level for leaf in leaves[node]] == list(range(n))


def test_fields_and_defaults() -> None:
    checks.check_fields("bp_transformer", {"nodes_per_level": 4, "spans": "nodes", "clip_distance": 0})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("bp_transformer"))
    checks.check_round_trip(hf_sparse.pattern("bp_transformer", nodes_per_level=64))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("bp_transformer", FIELDS)


def test_a_bad_number_of_nodes_is_refused() -> None:
    checks.check_count_field("bp_transformer", "nodes_per_level", least=1)


def test_bad_spans_are_refused() -> None:
    checks.check_bad_values("bp_transformer", "spans", "full", "")
