"""The same laws on a CUDA device; needs one, so it is deselected unless -m says otherwise."""

import pytest
import torch

import hf_sparse
from tests.pattern_cases import CASES, Case, case_name
from tests.support.rounding import assert_within_rounding

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_gather_on_cuda_equals_float64_on_the_cpu(case: Case, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 300, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(2, 4, 300, 16, generator=generator)
    results = []
    for device, dtype, backend in (
        ("cpu", torch.float64, "dense"),
        ("cuda", torch.float32, "gather"),
        ("cuda", torch.float32, "dense"),
    ):
        held = [tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
        out = hf_sparse.sparse_attention(*held, case.pattern, is_causal=is_causal, backend=backend)
        gradients = torch.autograd.grad((out * weight.to(out)).sum(), held)
        results.append([tensor.cpu() for tensor in (out.detach(), *gradients)])
    for oracle, actual, dense in zip(*results, strict=True):
        assert_within_rounding(actual, oracle, dense)


def test_dropout_on_cuda_repeats_with_the_seed_and_keeps_its_share() -> None:
    eye = torch.eye(300, device="cuda").expand(1, 1, 300, 300)
    query, key = torch.randn(2, 1, 1, 300, 16, device="cuda").unbind(0)
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(hf_sparse.sparse_attention(query, key, eye, hf_sparse.pattern("band", radius=50), dropout=0.25))
    assert torch.equal(*drawn)
    edges = hf_sparse.pattern("band", radius=50).mask(300)[0].cuda()
    kept = (drawn[0][0, 0][edges] > 0).double().mean()
    # five standard deviations of a share of that many draws
    assert (kept - 0.75).abs() < 5 * (0.75 * 0.25 / int(edges.sum())) ** 0.5
