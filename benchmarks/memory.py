"""Peak memory of one call, forward and backward, above what was there before its tensors were made."""

import functools
import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import hf_sparse
from hf_sparse.benchmarks.attention import (
    BOTH,
    HEADS,
    WIDTH,
    patterns_at,
    positions_of,
    run_once,
    state_of,
    tensors_at,
)


def bytes_of_tensors(n: int, device: str) -> int:
    """Return the bytes of query, key, value and output ``[1, H, n, D]`` and of their gradients."""
    return 8 * HEADS * n * WIDTH * (4 if device == "cpu" else 2)


def peak_memory(name: str, n: int, device: str) -> int:
    """Return the peak of forward and backward of a row of the table, in bytes, its tensors included.

    On the CPU it is measured in a process of its own, since memory that was used before would hide what is used now.
    """
    if device == "cuda":
        return _measure(name, n, device, None)
    context = multiprocessing.get_context("forkserver")
    # imports once for all
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return pool.submit(_measure, name, n, device, torch.get_num_threads()).result()


def _measure(name: str, n: int, device: str, threads: int | None) -> int:
    if threads is not None:
        torch.set_num_threads(threads)
    pattern = patterns_at(n).get(name)

    def attend_at(tokens: int) -> Any:
        if pattern is None:
            return scaled_dot_product_attention
        held = state_of(pattern, tokens, device)
        return functools.partial(hf_sparse.sparse_attention, pattern=pattern, **held)

    total = positions_of(pattern, n)
    # what is imported or compiled when it is first used is no memory of the call
    run_once(attend_at(256), *tensors_at(positions_of(pattern, 256), device), BOTH)
    attend = attend_at(n)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(attend, *tensors_at(total, device), BOTH)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _peak()
    run_once(attend, *tensors_at(total, device), BOTH)
    return _peak() - before


def _peak() -> int:
    """Return the largest memory that this process ever held, in bytes."""
    if sys.platform == "linux":
        # of this process alone: what `resource` reports in a child begins at the peak of its parent
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
