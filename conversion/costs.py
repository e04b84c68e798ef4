"""What a forward pass costs: operations counted, memory and time measured."""

import contextlib
import ctypes
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse.attention import sparse_attention
from hf_sparse.integration.density import Layer, layer_density
from hf_sparse.patterns import Pattern

_ROUNDS = 3
# of glibc's mallopt: bytes from which on an allocation is a mapping of its own
_MMAP_THRESHOLD = -3
# lengths at which attention is timed
_SHORTEST, _LONGEST = 256, 16_384
# a length at which dense attention of a layer would take longer, in seconds, is not timed
_MOST_SECONDS = 10.0
# layers whose patterns have one density at this length cost the same
_ALIKE_AT = 1024

# a pattern, None for dense attention; whether it is causal; and a density, since a pattern may differ from layer to layer
_Kind = tuple[Pattern | None, bool, float]


@contextlib.contextmanager
def counting_linear(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list to which each linear layer that runs adds its floating-point operations: two for each weight and token."""
    done: list[int] = []

    def count(module: nn.Module, given: tuple[Any, ...], _: Any) -> None:
        weight: Any = module.weight
        done.append(2 * (given[0].numel() // given[0].shape[-1]) * weight.numel())

    # GPT-2's own linear layer is of a class of transformers
    layers = [
        module for module in model.modules() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield done
    finally:
        for hook in hooks:
            hook.remove()


def attention_operations(density: float, shape: tuple[int, int, int], length: int) -> int:
    """Return the floating-point operations of one layer's attention: 4 D for each pair and head, two products of D terms.

    Args:
        density: share of the ``length ** 2`` pairs that are read, averaged over heads.
        shape: heads, key and value heads, and width of a head.
        length: tokens.
    """
    heads, _, width = shape
    return round(4 * heads * width * density * length * length)


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """Return how much a call's memory exceeds at its peak what the process held before; None where the system does not tell.

    Linux with glibc tells: the record of the largest resident memory is set back before the call, and read after it.
    """
    try:
        libc = ctypes.CDLL(None)
        # what was freed and kept would hide what is asked for now: tensors get memory of their own, and give it back
        libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    try:
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    finally:
        # where glibc itself stops
        libc.mallopt(_MMAP_THRESHOLD, 1 << 25)


def _resident(field: str) -> int:
    """Return a field of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@dataclass(frozen=True)
class Timing:
    """Attention of all layers of a model at a length, in seconds: medians of rounds in turns, forward, one text.

    Attributes:
        length: tokens.
        dense: torch's dense attention.
        sparse: each layer with its own pattern; a layer that stays dense takes what dense attention takes.
    """

    length: int
    dense: float
    sparse: float


def attention_timings(
    patterns: Sequence[Pattern | None], layers: Sequence[Layer], shape: tuple[int, int, int]
) -> tuple[Timing, ...]:
    """Time attention of a model's shape, dense and sparse, at doubling lengths.

    It ends at two lengths in a row at which sparse is faster, at 16,384 tokens, or where dense attention would take over 10 s.

    Args:
        patterns: of each layer; None for a dense one.
        layers: of the model.
        shape: heads, key and value heads, and width of a head, the same on all layers.
    """
    # a pattern that layers share is timed once
    kinds = [
        (pattern, layer.is_causal, layer_density(pattern, layer, _ALIKE_AT))
        for pattern, layer in zip(patterns, layers, strict=True)
    ]
    dense = [(None, layer.is_causal, 1.0) for layer in layers]
    kinds = [whole if kind[0] is None else kind for kind, whole in zip(kinds, dense, strict=True)]
    index = {kind: layer.index for kind, layer in zip([*kinds, *dense], [*layers, *layers], strict=True)}
    timings: list[Timing] = []
    length = _SHORTEST
    while length <= _LONGEST:
        runs = {kind: _attend(kind, at, shape, length) for kind, at in index.items()}
        taken: dict[_Kind, list[float]] = {kind: [] for kind in runs}
        for turn in range(_ROUNDS + 1):
            for kind, run in runs.items():
                started = time.perf_counter()
                run()
                # the first turn builds plans
                if turn:
                    taken[kind].append(time.perf_counter() - started)
        median = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
        whole, sparse = (
            sum(median[kind] * held for kind, held in Counter(of_layers).items()) for of_layers in (dense, kinds)
        )
        timings.append(Timing(length, whole, sparse))
        if len(timings) > 1 and all(timing.sparse < timing.dense for timing in timings[-2:]):
            break
        if 4 * max(median[kind] for kind in dense) > _MOST_SECONDS:
            break
        length *= 2
    return tuple(timings)


def cheaper_from(timings: Sequence[Timing]) -> int | None:
    """Return the least length from which on sparse attention was faster at every length timed; None where there is none."""
    found = None
    for timing in reversed(timings):
        if timing.sparse >= timing.dense:
            break
        found = timing.length
    return found


def _attend(kind: _Kind, layer: int, shape: tuple[int, int, int], length: int) -> Callable[[], Any]:
    """Return a call of attention on random tensors."""
    pattern, is_causal, _ = kind
    heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(0)
    # spans that are pooled anew on each layer are no part of the sequence given
    total = length if pattern is None or pattern.pools_nodes else length + pattern.num_nodes(length)
    query, key, value = (
        torch.randn(1, held, total, width, generator=generator) for held in (heads, key_heads, key_heads)
    )
    if pattern is None:
        dense = {"is_causal": is_causal, "enable_gqa": heads != key_heads}
        return lambda: scaled_dot_product_attention(query, key, value, **dense)  # type: ignore[arg-type]
    sizes = {"hidden_size": heads * width, "num_heads": heads, "num_key_value_heads": key_heads, "head_dim": width}
    settings: dict[str, Any] = {"is_causal": is_causal, "layer": layer, "state": pattern.make_state(**sizes)}
    if settings["state"] is not None:
        settings["hidden_states"] = torch.randn(1, total, heads * width, generator=generator)
    return torch.no_grad()(functools.partial(sparse_attention, query, key, value, pattern, **settings))
