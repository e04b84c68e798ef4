"""What "auto" chooses, how it says so, and that a choice never changes the result."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import hf_sparse
from hf_sparse.backends.plans import PLANS, cached_plan
from hf_sparse.choice import choose_backend
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import random_tensors

LONGFORMER = hf_sparse.pattern("longformer", window=512, global_tokens=(0,))
BIGBIRD = hf_sparse.pattern("bigbird", block_size=64)


def is_whole(pattern: Pattern, n: int, heads: int = 12) -> bool:
    """Say whether "auto" runs a sequence in one call under its whole mask."""
    return cached_plan(pattern, Scope(n, heads), None, (), "all", True).is_whole


@pytest.mark.parametrize(
    ("pattern", "n", "is_causal", "backend", "is_masked"),
    [
        (LONGFORMER, 257, False, "sdpa", False),
        # the last token is too far from the first one alone, which is global: all parts together allow every pair
        (LONGFORMER, 258, False, "sdpa", False),
        (LONGFORMER, 259, False, "sdpa", True),
        (LONGFORMER, 1100, False, "gather", False),
        (hf_sparse.pattern("band", radius=1499), 1500, False, "sdpa", False),
        (hf_sparse.pattern("band", radius=1498), 1500, False, "gather", False),
        (hf_sparse.pattern("band", radius=1499), 1500, True, "sdpa", False),
        (hf_sparse.pattern("band", radius=200), 300, True, "sdpa", True),
        (hf_sparse.pattern("block_local", block_size=64), 64, False, "sdpa", False),
        (hf_sparse.pattern("block_local", block_size=64), 65, False, "sdpa", True),
        (hf_sparse.pattern("block_local", block_size=64), 1024, False, "gather", False),
        (BIGBIRD, 128, False, "sdpa", False),
        (BIGBIRD, 256, False, "sdpa", False),
        # each head has a mask of its own
        (BIGBIRD, 512, False, "gather", False),
        (hf_sparse.by_head({range(6): LONGFORMER, range(6, 12): BIGBIRD}), 128, False, "sdpa", False),
        (hf_sparse.by_head({range(6): LONGFORMER, range(6, 12): BIGBIRD}), 300, False, "gather", False),
        (hf_sparse.pattern("dilated", radius=64, dilation=2), 2, False, "sdpa", True),
    ],
)
def test_short_sequences_go_to_torch_and_all_else_to_gather(
    pattern: Pattern, n: int, is_causal: bool, backend: str, is_masked: bool
) -> None:
    choice = hf_sparse.explain(pattern, n, heads=12, is_causal=is_causal)
    assert (choice.backend, choice.mask is not None) == (backend, is_masked)
    drawn = pattern.mask(n, heads=12, is_causal=is_causal)
    allows_all = bool(drawn.sum() == 12 * (n * (n + 1) // 2 if is_causal else n * n))
    assert (backend == "sdpa" and not is_masked) <= allows_all
    if choice.mask is not None:
        assert all(torch.equal(choice.mask.boolean(), head) for head in drawn)


def test_cuda_goes_to_the_fused_kernel_where_it_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert hf_sparse.explain(LONGFORMER, 4096, device="cuda").backend == "flex"
    assert hf_sparse.explain(LONGFORMER, 200, device="cuda", dropout=0.1).backend == "sdpa"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert hf_sparse.explain(LONGFORMER, 4096, device="cuda").backend == "gather"


def test_a_short_sequence_runs_whole_and_a_long_one_never() -> None:
    assert is_whole(LONGFORMER, 512)
    assert is_whole(BIGBIRD, 512)
    # few of the pairs: blocks are faster however short
    assert not is_whole(hf_sparse.pattern("block_local", block_size=64), 1024)
    for n in (1025, 1100, 4096):
        for pattern in (LONGFORMER, BIGBIRD, hf_sparse.pattern("bigbird", block_size=8)):
            assert not is_whole(pattern, n), (pattern, n)


def test_what_was_asked_for_is_not_replaced() -> None:
    plan = cached_plan(LONGFORMER, Scope(512, 12), None, (), "all", False)
    assert not plan.is_whole


def test_the_explanation_is_one_line_that_names_the_work() -> None:
    whole = str(hf_sparse.explain(LONGFORMER, 512, heads=12))
    assert whole.startswith("sdpa: one call over 512 x 512 pairs under the pattern's mask")
    by_head = str(hf_sparse.explain(BIGBIRD, 512, heads=12))
    assert by_head.startswith("gather: one call over 512 x 512 pairs under the pattern's mask")
    blocks = hf_sparse.explain(hf_sparse.pattern("block_local", block_size=64), 4096)
    assert "1.56% of all pairs" in blocks.reason
    assert "every pair" in hf_sparse.explain(LONGFORMER, 100).reason
    assert hf_sparse.explain(LONGFORMER, 100, dropout=0.1).backend == "gather"
    with pytest.raises(ValueError, match="n and heads must be at least 1"):
        hf_sparse.explain(LONGFORMER, 0)


def test_each_call_says_at_the_debug_level_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    tensors = random_tensors(tokens=40, width=8)
    longer = [tensor.float() for tensor in random_tensors(tokens=300, width=8)]
    with caplog.at_level(logging.DEBUG, logger="hf_sparse"):
        hf_sparse.sparse_attention(*tensors, LONGFORMER)
        hf_sparse.sparse_attention(*tensors, LONGFORMER, return_lse=True)
        hf_sparse.sparse_attention(*tensors, LONGFORMER, bias=torch.zeros(40, 40))
        hf_sparse.sparse_attention(*longer, LONGFORMER)
        # what torch's fused kernel does not take with a mask, or would compute in half precision
        hf_sparse.sparse_attention(longer[0], longer[1][:, :2], longer[2][:, :2], LONGFORMER)
        hf_sparse.sparse_attention(*(tensor.bfloat16() for tensor in longer), LONGFORMER)
        with torch.autocast("cpu", torch.bfloat16):
            hf_sparse.sparse_attention(*longer, LONGFORMER)
    chosen = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert chosen == ["sdpa", "gather", "dense", "sdpa", "gather", "gather", "gather"]
    assert "longformer of 40 tokens" in caplog.text


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_pair_is_torch_to_the_bit(is_causal: bool, key_heads: int) -> None:
    tensors = [tensor.float() for tensor in random_tensors(batch=2, tokens=100, key_heads=key_heads, width=8)]
    padding = torch.ones(2, 100, dtype=torch.bool)
    wanted = scaled_dot_product_attention(*tensors, is_causal=is_causal, enable_gqa=True)
    for mask in (None, padding):
        out = hf_sparse.sparse_attention(*tensors, LONGFORMER, is_causal=is_causal, key_padding_mask=mask)
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("n", [256, 300, 512, 700, 1024])
@pytest.mark.parametrize("pattern", [LONGFORMER, BIGBIRD], ids=["longformer", "bigbird"])
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_choice_changes_nothing_near_the_crossover(
    pattern: Pattern, n: int, is_padded: bool, is_causal: bool
) -> None:
    tensors = random_tensors(batch=2, tokens=n, width=8)
    padding = torch.ones(2, n, dtype=torch.bool)
    padding[1, n // 2 :] = not is_padded

    def attend(backend: str) -> list[torch.Tensor]:
        return with_gradients(
            lambda *t: hf_sparse.sparse_attention(
                *t, pattern, key_padding_mask=padding, is_causal=is_causal, backend=backend
            ),
            tensors,
        )

    for actual, wanted in zip(attend("auto"), attend("gather"), strict=True):
        assert_same_maths(actual, wanted, terms=n + 8)


@pytest.mark.parametrize("pattern", [LONGFORMER, BIGBIRD], ids=["longformer", "bigbird"])
def test_what_was_planned_without_gradients_serves_training(pattern: Pattern) -> None:
    PLANS.clear()
    tensors = [tensor.float() for tensor in random_tensors(tokens=300, width=8)]
    with torch.inference_mode():
        quiet = hf_sparse.sparse_attention(*tensors, pattern)
    out, *grads = with_gradients(lambda *t: hf_sparse.sparse_attention(*t, pattern), tensors)
    assert torch.equal(out, quiet)
    assert all(grad.any() for grad in grads)


def test_nothing_is_planned_for_what_another_device_or_another_kind_of_tensor_runs() -> None:
    PLANS.clear()
    for device, can_mask in (("cuda", False), ("meta", False), ("cpu", False)):
        choice = choose_backend(
            "auto", BIGBIRD, Scope(256, 12), device, can_flex=False, can_mask=can_mask, is_plain=True, dropout=0.0
        )
        assert choice.backend == "gather"
    with FakeTensorMode():
        fake = [torch.empty(1, 4, 300, 8) for _ in range(3)]
        assert hf_sparse.sparse_attention(*fake, LONGFORMER).shape == (1, 4, 300, 8)
    assert PLANS.misses == 0
