"""Routing Transformer: who is in which cluster, one softmax or the mean of several, and bad fields."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns.routing import Centroids
from hf_sparse.slots import largest
from tests.patterns.content_checks import HEADS, SCALE, WIDTH, check_against
from tests.support import content_rules

LENGTHS = (1, 2, 9, 37)
both_ways = pytest.mark.parametrize("is_causal", [False, True])


def routing(**fields: Any) -> hf_sparse.Pattern:
    return hf_sparse.pattern("routing", **fields)


def state_of(clusters: int) -> Centroids:
    """Return random centroids, in float64."""
    state = Centroids(HEADS, clusters, WIDTH, seed=3).double()
    drawn = torch.randn(state.weight.shape, generator=torch.Generator().manual_seed(clusters), dtype=torch.float64)
    state.weight.copy_(torch.nn.functional.normalize(drawn, dim=-1))
    return state


@both_ways
@pytest.mark.parametrize(("clusters", "window"), [(5, None), (5, 4), (70, 3), (1, 50)])
@pytest.mark.parametrize("n", LENGTHS)
def test_balanced_clusters_equal_the_definition(n: int, clusters: int, window: int | None, is_causal: bool) -> None:
    state, size = state_of(clusters), window or -(-n // clusters)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        held = query.detach(), key.detach(), state.weight[head], size
        _, table = content_rules.routing_balanced(*held, is_causal=is_causal)
        return content_rules.attend_counts(query, key, value, table, SCALE, self_is_last_resort=False)

    check_against(routing(num_clusters=clusters, window=window), oracle, n, is_causal=is_causal, state=state)


@both_ways
@pytest.mark.parametrize("n", LENGTHS)
def test_means_of_clusters_equal_the_definition(n: int, is_causal: bool) -> None:
    state = state_of(4)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        held = query, key, value, state.weight[head], -(-n // 2), SCALE
        return content_rules.routing_mean(*held, is_causal=is_causal), value.new_zeros(n)

    pattern = routing(num_clusters=4, window=-(-n // 2), merge="mean")
    check_against(pattern, oracle, n, has_lse=False, is_causal=is_causal, state=state)


@pytest.mark.parametrize(("n", "count"), [(640, 10), (647, 10), (655, 3), (700, 1), (63, 1), (80, 20), (5, 5)])
def test_the_largest_are_found_group_by_group(n: int, count: int) -> None:
    drawn = torch.Generator().manual_seed(n)
    scores = torch.randn(2, 3, n, generator=drawn)
    # the largest of all stands last, behind the whole groups
    scores[0, 0, -1], scores[1, 2, : n // 2] = 100.0, float("-inf")
    wanted = scores.argsort(-1, descending=True)[..., :count].sort(-1).values
    assert torch.equal(largest(scores, count), wanted)


@both_ways
@pytest.mark.parametrize(("n", "clusters"), [(1, 3), (2, 40), (9, 3), (37, 1), (37, 3), (37, 40), (100, 3)])
def test_nearest_clusters_equal_the_definition(n: int, clusters: int, is_causal: bool) -> None:
    state = state_of(clusters)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        table = content_rules.routing_nearest(query.detach(), key.detach(), state.weight[head], is_causal=is_causal)
        return content_rules.attend_counts(query, key, value, table, SCALE, self_is_last_resort=False)

    pattern = routing(num_clusters=clusters, assignment="nearest")
    check_against(pattern, oracle, n, is_causal=is_causal, state=state)


def test_centroids_start_as_unit_vectors_of_the_seed() -> None:
    one, same, other = Centroids(2, 3, 4, seed=1), Centroids(2, 3, 4, seed=1), Centroids(2, 3, 4, seed=9)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight[0], one.weight[1])
    assert torch.allclose(one.weight.norm(dim=-1), torch.ones(2, 3))


def test_a_centroid_that_nothing_comes_near_to_stays() -> None:
    state = Centroids(1, 2, 2, decay=0.5)
    state.weight.copy_(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]))
    state.sums.copy_(state.weight)
    vectors = torch.tensor([[[[3.0, 4.0]]]])
    for _ in range(60):
        state.follow(vectors, vectors)
        state.settle()
        state.move()
    assert torch.allclose(state.weight[0, 0], torch.tensor([0.6, 0.8]), atol=1e-5)
    assert torch.allclose(state.weight[0, 1], torch.tensor([-1.0, 0.0]))


def test_without_a_state_centroids_are_drawn_from_the_seed() -> None:
    tensors = [torch.randn(1, HEADS, 20, WIDTH, dtype=torch.float64) for _ in range(3)]
    pattern = routing(num_clusters=3, seed=2)
    state = pattern.make_state(hidden_size=8, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    assert state is not None
    without = hf_sparse.sparse_attention(*tensors, pattern)
    assert torch.equal(hf_sparse.sparse_attention(*tensors, pattern, state=state.double()), without)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"num_clusters": 0}, ValueError, "num_clusters must be at least 1"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"decay": 1.0}, ValueError, "decay must be at least 0 and below 1"),
        ({"decay": "slow"}, TypeError, "decay must be a number"),
        ({"assignment": "random"}, ValueError, "assignment must be one of balanced, nearest"),
        ({"merge": "sum"}, ValueError, "merge must be one of lse, mean"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        routing(**fields)


def test_another_state_is_refused() -> None:
    tensors = [torch.randn(1, HEADS, 20, WIDTH) for _ in range(3)]
    with pytest.raises(TypeError, match="needs the state that make_state makes, got Linear"):
        hf_sparse.sparse_attention(*tensors, routing(), state=torch.nn.Linear(2, 2))
