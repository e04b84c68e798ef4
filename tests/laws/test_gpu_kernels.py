"""The ``flex`` and ``varlen`` kernels on a CUDA device; deselected unless -m says otherwise."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

import hf_sparse
from hf_sparse.backends import flex
from hf_sparse.backends.dense import draw_edges
from hf_sparse.backends.dropout import draw_words, mix, threshold
from hf_sparse.patterns import Pattern
from tests.pattern_cases import HEADS, IN_FLEX, Case, attention, case_name, case_of, sampled
from tests.support.rounding import assert_within_rounding
from tests.support.softmax import random_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
all_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
N, WIDTH = 400, 64


def masks_of(name: str, *, has_globals: bool = False) -> dict[str, Tensor]:
    """Return masks of two rows."""
    column = torch.arange(N)
    masks = {
        "nothing": {},
        "padding": {"key_padding_mask": torch.stack([column >= 70, column < 133])},
        "documents": {"document_ids": torch.stack([column // 90, column // 350 - 1])},
    }[name]
    if has_globals and name != "nothing":
        masks["global_mask"] = torch.stack([column == 77, column % 60 == 3])
    return masks


def edges(pattern: Pattern, *, is_causal: bool, **masks: Tensor) -> Tensor:
    """Draw the mask of two rows on the CPU."""
    held = [masks.get(name) for name in ("key_padding_mask", "global_mask", "document_ids")]
    query = torch.empty(2, HEADS, N, 0)
    return draw_edges(query, query, *held, None, None, pattern.json, 0, is_causal, 0, HEADS, "all")


def explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, multiplier: Tensor | None = None) -> Tensor:
    """Attend by torch's own kernels in the dtype given, or by a softmax spelled out where dropout is replayed."""
    reads = mask.any(-1, keepdim=True)
    key, value = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in (key, value))
    if multiplier is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask | ~reads) * reads
    scores = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).masked_fill(~(mask | ~reads), float("-inf"))
    return (scores.softmax(-1) * multiplier.to(scores)) @ value * reads


def compare(attend: Any, dtype: torch.dtype, mask: Tensor, multiplier: Tensor | None = None) -> None:
    """Compare output and gradients with float64, allowing twice the error of dense torch at the dtype."""
    tensors = [tensor.to(dtype) for tensor in random_tensors(batch=2, tokens=N, key_heads=2, width=WIDTH)]
    weight = torch.randn(2, HEADS, N, WIDTH, generator=torch.Generator().manual_seed(0))
    results = []
    for device, held, function in (
        ("cpu", torch.float64, functools.partial(explicit, mask=mask, multiplier=multiplier)),
        ("cuda", dtype, attend),
        (
            "cuda",
            dtype,
            functools.partial(explicit, mask=mask.cuda(), multiplier=None if multiplier is None else multiplier.cuda()),
        ),
    ):
        leaves = [tensor.to(device, held).requires_grad_() for tensor in tensors]
        out = function(*leaves)
        gradients = torch.autograd.grad((out * weight.to(out)).sum(), leaves)
        results.append([t.detach().cpu() for t in (out, *gradients)])
    for oracle, actual, dense in zip(*results, strict=True):
        assert actual.isfinite().all()
        assert_within_rounding(actual, oracle, dense)


@all_dtypes
@both_ways
@pytest.mark.parametrize("name", ["nothing", "padding", "documents"])
@pytest.mark.parametrize("case", IN_FLEX, ids=case_name)
def test_flex_equals_float64_forward_and_backward(case: Case, name: str, is_causal: bool, dtype: torch.dtype) -> None:
    masks = masks_of(name, has_globals=case.pattern.has_global_tokens)
    on_device = {key: mask.cuda() for key, mask in masks.items()}
    attend = attention(case.pattern, backend="flex", is_causal=is_causal, **on_device)
    compare(attend, dtype, edges(case.pattern, is_causal=is_causal, **masks))


@all_dtypes
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_flex_dropout_equals_float64_with_the_draw_replayed(case: Case, dtype: torch.dtype) -> None:
    p, seed = 0.3, 11
    torch.manual_seed(seed)
    words = draw_words(torch.randint(0, 2**62, (1,)), 2, HEADS, N, N, torch.device("cpu"))
    multiplier = (mix(words[0][..., :, None], words[1]) < threshold(p)).double() / (1 - p)

    def attend(*leaves: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return attention(case.pattern, backend="flex", dropout=p)(*leaves)

    compare(attend, dtype, edges(case.pattern, is_causal=False), multiplier)


def test_flex_gradients_flow_through_the_logsumexp() -> None:
    pattern = hf_sparse.pattern("longformer", window=20, global_tokens=(0,))
    gradients = []
    for device, dtype, backend in (("cpu", torch.float64, "dense"), ("cuda", torch.float32, "flex")):
        leaves = [t.to(device, dtype).requires_grad_() for t in random_tensors(batch=2, tokens=N, width=WIDTH)]
        _, lse = attention(pattern, backend=backend, return_lse=True)(*leaves)
        gradients.append([grad.double().cpu() for grad in torch.autograd.grad(lse.square().sum(), leaves[:2])])
    for oracle, actual in zip(*gradients, strict=True):
        assert (actual - oracle).abs().max() <= 1e-4 * oracle.abs().max()


@pytest.mark.parametrize("name", ["longformer", "by_head"])
def test_flex_compiles_once_for_lengths_batches_and_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    monkeypatch.setattr(flex, "run_compiled", functools.partial(flex.run_compiled, backend=counter))
    case = case_of(name)
    for n, batch in ((300, 2), (1000, 3), (257, 2), (4096, 5)):
        tensors = [t.bfloat16().cuda().requires_grad_() for t in random_tensors(batch=batch, tokens=n, width=WIDTH)]
        column, row = torch.arange(n, device="cuda"), torch.arange(batch, device="cuda")[:, None]
        padding = {"key_padding_mask": column >= 20 * row}
        for masks in ({}, padding, {**padding, "global_mask": column == 20 * row + 3}):
            attention(case.pattern, backend="flex", **masks)(*tensors).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("last", [1, 7, 200])
def test_flex_decodes(last: int) -> None:
    query, key, value = random_tensors(batch=2, tokens=N, key_heads=2, width=WIDTH)
    pattern = hf_sparse.pattern("longformer", window=20, global_tokens=(0,))
    settings: dict[str, Any] = {"is_causal": True, "key_padding_mask": masks_of("padding")["key_padding_mask"]}
    wanted = attention(pattern, backend="dense", **settings)(query[:, :, -last:], key, value)
    settings["key_padding_mask"] = settings["key_padding_mask"].cuda()
    held = [t.float().cuda() for t in (query[:, :, -last:], key, value)]
    actual = attention(pattern, backend="flex", **settings)(*held)
    assert (actual.double().cpu() - wanted).abs().max() <= 1e-5


def test_a_width_or_dtype_that_the_kernel_does_not_take_is_refused() -> None:
    attend = attention(hf_sparse.pattern("band"), backend="flex")
    with pytest.raises(ValueError, match="needs heads of width 16 or more on cuda, got 4 and 4; pass backend='gather'"):
        attend(*(t.float().cuda() for t in random_tensors(tokens=9, width=4)))
    with pytest.raises(ValueError, match="does not serve float64 on cuda; pass backend='gather'"):
        attend(*(t.cuda() for t in random_tensors(tokens=9, width=16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@both_ways
@pytest.mark.parametrize("name", ["nothing", "padding", "documents"])
def test_varlen_equals_float64_forward_and_backward(name: str, is_causal: bool, dtype: torch.dtype) -> None:
    band, masks = hf_sparse.pattern("band", radius=50), masks_of(name)
    on_device = {key: mask.cuda() for key, mask in masks.items()}
    attend = attention(band, backend="varlen", is_causal=is_causal, **on_device)
    compare(attend, dtype, edges(band, is_causal=is_causal, **masks))


def test_varlen_and_flex_give_the_same_logsumexp() -> None:
    band = hf_sparse.pattern("band", radius=50)
    tensors = [t.bfloat16().cuda() for t in random_tensors(batch=2, tokens=N, key_heads=2, width=WIDTH)]
    real = masks_of("padding")["key_padding_mask"].cuda()
    sums = [
        attention(band, backend=backend, key_padding_mask=real, return_lse=True)(*tensors)[1]
        for backend in ("varlen", "flex")
    ]
    assert torch.equal(*(lse.isfinite() for lse in sums))
    assert (sums[0] - sums[1])[sums[0].isfinite()].abs().max() <= 1e-4
