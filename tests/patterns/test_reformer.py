"""Reformer: buckets, chunks and rounds, in the paper's form and for queries and keys of a dense checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

import hf_sparse
from hf_sparse.patterns.reformer import Reformer, asymmetric
from tests.patterns.content_checks import HEADS, SCALE, WIDTH, check_against, content_of
from tests.support import content_rules
from tests.support.softmax import random_tensors

LENGTHS = (1, 2, 7, 8, 9, 37)
both_ways = pytest.mark.parametrize("is_causal", [False, True])


def reformer(**fields: Any) -> Reformer:
    made = hf_sparse.pattern("reformer", **{"chunk_length": 8, **fields})
    assert isinstance(made, Reformer)
    return made


def rotations(pattern: Reformer, head: int, size: int) -> Tensor:
    """Return what a head's vectors are turned by, float64 ``[rounds, D, size / 2]``."""
    like = torch.zeros((), dtype=torch.float64)
    drawn = content_of(9).draw((pattern.num_hashes, size // 2, WIDTH), pattern.seed, like)
    return drawn[head].transpose(1, 2)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


@both_ways
@pytest.mark.parametrize("counting", ["set", "multiset"])
@pytest.mark.parametrize("n", LENGTHS)
def test_shared_keys_equal_the_definition(n: int, counting: str, is_causal: bool) -> None:
    pattern = reformer(num_hashes=3, num_buckets=6, shared_query_key=True, counting=counting)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        buckets = content_rules.lsh_buckets(query.detach(), rotations(pattern, head, 6))
        counts = content_rules.reformer_shared(buckets, 8, is_causal=is_causal, counting=counting, across_rounds=False)
        return content_rules.attend_counts(query, unit(query), value, counts, 1.0, self_is_last_resort=True)

    check_against(pattern, oracle, n, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("num_hashes", [1, 3])
@pytest.mark.parametrize("n", LENGTHS)
def test_keys_of_their_own_equal_the_definition(n: int, num_hashes: int, is_causal: bool) -> None:
    pattern = reformer(num_hashes=num_hashes, seed=4)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        drawn = content_of(n).draw((num_hashes, WIDTH + 2), 4, query)[head]
        # the order of the two coordinates that are added is a matter of the draw
        table = content_rules.reformer_asymmetric(query.detach(), key.detach(), drawn, 8, is_causal=is_causal)
        return content_rules.attend_counts(query, key, value, table, SCALE, self_is_last_resort=False)

    check_against(pattern, oracle, n, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("shared", [False, True])
def test_without_chunks_a_token_reads_its_bucket(shared: bool, is_causal: bool) -> None:
    pattern = reformer(num_hashes=2, num_buckets=4, prefix_stable=True, shared_query_key=shared)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        key = unit(query) if shared else key
        q, k = (content_rules.lsh_buckets(x.detach(), rotations(pattern, head, 4)) for x in (query, key))
        table = (q[:, :, None] == k[:, None, :]).any(0)
        if is_causal:
            table &= torch.ones_like(table).tril()
        if shared:
            table &= ~torch.eye(len(table), dtype=torch.bool)
        scale = 1.0 if shared else SCALE
        return content_rules.attend_counts(query, key, value, table, scale, self_is_last_resort=shared)

    for n in (1, 9, 70):
        check_against(pattern, oracle, n, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_with_its_buckets_it_equals_the_in_tree_layer(
    num_hashes: int, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, n, chunk, num_buckets = 2, 32, 8, 4
    config = ReformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH,
        lsh_attn_chunk_length=chunk,
        num_buckets=num_buckets,
        num_hashes=num_hashes,
        is_decoder=is_causal,
        lsh_attention_probs_dropout_prob=0.0,
        attn_layers=["lsh"],
    )
    torch.manual_seed(0)
    layer = LSHSelfAttention(config).double().eval()
    with torch.no_grad():
        for weight in (layer.query_key.weight, layer.value.weight):
            weight.copy_(torch.randn(weight.shape, dtype=torch.float64) / 2)
    hidden = torch.randn(batch, n, HEADS * WIDTH, dtype=torch.float64)
    buckets = torch.randint(num_buckets, (batch, HEADS, num_hashes, n))
    offsets = num_buckets * torch.arange(num_hashes)[:, None]
    theirs_in, ours_in = (hidden.clone().requires_grad_() for _ in range(2))
    theirs = layer(theirs_in, buckets=(buckets + offsets).flatten(2)).hidden_states
    monkeypatch.setattr(Reformer, "buckets", lambda self, vectors, content: buckets.flatten(0, 1))
    pattern = reformer(
        chunk_length=chunk,
        num_hashes=num_hashes,
        num_buckets=num_buckets,
        shared_query_key=True,
        counting="multiset",
        look_back_across_rounds=True,
    )

    def attended() -> Tensor:
        query, value = (
            project(ours_in).unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for project in (layer.query_key, layer.value)
        )
        out: Any = hf_sparse.sparse_attention(query, query, value, pattern, is_causal=is_causal)
        return out.transpose(1, 2).flatten(2)

    rule = {"is_causal": is_causal, "counting": "multiset", "across_rounds": True}
    counts = torch.stack([content_rules.reformer_shared(held, chunk, **rule) for held in buckets.flatten(0, 1)])
    if num_hashes > 1:
        # sets and multisets differ here
        assert (counts > 1).any()
    has_another = (counts.sum(2) > 0).view(batch, HEADS, n).transpose(1, 2)
    has_another = has_another[..., None].expand(-1, -1, -1, WIDTH).flatten(2)
    assert (attended() - theirs)[has_another].abs().max() < 1e-5
    # what is left is the 1e-6 that they add to the mean square of a key
    monkeypatch.setattr(
        Reformer,
        "prepare",
        lambda self, q, k, s: (q, q / (q.square().sum(-1, keepdim=True) + WIDTH * 1e-6).sqrt(), 1.0),
    )
    ours = attended()
    assert (ours - theirs)[has_another].abs().max() < 1e-10
    pull = torch.randn(theirs.shape, dtype=torch.float64) * has_another
    (theirs * pull).sum().backward()
    (ours * pull).sum().backward()
    assert theirs_in.grad is not None
    assert ours_in.grad is not None
    assert (theirs_in.grad - ours_in.grad).abs().max() < 1e-10


def test_asymmetric_vectors_have_one_length_and_keep_their_products() -> None:
    query, key, _ = random_tensors(batch=2, heads=HEADS, tokens=9, width=WIDTH)
    # along the coordinates themselves the projections are the vectors
    q, k = (
        said.transpose(2, 3)
        for said in asymmetric(
            query, key, torch.eye(query.shape[3] + 2, dtype=query.dtype).expand(query.shape[1], -1, -1)
        )
    )
    lengths = torch.cat([q.norm(dim=-1), k.norm(dim=-1)], -1)
    assert torch.allclose(lengths, lengths[..., :1].expand_as(lengths))
    assert torch.allclose(q @ k.transpose(-1, -2), query @ key.transpose(-1, -2))


def test_many_buckets_are_told_apart_by_two_hashes() -> None:
    pattern = reformer(num_buckets=1000, num_hashes=2, shared_query_key=True)
    vectors = torch.randn(1, HEADS, 600, WIDTH, dtype=torch.float64)
    found = pattern.buckets(vectors, content_of(600))
    assert found.shape == (HEADS, 2, 600)
    assert int(found.min()) >= 0
    assert int(found.max()) < 32 * 32
    # two even numbers whose product is at least a thousand: each bucket is a pair of their buckets
    pairs = [content_rules.lsh_buckets(vectors[0, 0], half) for half in _halves(pattern)]
    assert torch.equal(found[0], pairs[0] * 32 + pairs[1])


def _halves(pattern: Reformer) -> list[Tensor]:
    like = torch.zeros((), dtype=torch.float64)
    drawn = content_of(600).draw((2, 32, WIDTH), pattern.seed, like)[0]
    return [drawn[:, :16].transpose(1, 2), drawn[:, 16:].transpose(1, 2)]


def test_near_vectors_share_buckets_more_often_than_far_ones() -> None:
    pattern = reformer(num_buckets=16, num_hashes=8, shared_query_key=True)
    torch.manual_seed(0)
    vectors = torch.randn(1, HEADS, 300, WIDTH, dtype=torch.float64)
    near = pattern.buckets(vectors, content_of(300)) == pattern.buckets(
        vectors + 0.1 * torch.randn_like(vectors), content_of(300)
    )
    far = pattern.buckets(vectors, content_of(300)) == pattern.buckets(vectors.flip(2), content_of(300))
    assert near.double().mean() > 0.5 > 3 * far.double().mean()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hashes": 0}, "num_hashes must be at least 1"),
        ({"num_buckets": 5}, "num_buckets must be even"),
        ({"counting": "bag"}, "counting must be one of set, multiset"),
        ({"look_back_across_rounds": True}, "needs counting='multiset' and shared_query_key=true"),
        ({"prefix_stable": True}, "prefix_stable needs num_buckets"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reformer(**fields)


def test_shared_keys_cannot_be_opened_wide() -> None:
    with pytest.raises(ValueError, match="reads queries as keys, which no dense model does"):
        reformer(shared_query_key=True).wide_open(8)
