"""Random blocks: every block of queries reads a few blocks drawn at random, the same everywhere and stable under growth."""

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.parts import Scope
from hf_sparse.patterns.random_blocks import draw_blocks
from tests.pattern_cases import Setting, random_table
from tests.patterns import checks
from tests.support import rules

PINNED = [
    {6, 7, 8},
    {5, 7, 9},
    {6, 7, 8},
    {12, 13, 14},
    {0, 2, 13},
    {5, 9, 10},
    {4, 6, 11},
    {1, 5, 9},
    {1, 11, 15},
    {5, 9, 10},
    {1, 3, 5},
    {0, 11, 13},
    {4, 14, 15},
    {0, 2, 13},
    {6, 10, 14},
    {8, 9, 10},
]
PINNED_CAUSAL: list[set[int]] = [
    set(),
    {0},
    {0, 1},
    {0, 1, 2},
    {1, 2, 3},
    {0, 1, 2},
    {3, 4, 5},
    {1, 5, 6},
    {2, 3, 4},
    {5, 6, 7},
    {2, 7, 9},
    {1, 3, 8},
    {4, 9, 11},
    {2, 3, 7},
    {3, 7, 8},
    {1, 9, 14},
]


def table_of(
    blocks: int, *, count: int = 3, heads: int = 1, is_causal: bool = False, layer: int = 0, seed: int = 0
) -> list[list[set[int]]]:
    """Return the blocks drawn for each head and row, at one token a block."""
    pattern = hf_sparse.pattern("random", block_size=1, num_random_blocks=count, seed=seed)
    return random_table(pattern, Setting(blocks, layer, is_causal), heads=heads)


def test_all_blocks_there_are_drawn_by_hand() -> None:
    # as many as there are: nothing is left to chance
    pattern = hf_sparse.pattern("random", block_size=2, num_random_blocks=3)
    checks.check_drawn_by_hand(pattern, *["xxxxx"] * 5)
    checks.check_drawn_by_hand(pattern, ".....", ".....", "xx...", "xx...", "xxxx.", is_causal=True)


def test_none_drawn_by_hand() -> None:
    checks.check_drawn_by_hand(hf_sparse.pattern("random", block_size=2, num_random_blocks=0), "...", "...", "...")


@checks.both_ways
@pytest.mark.parametrize(("block", "count"), [(1, 3), (4, 0), (4, 1), (8, 2), (64, 3), (100, 1)])
def test_masks_equal_the_rule_for_the_drawn_table(block: int, count: int, is_causal: bool) -> None:
    for n in checks.lengths(8):
        pattern = hf_sparse.pattern("random", block_size=block, num_random_blocks=count, seed=4)
        table = random_table(pattern, Setting(n, 2, is_causal), heads=2)
        checks.check_mask(pattern, rules.random_blocks(block, table), n, heads=2, layer=2, is_causal=is_causal)


@checks.both_ways
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 7, 65])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_get_as_many_distinct_blocks_as_asked_or_as_there_are(blocks: int, count: int, is_causal: bool) -> None:
    for head in table_of(blocks, count=count, heads=3, is_causal=is_causal):
        for row, drawn in enumerate(head):
            candidates = set(range(row if is_causal else blocks))
            assert drawn <= candidates
            assert len(drawn) == min(count, len(candidates))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_longer_sequence_replaces_blocks_only_by_new_ones(count: int) -> None:
    for old in (1, 2, 3, 6, 17, 64):
        shorter = table_of(old, count=count, heads=4)
        for new in (old + 1, 2 * old + 1, 200):
            longer = table_of(new, count=count, heads=4)
            for head, other in zip(shorter, longer, strict=True):
                for drawn, grown in zip(head, other[:old], strict=True):
                    assert {block for block in grown if block < old} <= drawn


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_longer_causal_sequence_replaces_nothing(count: int) -> None:
    longest = table_of(200, count=count, heads=4, is_causal=True)
    for blocks in (1, 2, 3, 6, 17, 64):
        table = table_of(blocks, count=count, heads=4, is_causal=True)
        assert table == [head[:blocks] for head in longest]


def counts_over_heads(choices: int, count: int, heads: int) -> Tensor:
    """Return how often each number below ``choices`` was drawn: int64 ``[choices]``."""
    drawn = draw_blocks(torch.tensor([choices]), count, seed=1, scope=Scope(1, heads))
    return torch.bincount(drawn.flatten(), minlength=choices)


@pytest.mark.parametrize(("choices", "count"), [(2, 1), (7, 1), (60, 3), (64, 3), (400, 2)])
def test_each_block_is_drawn_as_often_as_any_other(choices: int, count: int) -> None:
    heads = 5000
    drawn = counts_over_heads(choices, count, heads)
    assert drawn.min() > 0
    # slot s draws evenly from the numbers that are s modulo the count: a chi-square test for each slot
    for slot in range(count):
        own = drawn[slot::count].double()
        assert own.sum() == heads
        expected = heads / len(own)
        statistic = float(((own - expected) ** 2 / expected).sum())
        freedom = len(own) - 1
        # the statistic has mean f and variance 2 f; five standard deviations, and 5 for the skew at small f
        assert statistic <= freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_slots_rows_and_heads_draw_independently() -> None:
    heads, choices = 5000, 40
    drawn = draw_blocks(torch.full((3,), choices), 2, seed=0, scope=Scope(3, heads)) // 2
    pairs = {
        "slots": (drawn[:, 0, 0], drawn[:, 0, 1]),
        "rows": (drawn[:, 0, 0], drawn[:, 1, 0]),
        "heads": (drawn[:-1, 2, 1], drawn[1:, 2, 1]),
    }
    for name, (one, two) in pairs.items():
        agreed, chance = float((one == two).sum()), 1 / (choices // 2)
        assert abs(agreed - len(one) * chance) <= 5 * (len(one) * chance * (1 - chance)) ** 0.5, name


def test_the_draw_is_the_one_that_saved_checkpoints_were_trained_with() -> None:
    # written down at version 0.1.0: a change would silently change every saved model that draws blocks
    assert table_of(16, heads=2, layer=1, seed=7)[1] == PINNED
    assert table_of(16, is_causal=True)[0] == PINNED_CAUSAL


def test_fields_and_defaults() -> None:
    checks.check_fields("random", {"block_size": 64, "num_random_blocks": 3, "seed": 0})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("random", block_size=3, num_random_blocks=1, seed=2**40))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("random", "block_size, num_random_blocks, seed")


@pytest.mark.parametrize(("field", "least"), [("block_size", 1), ("num_random_blocks", 0), ("seed", 0)])
def test_bad_values_are_refused(field: str, least: int) -> None:
    checks.check_count_field("random", field, least=least)


@pytest.mark.parametrize("seed", [2**31, 2**62, 2**63 - 1])
def test_large_seeds_draw(seed: int) -> None:
    assert table_of(30, seed=seed) != table_of(30, seed=seed - 1)


def test_a_block_larger_than_the_model_is_refused() -> None:
    checks.check_fits_model(hf_sparse.pattern("random", block_size=16), 16)


def test_layers_differ() -> None:
    assert hf_sparse.pattern("random").varies_by_layer
    assert table_of(64, layer=0) != table_of(64, layer=1)
