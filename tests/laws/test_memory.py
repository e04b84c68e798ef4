"""Law 7: no tensor of N x N, forward or backward, with dropout or without."""

import json

import pytest

from tests.core_process import run_in_core

N = 16384
# one mask of N x N bools; scores of float32 would be four times that
LIMIT = N * N
PATTERNS: list[dict[str, object]] = [
    {"key": "band", "radius": 128},
    {"key": "dilated", "radius": 64, "dilation": 4},
    {"key": "strided", "stride": 256},
    {"key": "longformer", "window": 256, "global_tokens": [0, 1, 9000], "dilation": [1, 2]},
    {"key": "bigbird", "block_size": 64},
    {"key": "sparse_transformer", "stride": 128, "summary": 8},
    {"key": "bp_transformer", "nodes_per_level": 4},
]
OTHERS: list[dict[str, object]] = [
    # as many scores as dense attention has: only slices of them may be held
    {"key": "strided", "stride": 2},
    {"key": "band", "radius": 16384},
    {"key": "block_local", "block_size": 128},
    {"key": "global", "positions": [0, 5000, 16383]},
    {"key": "random", "block_size": 64, "num_random_blocks": 3},
    {"key": "bigbird", "block_size": 64, "random_plan": "full_length"},
    {"key": "star", "radius": 3},
    {"key": "etc", "num_global": 64, "max_relative_distance": 0},
    {"key": "bigbird", "block_size": 64, "num_external_global": 64},
    {"key": "sparse_transformer", "kind": "strided", "stride": 128},
    {"key": "bp_transformer", "nodes_per_level": 4, "spans": "pooled"},
    {"key": "image_1d", "num_prefix_tokens": 1},
    {"key": "image_2d", "width": 128},
    {"key": "axial", "width": 128, "axis": "row"},
    {"key": "axial", "width": 128, "axis": "column"},
    {"key": "union", "patterns": [{"key": "band", "radius": 64}, {"key": "strided", "stride": 256}]},
]
PROGRAM = """
import json, resource
import torch

def peak():
    # of this process alone: what resource reports in a child begins at its parent's peak
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

def forget_peak():
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")

def run(n, pattern, **settings):
    total = n if pattern.pools_nodes else n + pattern.num_nodes(n)
    leaves = [torch.randn(1, 2, total, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(1, total, dtype=torch.bool)
    mask[:, n - 5 : n] = False
    sparse_attention(*leaves, pattern, key_padding_mask=mask, backend="gather", **settings).square().sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)

n = int(sys.argv[1])
torch.set_num_threads(1)
for description in json.loads(sys.argv[2]):
    pattern = pattern_from_dict(description)
    run(300, pattern, dropout=0.1)
    for settings in ({}, {"is_causal": True}, {"dropout": 0.1}):
        forget_peak()
        start = peak()
        run(n, pattern, **settings)
        print(json.dumps([f"{description} {settings}", peak() - start]), flush=True)
forget_peak()
start = peak()
run(n, pattern_from_dict(json.loads(sys.argv[2])[0]), distance_bias=torch.randn(2, 257), softcap=5.0, sinks=torch.zeros(2))
print(json.dumps(["terms of scores", peak() - start]), flush=True)
forget_peak()
start = peak()
held = torch.ones(n, n, dtype=torch.int16)
print(json.dumps(["control", peak() - start]))
"""


def measure(patterns: list[dict[str, object]], n: int = N) -> dict[str, int]:
    """Return by how many bytes each run raised the peak of a process of its own."""
    printed = run_in_core(PROGRAM, str(n), json.dumps(patterns))
    return dict(json.loads(line) for line in printed)


@pytest.mark.several_processes
@pytest.mark.parametrize("patterns", [PATTERNS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["main", "others"])
def test_16384_tokens_take_less_memory_than_one_boolean_mask(patterns: list[dict[str, object]]) -> None:
    peaks = measure(patterns)
    # the measure sees a tensor of N x N where there is one
    assert peaks.pop("control") > LIMIT
    assert len(peaks) == 3 * len(patterns) + 1
    assert {name: peak for name, peak in peaks.items() if peak > LIMIT} == {}
