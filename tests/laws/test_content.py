"""The laws for content-based patterns: backends agree, padding and packing change nothing, nothing comes from ahead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns.edge_predictor import EdgePredictor
from tests.pattern_cases import HEADS
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.softmax import random_tensors

WIDTH = 8
_make = hf_sparse.pattern
BAND = _make("band", radius=2)
PATTERNS = {
    "reformer": _make("reformer", chunk_length=8, num_hashes=3),
    "reformer_one_chunk": _make("reformer", chunk_length=64, num_hashes=2),
    "reformer_shared": _make("reformer", chunk_length=8, num_hashes=3, num_buckets=6, shared_query_key=True),
    "reformer_multiset": _make("reformer", chunk_length=8, num_hashes=2, shared_query_key=True, counting="multiset"),
    "reformer_stable": _make("reformer", num_hashes=2, num_buckets=4, prefix_stable=True),
    "routing": _make("routing", num_clusters=5),
    "routing_many": _make("routing", num_clusters=70, window=3),
    "routing_nearest": _make("routing", num_clusters=5, assignment="nearest"),
    "sinkhorn": _make("sinkhorn", block_size=8),
    "sinkhorn_hard": _make("sinkhorn", block_size=8, hard=True),
    "sinkhorn_sortcut": _make("sinkhorn", block_size=8, sortcut=2),
    "sinkhorn_sortcut_hard": _make("sinkhorn", block_size=8, sortcut=3, hard=True),
    "sac": _make("sac", block_size=8, edges_per_token=16, radius=3),
    "sac_token": _make("sac", granularity="token", edges_per_token=4, radius=0),
}
UNITED = {
    "with_band": lambda pattern: pattern | BAND,
    "with_global_and_random": lambda pattern: (
        _make("random", block_size=4, num_random_blocks=1) | pattern | _make("global", positions=(3,))
    ),
}
MEAN = _make("routing", num_clusters=5, merge="mean")
# of these a prefix gives what it gives alone
STABLE = ("reformer_stable", "routing_nearest", "sinkhorn", "sinkhorn_hard", "sac", "sac_token")
all_patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
CAUSAL = {name: pattern for name, pattern in PATTERNS.items() if "sortcut" not in name}
causal_patterns = pytest.mark.parametrize("pattern", CAUSAL.values(), ids=CAUSAL)


def attention(pattern: hf_sparse.Pattern, **settings: Any) -> Callable[..., Any]:
    """Return the library's attention; a predictor is given, in the place of hidden states, what each token asks."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        held = settings
        if '"sac"' in pattern.json:
            state = EdgePredictor(WIDTH * HEADS, HEADS, 8)
            held = {"state": state, "hidden_states": query.transpose(1, 2).flatten(2), **settings}
        return hf_sparse.sparse_attention(query, key, value, pattern, **held)

    return attend


def both_backends(pattern: hf_sparse.Pattern, tensors: Any, **settings: Any) -> list[list[Tensor]]:
    """Return outputs, logsumexps and gradients of both backends, under the same seed."""
    found = []
    for backend in ("gather", "dense"):
        attend = attention(pattern, backend=backend, return_lse=True, **settings)

        def seeded(*args: Tensor, attend: Any = attend) -> Any:
            torch.manual_seed(11)
            return attend(*args)

        found.append(with_gradients(seeded, tensors))
    return found


def check_agreement(
    pattern: hf_sparse.Pattern, *, n: int, batch: int = 1, key_heads: int = HEADS, **settings: Any
) -> None:
    tensors = random_tensors(batch=batch, tokens=n, key_heads=key_heads, width=WIDTH)
    for one, other in zip(*both_backends(pattern, tensors, **settings), strict=True):
        assert_same_maths(one, other, terms=n + WIDTH)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 37])
@all_patterns
def test_backends_agree(pattern: hf_sparse.Pattern, n: int) -> None:
    check_agreement(pattern, n=n)


@pytest.mark.parametrize("n", [1, 9, 37])
@causal_patterns
def test_causal_backends_agree(pattern: hf_sparse.Pattern, n: int) -> None:
    check_agreement(pattern, n=n, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("unite", UNITED.values(), ids=UNITED)
@causal_patterns
def test_in_a_union_a_pair_counts_once(pattern: hf_sparse.Pattern, unite: Any, is_causal: bool) -> None:
    n, united = 37, unite(pattern)
    check_agreement(united, n=n, is_causal=is_causal)
    tensors = random_tensors(tokens=n, width=WIDTH)
    # also where a gradient is asked for
    learning = attention(united, is_causal=is_causal)(*(t.clone().requires_grad_() for t in tensors))
    assert_same_maths(learning.detach(), attention(united, is_causal=is_causal)(*tensors), terms=n + WIDTH)
    if pattern.key != "sinkhorn" and getattr(pattern, "counting", "set") == "set":
        # with all values alike but one key's, an output says how much of that key was read: here against one softmax by hand
        query, key, _ = random_tensors(tokens=n, width=WIDTH)
        identity = torch.eye(n, dtype=torch.float64).expand(1, HEADS, -1, -1)
        weights = attention(united, is_causal=is_causal)(query, key, identity)
        if getattr(pattern, "shared_query_key", False):
            scores = query @ torch.nn.functional.normalize(query, dim=-1).transpose(-1, -2)
        else:
            scores = query @ key.transpose(-1, -2) * WIDTH**-0.5
        # a row that reads nothing has no softmax
        wanted = scores.masked_fill(weights == 0, float("-inf")).softmax(-1).nan_to_num()
        assert_same_maths(weights, wanted, terms=n + WIDTH)


@pytest.mark.parametrize("key_heads", [1, 2])
@all_patterns
def test_grouped_queries_agree(pattern: hf_sparse.Pattern, key_heads: int) -> None:
    check_agreement(pattern, n=21, key_heads=key_heads)
    tensors = random_tensors(tokens=21, key_heads=key_heads, width=WIDTH)
    query, key, value = tensors
    repeated = (query, *(t.repeat_interleave(HEADS // key_heads, 1) for t in (key, value)))
    assert_same_maths(attention(pattern)(*tensors), attention(pattern)(*repeated), terms=21 + WIDTH)


@all_patterns
def test_dropout_is_drawn_alike_and_keeps_the_mean(pattern: hf_sparse.Pattern) -> None:
    n = 37
    if "sinkhorn" not in pattern.key:
        check_agreement(pattern | BAND, n=n, dropout=0.3)
    query, key, _ = random_tensors(tokens=n, width=WIDTH)
    ones = torch.ones(1, HEADS, n, 1, dtype=torch.float64)
    torch.manual_seed(0)
    outs = torch.stack([attention(pattern, dropout=0.3)(query, key, ones) for _ in range(200)])
    whole = attention(pattern)(query, key, ones)
    reads = whole > 0
    assert (outs[:, ~reads] == 0).all()
    # means of 200 * 148 outputs; mixed values need not be 1
    assert outs[:, reads].mean().item() == pytest.approx(whole[reads].mean().item(), rel=0.02)
    assert (outs[:, reads] - whole[reads]).std() > 0.05


@pytest.mark.parametrize("is_united", [False, True], ids=["alone", "united"])
@all_patterns
def test_rows_of_a_padded_batch_equal_rows_alone(pattern: hf_sparse.Pattern, is_united: bool) -> None:
    pattern = pattern | BAND if is_united else pattern
    n, stretches = 30, [(0, 30), (0, 17), (9, 30), (5, 6)]
    tensors = random_tensors(batch=5, tokens=n, width=WIDTH)
    is_real = torch.zeros(5, n, dtype=torch.bool)
    for row, (start, stop) in enumerate(stretches):
        is_real[row, start:stop] = True
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out, lse = attention(pattern, key_padding_mask=is_real, return_lse=True)(*leaves)
    for row, (start, stop) in enumerate(stretches):
        alone, _ = attention(pattern, return_lse=True)(*(t[row : row + 1, :, start:stop] for t in tensors))
        assert_same_maths(out[row : row + 1, :, start:stop], alone, terms=n + WIDTH)
        apart = ~is_real[row]
        assert not out[row, :, apart].any()
        assert (lse[row, :, apart] == float("-inf")).all()
        grads = torch.autograd.grad(out[row].sum(), leaves, retain_graph=True, allow_unused=True)
        assert not any(grad[row, :, apart].any() for grad in grads if grad is not None)
    # the last row is nothing but padding
    assert not out[4].any()


@all_patterns
def test_padding_inside_a_row_is_not_there(pattern: hf_sparse.Pattern) -> None:
    n, hole = 30, [4, 5, 11]
    if pattern.key == "sac":
        # a band counts positions, those of the hole too
        pattern = hf_sparse.pattern_from_dict({**pattern.to_dict(), "radius": 0})
    tensors = random_tensors(tokens=n, width=WIDTH)
    is_real = torch.ones(1, n, dtype=torch.bool)
    is_real[0, hole] = False
    out = attention(pattern, key_padding_mask=is_real)(*tensors)
    alone = attention(pattern)(*(t[:, :, is_real[0]] for t in tensors))
    assert_same_maths(out[:, :, is_real[0]], alone, terms=n + WIDTH)
    assert not out[:, :, hole].any()


@all_patterns
def test_packed_documents_equal_documents_alone(pattern: hf_sparse.Pattern) -> None:
    n, cut = 31, 12
    tensors = random_tensors(tokens=n, width=WIDTH)
    documents = (torch.arange(n) >= cut).long()[None]
    out = attention(pattern | BAND, document_ids=documents)(*tensors)
    for at in (slice(0, cut), slice(cut, n)):
        alone = attention(pattern | BAND)(*(t[:, :, at] for t in tensors))
        assert_same_maths(out[:, :, at], alone, terms=n + WIDTH)


@causal_patterns
def test_values_never_come_from_ahead(pattern: hf_sparse.Pattern) -> None:
    n, p = 37, 20
    query, key, value = random_tensors(tokens=n, width=WIDTH)
    changed = torch.cat([value[:, :, :p], 5 - value[:, :, p:]], 2)
    before, after = (attention(pattern | BAND, is_causal=True)(query, key, v) for v in (value, changed))
    assert torch.equal(before[:, :, :p], after[:, :, :p])
    assert not torch.equal(before[:, :, p:], after[:, :, p:])


@pytest.mark.parametrize("name", STABLE)
def test_a_prefix_gives_what_it_gives_alone(name: str) -> None:
    n = 37
    tensors = random_tensors(tokens=n, width=WIDTH)
    whole = attention(PATTERNS[name] | BAND, is_causal=True)(*tensors)
    for p in (1, 8, 9, 20, 33):
        alone = attention(PATTERNS[name] | BAND, is_causal=True)(*(t[:, :, :p] for t in tensors))
        assert_same_maths(whole[:, :, :p], alone, terms=n + WIDTH)


@all_patterns
def test_layers_and_heads_and_seeds_differ_and_repeat(pattern: hf_sparse.Pattern) -> None:
    n = 37
    query, key, value = (t[:, :1].expand(-1, HEADS, -1, -1) for t in random_tensors(tokens=n, width=WIDTH))
    first = attention(pattern)(query, key, value)
    torch.rand(7)
    assert torch.equal(attention(pattern)(query, key, value), first)
    if pattern.key == "sac":
        assert not torch.equal(first[:, 0], first[:, 1])
    if pattern.key in ("sinkhorn", "sac") or "one_chunk" in str(pattern) or pattern == PATTERNS["reformer_one_chunk"]:
        return
    assert not torch.equal(first[:, 0], first[:, 1])
    held = {**pattern.to_dict(), "seed": 5}
    assert not torch.equal(attention(hf_sparse.pattern_from_dict(held))(query, key, value), first)
    if pattern.key == "reformer":
        assert not torch.equal(attention(pattern, layer=1)(query, key, value), first)


@all_patterns
def test_heads_held_apart_are_those_of_the_whole(pattern: hf_sparse.Pattern) -> None:
    tensors = random_tensors(tokens=21, width=WIDTH)
    whole = attention(pattern)(*tensors)
    held = {"hidden_states": tensors[0].transpose(1, 2).flatten(2)} if pattern.key == "sac" else {}
    part = attention(pattern, head_offset=1, num_heads=HEADS, **held)(*(t[:, 1:3] for t in tensors))
    assert_same_maths(part, whole[:, 1:3], terms=21 + WIDTH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@all_patterns
def test_half_precision_is_as_exact_as_dense(pattern: hf_sparse.Pattern, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in random_tensors(tokens=37, width=WIDTH)]
    # the choice is made in float32 from what was rounded
    exact = attention(pattern)(*(t.float() for t in tensors)).double()
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors)
    true = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors))
    actual = attention(pattern)(*tensors)
    assert actual.dtype == dtype
    assert_within_rounding(actual, exact, (exact + (dense.double() - true)).to(dtype))


@pytest.mark.parametrize(
    "pattern", [_make("reformer"), _make("routing"), _make("sinkhorn"), _make("reformer", prefix_stable=True, num_buckets=2),
                _make("sac", block_size=8)],
    ids=["reformer", "routing", "sinkhorn", "reformer_stable", "sac"],
)  # fmt: skip
@pytest.mark.parametrize("is_causal", [False, True])
def test_wide_open_equals_dense(pattern: hf_sparse.Pattern, is_causal: bool) -> None:
    tensors = random_tensors(tokens=29, width=WIDTH)
    opened = pattern.wide_open(29)
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    assert_same_maths(attention(opened, is_causal=is_causal)(*tensors), wanted, terms=29 + WIDTH)


def test_heads_may_have_content_of_their_own() -> None:
    routing, reformer = PATTERNS["routing"], PATTERNS["reformer"] | BAND
    mixed = hf_sparse.by_head({0: routing, range(1, 3): BAND, 3: reformer})
    tensors = random_tensors(tokens=37, key_heads=2, width=WIDTH)
    out = attention(mixed)(*tensors)
    for at, own in ((slice(0, 1), routing), (slice(1, 3), BAND), (slice(3, 4), reformer)):
        assert_same_maths(out[:, at], attention(own)(*tensors)[:, at], terms=37 + WIDTH)


def test_means_of_clusters_are_refused_where_they_mean_nothing() -> None:
    tensors = random_tensors(tokens=21, width=WIDTH)
    with pytest.raises(ValueError, match="nothing can be united with it; set merge='lse'"):
        attention(MEAN | BAND)(*tensors)
    with pytest.raises(ValueError, match="does not serve means; pass backend='gather'"):
        attention(MEAN, backend="dense")(*tensors)
    with pytest.raises(ValueError, match="averages blocks, so they have no common logsumexp"):
        attention(MEAN, return_lse=True)(*tensors)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "varlen"}, "does not serve backend 'varlen'; pass 'gather'"),
        ({"softcap": 3.0}, "does not serve softcap"),
        ({"query_positions": torch.zeros(1, 21, dtype=torch.int64)}, "does not serve cached decoding"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_what_is_not_served_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attention(PATTERNS["routing"], **settings)(*random_tensors(tokens=21, width=WIDTH))


def test_combinations_that_are_not_served_are_refused() -> None:
    tensors = random_tensors(tokens=21, width=WIDTH)
    with pytest.raises(
        ValueError, match="at most one member of a union may be content-based, got 'routing', 'reformer'"
    ):
        attention(PATTERNS["routing"] | PATTERNS["reformer"])(*tensors)
    with pytest.raises(ValueError, match="not served beside nodes that are no tokens"):
        PATTERNS["routing"] | _make("star")
    with pytest.raises(ValueError, match="cannot be causal; set sortcut=None"):
        attention(PATTERNS["sinkhorn_sortcut"], is_causal=True)(*tensors)
    with pytest.raises(ValueError, match="over the padded length cannot be combined"):
        PATTERNS["routing"] | _make("bigbird", length="padded")


@all_patterns
def test_there_is_no_mask_without_content(pattern: hf_sparse.Pattern) -> None:
    with pytest.raises(ValueError, match="is content-based: who reads whom depends on queries and keys"):
        pattern.mask(8)
    assert 0 < pattern.density(64) <= 1
    assert pattern.density(64, is_causal=True) <= pattern.density(64)
    assert (pattern | BAND).density(64) >= pattern.density(64)
    assert "found by content" in str(hf_sparse.explain(pattern, 64))


# a mixture of blocks reads them all and counts as one; buckets and nearest clusters are as large as they are
COUNTED = [
    name for name in PATTERNS if name not in ("sinkhorn", "sinkhorn_sortcut", "reformer_stable", "routing_nearest")
]


@pytest.mark.parametrize("name", COUNTED)
def test_the_density_is_no_less_than_the_pairs_read(name: str) -> None:
    n, pattern = 64, PATTERNS[name]
    query, key, _ = random_tensors(tokens=n, width=WIDTH)
    identity = torch.eye(n, dtype=torch.float64).expand(1, HEADS, -1, -1)
    read = (attention(pattern)(query, key, identity) > 0).double().mean().item()
    assert read <= pattern.density(n) + 1e-9
