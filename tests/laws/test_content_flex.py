"""Content-based patterns on the backend "flex": uncompiled on the CPU, where it has no gradient, and on a CUDA device."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.backends.flex_slots import lay_out
from hf_sparse.backends.slot_calls import SlotCall
from hf_sparse.slots import Assignment, Slots
from tests.laws.test_content import CAUSAL, MEAN, UNITED, attention
from tests.laws.test_content import PATTERNS as EVERY
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.softmax import random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 8
# uncompiled, 70 clusters filled up to blocks of the kernel are 80 million pairs a head, and 37 tokens 22 million
PATTERNS = {name: pattern for name, pattern in EVERY.items() if name not in ("routing_many", "sac_token")}
all_patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def check_like_gather(pattern: hf_sparse.Pattern, n: int, **settings: Any) -> None:
    """Compare outputs and logsumexps of "flex" and "gather" in float64."""
    tensors = random_tensors(batch=2, tokens=n, key_heads=2, width=WIDTH)
    with torch.no_grad():
        found = [attention(pattern, backend=b, return_lse=True, **settings)(*tensors) for b in ("flex", "gather")]
    for one, other in zip(*found, strict=True):
        assert_same_maths(one, other, terms=n + WIDTH)


@pytest.mark.parametrize("n", [1, 37])
@all_patterns
def test_flex_gives_what_gather_gives(pattern: hf_sparse.Pattern, n: int) -> None:
    check_like_gather(pattern, n)


@pytest.mark.parametrize("name", [name for name in PATTERNS if name in CAUSAL])
def test_causal_calls_with_padding_agree(name: str) -> None:
    is_real = torch.ones(2, 37, dtype=torch.bool)
    is_real[1, :11] = False
    check_like_gather(PATTERNS[name], 37, is_causal=True, key_padding_mask=is_real)


@pytest.mark.parametrize("union", UNITED.values(), ids=UNITED)
@pytest.mark.parametrize("name", ["reformer", "routing", "sinkhorn"])
def test_unions_count_pairs_once(name: str, union: Any) -> None:
    check_like_gather(union(PATTERNS[name]), 37)


def test_blocks_longer_than_the_kernels_and_lanes_of_unequal_numbers() -> None:
    check_like_gather(hf_sparse.pattern("sinkhorn", block_size=150), 310)
    check_like_gather(hf_sparse.pattern("routing", num_clusters=3, assignment="nearest"), 310)


def test_the_kernels_blocks_are_those_of_the_own_slot() -> None:
    """Uncompiled, torch looks at the mask function alone; on CUDA it goes by these tables."""
    lane = torch.tensor([0, 0, 1])
    slots = Slots(lane, torch.arange(3 * 130).view(3, 130) % 140, torch.arange(3 * 300).view(3, 300) % 140)
    call = SlotCall(Assignment((slots,)), 2, False, 1.0, torch.arange(140))
    layout = lay_out(slots, call, 2)
    q_slot, k_slot = (torch.arange(2 * blocks) // blocks for blocks in (2, 3))
    for own, other, counts, indices in (
        (q_slot, k_slot, layout.counts, layout.indices),
        (k_slot, q_slot, layout.back_counts, layout.back_indices),
    ):
        for held in range(2):
            for block, slot in enumerate(own.tolist()):
                wanted = (other == slot).nonzero()[:, 0].tolist() if held == 0 or slot == 0 else []
                count = int(counts[0, held, block])
                assert indices[0, held, block, :count].tolist() == wanted
    assert layout.queries.shape == (2, 2 * 256)
    assert layout.keys.shape == (2, 2 * 384)
    assert torch.equal(layout.queries[0, 256 : 256 + 130], slots.queries[1])
    assert layout.allowed[0, 1, :130, :300].all()
    assert layout.allowed.sum() == 3 * 130 * 300


@pytest.mark.parametrize(
    ("pattern", "settings", "said"),
    [(PATTERNS["routing"], {"dropout": 0.1}, "does not serve dropout"), (MEAN, {}, "does not serve averaged blocks")],
)
def test_what_flex_cannot_serve_is_refused(pattern: hf_sparse.Pattern, settings: dict[str, Any], said: str) -> None:
    tensors = random_tensors(tokens=9, width=WIDTH)
    with pytest.raises(ValueError, match=f"{said} .*; pass backend='gather'"):
        attention(pattern, backend="flex", **settings)(*tensors)


def test_a_gradient_on_the_cpu_is_refused() -> None:
    tensors = [t.requires_grad_() for t in random_tensors(tokens=9, width=WIDTH)]
    with pytest.raises(ValueError, match="backend 'flex' has no gradient on the cpu; pass backend='gather'"):
        attention(PATTERNS["reformer"], backend="flex")(*tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
def test_outputs_and_gradients_on_cuda_are_within_rounding(name: str, is_causal: bool) -> None:
    if is_causal and name not in CAUSAL:
        pytest.skip("sortcut cannot be causal")
    n, width = 300, 64
    exact = random_tensors(batch=2, tokens=n, key_heads=2, width=width)
    held = [t.float().cuda() for t in exact]

    def run(backend: str, tensors: list[Tensor]) -> list[Tensor]:
        return with_gradients(attention(PATTERNS[name], backend=backend, is_causal=is_causal), tensors)

    # the same tokens are chosen: in float32 by both
    oracle = [t.double().cpu() for t in run("dense", [t.double() for t in held])]
    dense = [t.cpu() for t in run("dense", held)]
    for one, wanted, other in zip(run("flex", held), oracle, dense, strict=True):
        assert_within_rounding(one.cpu(), wanted, other)
