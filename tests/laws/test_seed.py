"""Law 5: the same seed gives the same pattern, in every process; another seed, layer or head gives another one."""

import hashlib
import json

import numpy
import pytest
import torch

import hf_sparse
from tests.core_process import run_in_core
from tests.pattern_cases import CASES, HEADS, Case, attention, case_name

PROGRAM = """
import hashlib, json
for line in sys.stdin:
    call = json.loads(line)
    mask = pattern_from_dict(call.pop("pattern")).mask(**call)
    print(hashlib.sha256(mask.numpy().tobytes()).hexdigest())
"""
CALLS = [{"n": 150, "heads": HEADS, "layer": 1, "is_causal": is_causal} for is_causal in (False, True)]
DRAWN = {
    "random": hf_sparse.pattern("random", block_size=4, num_random_blocks=2),
    "published": hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=2),
    "full_length": hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=2, random_plan="full_length"),
}


@pytest.mark.several_processes
def test_another_process_draws_the_same_patterns() -> None:
    lines = [json.dumps({"pattern": case.pattern.to_dict(), **call}) for case in CASES for call in CALLS]
    theirs = run_in_core(PROGRAM, lines="\n".join(lines), PYTHONHASHSEED="77")
    own = [
        hashlib.sha256(case.pattern.mask(**call).numpy().tobytes()).hexdigest()  # type: ignore[arg-type]
        for case in CASES
        for call in CALLS
    ]
    assert theirs == own


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_drawing_neither_reads_nor_moves_the_global_generators(case: Case) -> None:
    torch.manual_seed(1)
    numpy.random.seed(1)
    first = case.pattern.mask(150, heads=HEADS)
    torch.manual_seed(2)
    numpy.random.seed(2)
    before = torch.get_rng_state(), numpy.random.get_state()[1].copy()  # type: ignore[index]
    assert torch.equal(first, case.pattern.mask(150, heads=HEADS))
    assert torch.equal(before[0], torch.get_rng_state())
    assert numpy.array_equal(before[1], numpy.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("name", DRAWN)
def test_layers_heads_and_seeds_draw_differently(name: str, is_causal: bool) -> None:
    pattern = DRAWN[name]
    other = hf_sparse.pattern_from_dict(pattern.to_dict() | {"seed": 9})
    masks = [p.mask(150, heads=3, layer=layer, is_causal=is_causal) for p in (pattern, other) for layer in (0, 1, 2)]
    drawn = torch.cat(masks)
    for i in range(len(drawn)):
        for j in range(i):
            assert not torch.equal(drawn[i], drawn[j]), f"mask {i} repeats mask {j}"


@pytest.mark.parametrize("name", DRAWN)
def test_a_layer_reads_its_own_draw(name: str) -> None:
    # the backends keep plans: one layer's must not serve another
    pattern = DRAWN[name]
    value = torch.eye(150)[None, None].expand(1, 2, -1, -1)
    flat = torch.zeros(1, 2, 150, 4)
    for layer in (0, 1, 0):
        for backend in ("dense", "gather"):
            out = attention(pattern, layer=layer, backend=backend)(flat, flat, value)
            assert isinstance(out, torch.Tensor)
            assert torch.equal(out[0] > 0, pattern.mask(150, heads=2, layer=layer))
