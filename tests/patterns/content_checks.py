"""What the tests of content-based patterns share: every row and head against an oracle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hf_sparse
from hf_sparse.parts import Scope
from hf_sparse.patterns.content import Content
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import random_tensors

HEADS, WIDTH = 2, 4
SCALE = WIDTH**-0.5
# gets a row and head's query, key and value, the row, and the head
Oracle = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def content_of(n: int, *, is_causal: bool = False, state: Any = None, hidden_states: Tensor | None = None) -> Content:
    """Return what a pattern is told of a call with ``HEADS`` heads on layer 0."""
    return Content(Scope(n, HEADS, 0, is_causal, 0, HEADS), state, hidden_states)


def check_against(pattern: hf_sparse.Pattern, oracle: Oracle, n: int, *, has_lse: bool = True, **settings: Any) -> None:
    """Compare outputs, logsumexps and gradients of two rows with an oracle, on every backend that serves the pattern."""
    tensors = random_tensors(batch=2, heads=HEADS, tokens=n, width=WIDTH)

    def looped(query: Tensor, key: Tensor, value: Tensor) -> Any:
        found = [
            [oracle(query[row, head], key[row, head], value[row, head], row, head) for head in range(HEADS)]
            for row in range(2)
        ]
        out, lse = (torch.stack([torch.stack([head[i] for head in row]) for row in found]) for i in range(2))
        return (out, lse) if has_lse else out

    wanted = with_gradients(looped, tensors)
    for backend in ("gather", "dense") if has_lse else ("gather",):

        def attend(*leaves: Tensor, backend: str = backend) -> Any:
            return hf_sparse.sparse_attention(*leaves, pattern, backend=backend, return_lse=has_lse, **settings)

        for one, other in zip(with_gradients(attend, tensors), wanted, strict=True):
            assert_same_maths(one, other, terms=n + WIDTH)
