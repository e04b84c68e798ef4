"""The oracles themselves, on examples small enough to draw; Reformer's also against Transformers' own layer."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from tests.support.content_rules import (
    attend_counts,
    enumerate_choices,
    lsh_buckets,
    reformer_asymmetric,
    reformer_shared,
    routing_balanced,
    routing_mean,
    routing_nearest,
    sinkhorn_attention,
    sinkhorn_hard,
    sinkhorn_log,
    sortcut,
)


def drawn(*rows: str) -> Tensor:
    """Read a mask drawn by hand, one string a query: ``x`` reads, ``.`` does not."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def counted(*rows: str) -> Tensor:
    """Read counts written by hand, one string of digits a query."""
    return torch.tensor([[int(mark) for mark in row] for row in rows])


def floats(*numbers: float | list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def column(*numbers: float) -> Tensor:
    """Return float64 ``[N, 1]``."""
    return floats(*numbers)[:, None]


def at_angles(*polar: tuple[float, float]) -> Tensor:
    """Return float64 ``[N, 2]`` of lengths and degrees."""
    return floats(*[[r * math.cos(math.radians(a)), r * math.sin(math.radians(a))] for r, a in polar])


def random_row(n: int, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    query, key, value = torch.randn(3, n, width, generator=generator, dtype=torch.float64)
    return query, key, value


# sorted: 1 3 | 4 0 | 2 5, since 0, 2 and 5 have a larger bucket than 1, 3 and 4
ONE_ROUND = torch.tensor([[1, 0, 1, 0, 0, 1]])
# and 0 1 | 2 3 | 4 5
TWO_ROUNDS = torch.tensor([[1, 0, 1, 0, 0, 1], [7, 7, 7, 7, 7, 7]])


def test_sorted_tokens_read_their_chunk_and_the_one_before() -> None:
    want = drawn(".x.xx.", "...x..", "x...xx", ".x....", "xx.x..", "x.x.x.").long()
    for counting in ("set", "multiset"):
        got = reformer_shared(ONE_ROUND, 2, is_causal=False, counting=counting, across_rounds=False)
        assert torch.equal(got, want)


def test_sorted_tokens_read_only_the_past_if_causal() -> None:
    want = drawn("......", "......", "x.....", ".x....", "xx.x..", "x.x.x.").long()
    assert torch.equal(reformer_shared(ONE_ROUND, 2, is_causal=True, counting="set", across_rounds=False), want)


def test_a_multiset_counts_every_round() -> None:
    # token 0 reads 1 in the chunk before in the first round and in its own chunk in the second
    want = counted("020110", "100100", "210111", "121000", "111201", "102120")
    got = reformer_shared(TWO_ROUNDS, 2, is_causal=False, counting="multiset", across_rounds=False)
    assert torch.equal(got, want)
    got = reformer_shared(TWO_ROUNDS, 2, is_causal=False, counting="set", across_rounds=False)
    assert torch.equal(got, (want > 0).long())


def test_first_chunks_look_back_into_the_round_before() -> None:
    # 1 and 3 gain 4 and 5, the last chunk of the last round; 0 and 1 gain 2 and 5, the last chunk of the first round
    want = counted("021111", "101112", "210111", "121011", "111201", "102120")
    got = reformer_shared(TWO_ROUNDS, 2, is_causal=False, counting="multiset", across_rounds=True)
    assert torch.equal(got, want)
    got = reformer_shared(TWO_ROUNDS, 2, is_causal=True, counting="multiset", across_rounds=True)
    assert torch.equal(got, want.tril())


def test_one_round_looks_back_to_its_own_end() -> None:
    want = drawn(".x.xx.", "..xx.x", "x...xx", ".xx..x", "xx.x..", "x.x.x.").long()
    assert torch.equal(reformer_shared(ONE_ROUND, 2, is_causal=False, counting="multiset", across_rounds=True), want)
    # both chunks of a round of two: everyone reads everyone once
    got = reformer_shared(torch.tensor([[0, 1, 1, 0]]), 2, is_causal=False, counting="multiset", across_rounds=True)
    assert torch.equal(got, 1 - torch.eye(4, dtype=torch.int64))
    # one chunk in all: there is none before it
    got = reformer_shared(torch.tensor([[0, 1, 1, 0]]), 4, is_causal=False, counting="multiset", across_rounds=True)
    assert torch.equal(got, 1 - torch.eye(4, dtype=torch.int64))
    # two rounds of one chunk: own chunk and the one before, twice
    both = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]])
    got = reformer_shared(both, 4, is_causal=False, counting="multiset", across_rounds=True)
    assert torch.equal(got, 4 * (1 - torch.eye(4, dtype=torch.int64)))


def test_the_last_chunk_may_be_short_and_ties_keep_their_order() -> None:
    want = drawn(".x...", "x....", "xx.x.", "xxx..", "..xx.").long()
    same = torch.zeros(1, 5, dtype=torch.int64)
    got = reformer_shared(same, 2, is_causal=False, counting="set", across_rounds=False)
    assert torch.equal(got, want)


def test_a_count_weighs_like_copies_of_the_key() -> None:
    query, key, value = column(2, 1, 5), column(math.log(2), math.log(3), 7), column(10, 20, 40)
    # scale 1/2: row 0 weighs key 0 with 2, twice, and key 1 with 3, once; row 1 key 1 with sqrt(3), three times
    out, lse = attend_counts(query, key, value, counted("210", "030", "000"), 0.5, self_is_last_resort=False)
    assert_close(out, column((2 * 2 * 10 + 3 * 20) / 7, 20, 0))
    assert_close(lse, floats(math.log(7), math.log(3 * math.sqrt(3)), float("-inf")))


def test_the_last_resort_is_the_token_itself() -> None:
    query, key, value = column(2, 1, 5), column(1, 2, 7), column(10, 20, 40)
    out, lse = attend_counts(query, key, value, counted("010", "000", "000"), 0.5, self_is_last_resort=True)
    assert_close(out, column(20, 20, 40))
    assert_close(lse, floats(2.0, 1.0, 17.5))


@pytest.mark.parametrize("last", [False, True])
def test_attending_can_be_differentiated(last: bool) -> None:
    row = [tensor.requires_grad_() for tensor in random_row(4)]
    options = (counted("0210", "1003", "0000", "1110"), 0.7)
    assert torch.autograd.gradcheck(lambda *qkv: attend_counts(*qkv, *options, self_is_last_resort=last)[0], row)


def test_the_bucket_is_the_largest_of_both_signs() -> None:
    vectors = floats([3, 1], [1, 3], [-3, 1], [1, -3], [0, 0])
    rotations = torch.stack([floats([1, 0], [0, 1]), floats([0, 2], [-1, 0])])
    # turned by the second matrix [a, b] becomes [-b, 2a]
    assert torch.equal(lsh_buckets(vectors, rotations), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 0]]))
    one_column = lsh_buckets(floats([2, 1], [-2, 1]), column(1, 0)[None])
    assert torch.equal(one_column, torch.tensor([[0, 1]]))


QUERIES, KEYS = column(3, 1, 2, 0), column(0, 5, 1, 2)


@pytest.mark.parametrize(
    ("direction", "rows"),
    [
        # queries 3 1 | 2 0, keys 0 2 | 3 1
        ([1, 0, 0], (".x.x", "x.x.", ".x.x", "x.x.")),
        # longest query first: 0 2 | 1 3; all keys project on 0 and keep their order
        ([0, 0, 1], ("xx..", "..xx", "xx..", "..xx")),
        # longest key first: 1 3 | 2 0, and the queries keep their order
        ([0, 1, 0], (".x.x", ".x.x", "x.x.", "x.x.")),
        # 15, 14.8, 15.1 and 14.0: 3 1 | 0 2; with the queries' own largest square alone it would be 0 3 | 2 1, and
        # with the larger of the two largest squares 3 0 | 1 2
        ([1, 0, 2.4], (".x.x", "x.x.", ".x.x", "x.x.")),
        # keys 11.7, 11, 12.5, 12.95: 1 0 | 2 3; with the keys' own largest square alone it would be 1 3 | 2 0
        ([1, 2, 0], ("..xx", "xx..", "..xx", "xx..")),
    ],
)
def test_queries_and_keys_are_sorted_apart(direction: list[float], rows: tuple[str, ...]) -> None:
    directions = floats(direction)
    assert torch.equal(reformer_asymmetric(QUERIES, KEYS, directions, 2, is_causal=False), drawn(*rows))
    assert torch.equal(reformer_asymmetric(QUERIES, KEYS, directions, 2, is_causal=True), drawn(*rows).tril())


def test_rounds_of_clusters_unite() -> None:
    directions = floats([1, 0, 0], [0, 0, 1])
    want = drawn("xx.x", "x.xx", "xx.x", "x.xx")
    assert torch.equal(reformer_asymmetric(QUERIES, KEYS, directions, 2, is_causal=False), want)
    # clusters of three: queries 3 1 2 | 0, keys 0 2 3 | 1
    want = drawn(".x..", "x.xx", "x.xx", "x.xx")
    assert torch.equal(reformer_asymmetric(QUERIES, KEYS, directions[:1], 3, is_causal=False), want)


CENTROIDS = at_angles((1, 0), (1, 90))
# the long vectors would be taken by length; the last token is far from both centroids
ROUTED_QUERIES = at_angles((1, 10), (10, 80), (1, 30), (1, 60), (1, 200))
ROUTED_KEYS = at_angles((20, 85), (1, 5), (1, 40), (1, 50), (1, 250))


def test_each_cluster_takes_its_nearest_queries_and_keys() -> None:
    clusters, table = routing_balanced(ROUTED_QUERIES, ROUTED_KEYS, CENTROIDS, 3, is_causal=False)
    assert clusters == [([0, 2, 3], [1, 2, 3]), ([1, 2, 3], [0, 2, 3])]
    assert torch.equal(table, drawn(".xxx.", "x.xx.", "xxxx.", "xxxx.", "....."))
    clusters, table = routing_balanced(ROUTED_QUERIES, ROUTED_KEYS, 7 * CENTROIDS, 3, is_causal=True)
    assert clusters == [([0, 2, 3], [1, 2, 3]), ([1, 2, 3], [0, 2, 3])]
    assert torch.equal(table, drawn(".....", "x....", "xxx..", "xxxx.", "....."))


def test_equal_cosines_take_the_earlier_token_and_a_wide_window_takes_all() -> None:
    same = at_angles((1, 45), (1, 45), (1, 45), (1, 45))
    clusters, _ = routing_balanced(same, same, CENTROIDS, 2, is_causal=False)
    assert clusters == [([0, 1], [0, 1])] * 2
    clusters, table = routing_balanced(same, same, CENTROIDS, 9, is_causal=True)
    assert clusters == [([0, 1, 2, 3], [0, 1, 2, 3])] * 2
    assert torch.equal(table, torch.ones(4, 4).tril().bool())


def test_clusters_are_averaged_not_merged() -> None:
    value = column(1, 10, 100, 1000, 10000)
    row = (ROUTED_QUERIES, ROUTED_KEYS, value, CENTROIDS, 3, 0.0)
    assert_close(routing_mean(*row, is_causal=False), column(370, 367, 368.5, 368.5, 0))
    # token 2 averages (10 + 100) / 2 and (1 + 100) / 2
    assert_close(routing_mean(*row, is_causal=True), column(0, 1, 52.75, 368.5, 0))


def test_a_cluster_without_a_permitted_key_does_not_count() -> None:
    query = at_angles((1, 200), (1, 45), (1, 46), (1, 200))
    key = at_angles((1, 0), (1, 200), (1, 90), (1, 45))
    clusters, _ = routing_balanced(query, key, CENTROIDS, 2, is_causal=True)
    assert clusters == [([1, 2], [0, 3]), ([1, 2], [2, 3])]
    out = routing_mean(query, key, column(1, 10, 100, 1000), CENTROIDS, 2, 0.0, is_causal=True)
    assert_close(out, column(0, 1, 50.5, 0))


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_wide_cluster_is_dense_attention(is_causal: bool) -> None:
    query, key, value = random_row(6)
    got = routing_mean(query, key, value, query[:1], 6, 0.7, is_causal=is_causal)
    scores = 0.7 * query @ key.T
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool() & torch.tensor(is_causal), float("-inf"))
    assert_close(got, scores.softmax(1) @ value)


def test_the_nearest_centroid_is_nearest_by_direction() -> None:
    # by dot product all but the first query would go to the long centroid at 90 degrees
    centroids = at_angles((1, 0), (10, 90))
    query = at_angles((1, 1), (3, 40), (1, 50), (1, 100), (1, -30))
    key = at_angles((1, 60), (1, -10), (2, 44), (1, 130), (1, 46))
    want = drawn(".xx..", ".xx..", "x..xx", "x..xx", ".xx..")
    assert torch.equal(routing_nearest(query, key, centroids, is_causal=False), want)
    assert torch.equal(routing_nearest(query, key, centroids, is_causal=True), want.tril())
    assert routing_nearest(query, key, at_angles((1, 0), (2, 0)), is_causal=False).all()


def test_one_round_of_balancing_by_hand() -> None:
    scores = floats([1, 2], [3, 4]).log()
    # rows: 1/3 2/3 and 3/7 4/7; then columns
    assert_close(sinkhorn_log(scores, 1, is_causal=False), floats([7 / 16, 7 / 13], [9 / 16, 6 / 13]))
    assert_close(sinkhorn_log(scores, 0, is_causal=False), floats([1, 2], [3, 4]))
    balanced = sinkhorn_log(scores, 40, is_causal=False)
    assert_close(balanced.sum(0), floats(1, 1))
    assert_close(balanced.sum(1), floats(1, 1))
    # balancing keeps the cross ratio 1 * 4 / (2 * 3)
    assert_close(balanced[0, 0] * balanced[1, 1] / (balanced[0, 1] * balanced[1, 0]), floats(2 / 3)[0])
    assert sinkhorn_log(1000 * scores, 5, is_causal=False).isfinite().all()


def test_causal_balancing_is_a_softmax_over_the_past() -> None:
    scores = floats([9, 9, 9], [5, 9, 9], [math.log(1), math.log(3), 9]).requires_grad_()
    mixing = sinkhorn_log(scores, 5, is_causal=True)
    assert_close(mixing.detach(), floats([0, 0, 0], [1, 0, 0], [0.25, 0.75, 0]))
    mixing[2, 0].backward()
    assert_close(scores.grad, floats([0, 0, 0], [0, 0, 0], [0.25 * 0.75, -0.25 * 0.75, 0]))


def test_mixed_slots_of_a_short_last_block() -> None:
    key, value = column(1, 2, 3, 4, 5), column(10, 20, 30, 40, 50)
    # row 1 mixes tokens 0 and 4, and half of token 1: block 2 has no second token and nothing stands in for it;
    # row 2 has two mixed slots although its own block has one token
    mixing = floats([0, 0, 1], [0.5, 0, 0.5], [0, 0.5, 0])
    row = (column(0, 0, 0, 0, 0), key, value, mixing, 2, 1.0)
    out, lse = sinkhorn_attention(*row, is_causal=False)
    assert_close(lse.exp(), floats(3, 3, 4, 4, 3))
    assert_close(out, column(80 / 3, 80 / 3, (30 + 10 + 70) / 4, (30 + 10 + 70) / 4, 85 / 3))
    out, lse = sinkhorn_attention(*row, is_causal=True)
    assert_close(lse.exp(), floats(2, 3, 3, 4, 3))
    assert_close(out, column(30, 80 / 3, 70 / 3, 110 / 4, 85 / 3))


def test_mixed_keys_are_scored_like_keys() -> None:
    # block 1 reads 0.25 * 4 + 0.75 * 8 = 7 and its own keys 8 and 1, all halved
    key, value = column(4, 8, 1), column(100, 200, 300)
    mixing = floats([0, 0, 0], [0.25, 0.75, 0], [0, 0, 0])
    out, lse = sinkhorn_attention(column(1, 1, 1), key, value, mixing, 1, 0.5, is_causal=True)
    weights = floats(3.5, 4.0).exp()
    assert_close(lse, floats(2.0, weights.sum().log().item(), 0.5))
    assert_close(out, column(100, (weights @ floats(175, 200) / weights.sum()).item(), 300))


def test_mixing_by_a_permutation_is_hard_assignment() -> None:
    query, key, value = random_row(6)
    mixing = floats([0, 1, 0], [0, 0, 1], [1, 0, 0])
    got = sinkhorn_attention(query, key, value, mixing, 2, 0.7, is_causal=False)
    table = sinkhorn_hard([[1], [2], [0]], 6, 2, is_causal=False)
    assert_close(got, attend_counts(query, key, value, table, 0.7, self_is_last_resort=False))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_mixing_can_be_differentiated(is_causal: bool) -> None:
    query, key, value = random_row(5)

    def attended(scores: Tensor) -> Tensor:
        mixing = sinkhorn_log(scores, 3, is_causal=is_causal)
        return sinkhorn_attention(query, key, value, mixing, 2, 0.7, is_causal=is_causal)[0]

    assert torch.autograd.gradcheck(attended, random_row(3)[0].requires_grad_())


def test_assigned_blocks_are_read_whole() -> None:
    want = drawn("xx..x", "xx..x", "xxxx.", "xxxx.", "xxxxx")
    got = sinkhorn_hard([[2, 2], [0], [1, 0]], 5, 2, is_causal=False)
    assert torch.equal(got, want)
    assert torch.equal(sinkhorn_hard([[2, 2], [0], [1, 0]], 5, 2, is_causal=True), want.tril())
    got = sinkhorn_hard([[], [1], []], 5, 2, is_causal=False)
    assert torch.equal(got, drawn("xx...", "xx...", "..xx.", "..xx.", "....x"))


def test_sortcut_reads_the_first_blocks_of_the_order() -> None:
    assert torch.equal(sortcut([2, 0, 1], 5, 2, 1), drawn(*["....x"] * 5))
    assert torch.equal(sortcut([2, 0, 1], 5, 2, 2), drawn(*["xx..x"] * 5))
    assert sortcut([2, 0, 1], 5, 2, 3).all()


def test_one_pick_has_the_gradient_of_a_softmax() -> None:
    logits = floats(1, 2, 5).log().requires_grad_()
    expected = enumerate_choices(lambda picks: logits, lambda picks: [8.0, 16.0, 32.0][picks[0]], 1)
    assert_close(expected.detach(), floats(25)[0])
    expected.backward()
    # p * (reward - expected reward)
    assert_close(logits.grad, floats(-17 / 8, -9 * 2 / 8, 7 * 5 / 8))


def test_independent_picks_multiply() -> None:
    logits = floats([1, 3], [1, 1]).log()
    chances = {(0, 0): 1 / 8, (0, 1): 1 / 8, (1, 0): 3 / 8, (1, 1): 3 / 8}
    for picks, chance in chances.items():
        hit = enumerate_choices(lambda before: logits[len(before)], lambda seen, want=picks: float(seen == want), 2)
        assert_close(hit, floats(chance)[0])


def test_later_picks_depend_on_earlier_ones_and_some_are_forbidden() -> None:
    def logits_of(picks: tuple[int, ...]) -> Tensor:
        return floats(0, math.log(3), float("-inf")) if not picks else floats(*[[0, -30], [1, 1]][picks[0]])

    def reward_of(picks: tuple[int, ...]) -> float:
        return {(0, 0): 100.0, (0, 1): 0.0, (1, 0): 8.0, (1, 1): 16.0}[picks]

    assert_close(enumerate_choices(logits_of, reward_of, 2), floats(0.25 * 100 + 0.75 * 12)[0], rtol=1e-9, atol=0)
    logits = floats(0, 1, float("-inf")).requires_grad_()
    enumerate_choices(lambda picks: logits, lambda picks: float(picks[0]), 1).backward()
    slope = (1 / (1 + math.exp(-1))) * (1 / (1 + math.exp(1)))
    assert_close(logits.grad, floats(-slope, slope, 0))


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_shared_buckets_agree_with_transformers(is_decoder: bool, num_hashes: int) -> None:
    batch, n, heads, width, chunk, num_buckets = 2, 24, 2, 8, 4, 6
    config = ReformerConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        attention_head_size=width,
        lsh_attn_chunk_length=chunk,
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        is_decoder=is_decoder,
    )
    generator = torch.Generator().manual_seed(num_hashes)
    layer = LSHSelfAttention(config).double().eval()
    with torch.no_grad():
        for weight in (layer.query_key.weight, layer.value.weight):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 2)
    hidden = torch.randn(batch, n, heads * width, generator=generator, dtype=torch.float64)
    buckets = torch.randint(num_buckets, (batch, heads, num_hashes, n), generator=generator)
    offsets = num_buckets * torch.arange(num_hashes)[:, None]
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    theirs = layer(inputs[0], buckets=(buckets + offsets).flatten(2)).hidden_states
    theirs = theirs.unflatten(2, (heads, width)).transpose(1, 2)
    query, value = (
        project(inputs[1]).unflatten(2, (heads, width)).transpose(1, 2) for project in (layer.query_key, layer.value)
    )
    rule = {"is_causal": is_decoder, "counting": "multiset", "across_rounds": True}
    counts = torch.stack([reformer_shared(numbers, chunk, **rule) for numbers in buckets.flatten(0, 1)])

    def attended(key: Tensor) -> Tensor:
        rows = zip(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), counts, strict=True)
        outputs = [attend_counts(*row, 1.0, self_is_last_resort=True)[0] for row in rows]
        return torch.stack(outputs).view_as(theirs)

    # the test would pass for "set" as well if no pair met twice
    assert (counts > 1).any() or num_hashes == 1
    has_another = (counts.sum(2) > 0).view(batch, heads, n)
    assert has_another.any()
    unit = query / query.norm(dim=-1, keepdim=True)
    assert (attended(unit) - theirs)[has_another].abs().max() < 1e-5
    # all that is left is the 1e-6 that they add to the mean square of a key. A token alone gives its own value there
    # too, since float64 keeps more than a penalty of -1e5
    ours = attended(query / (query.square().sum(-1, keepdim=True) + width * 1e-6).sqrt())
    assert (ours - theirs).abs().max() < 1e-10
    pull = torch.randn(theirs.shape, generator=generator, dtype=torch.float64) * has_another[..., None]
    (theirs * pull).sum().backward()
    (ours * pull).sum().backward()
    assert (inputs[0].grad - inputs[1].grad).abs().max() < 1e-10
