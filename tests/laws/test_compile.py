"""A compiled model sees opaque operators: one graph, whatever the lengths, padding or global tokens."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse import sparse_attention
from hf_sparse.backends.dense import draw_edges
from hf_sparse.backends.gather import gather_attention
from tests.pattern_cases import BACKENDS, CASES, HEADS, Case, attention, case_of, sampled
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import random_tensors

WIDTH = 4
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Let no test find the graphs of another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@both_backends
@pytest.mark.parametrize("name", ["longformer", "by_head"])
def test_five_lengths_take_two_graphs(name: str, backend: str) -> None:
    case = case_of(name)
    attend = attention(case.pattern, is_causal=True, backend=backend)
    counting = Counting()
    compiled = torch.compile(attend, fullgraph=True, backend=counting)
    for n in (17, 40, 65, 33, 90):
        tensors = random_tensors(batch=2, tokens=n, width=WIDTH)
        is_real = torch.ones(2, n, dtype=torch.bool)
        is_real[0, : n // 3] = False
        is_global = torch.zeros(2, n, dtype=torch.bool)
        is_global[1, n // 2] = True
        masks = {"key_padding_mask": is_real} | ({"global_mask": is_global} if case.pattern.has_global_tokens else {})
        assert torch.equal(compiled(*tensors, **masks), attend(*tensors, **masks))
    # the first length is taken for a constant, the second makes it a variable
    assert counting.graphs <= 2


@both_backends
def test_other_padding_and_global_tokens_take_no_other_graph(backend: str) -> None:
    case = case_of("longformer")
    attend = attention(case.pattern, backend=backend)
    counting = Counting()
    compiled = torch.compile(attend, fullgraph=True, backend=counting)
    tensors = random_tensors(batch=2, tokens=30, width=WIDTH)
    for shift in range(4):
        is_real = torch.ones(2, 30, dtype=torch.bool)
        is_real[0, : 3 * shift] = False
        is_global = torch.zeros(2, 30, dtype=torch.bool)
        is_global[:, 10 : 10 + shift] = True
        masks = {"key_padding_mask": is_real, "global_mask": is_global}
        assert torch.equal(compiled(*tensors, **masks), attend(*tensors, **masks))
    assert counting.graphs == 1


@both_backends
@pytest.mark.parametrize("case", sampled(names=("longformer_dilated_by_head", "union_of_all_atoms")))
def test_a_compiled_call_equals_an_eager_one_with_gradients(case: Case, backend: str) -> None:
    attend = attention(case.pattern, is_causal=True, backend=backend, return_lse=True)
    tensors = random_tensors(batch=2, tokens=30, key_heads=2, width=WIDTH)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(with_gradients(compiled, tensors), with_gradients(attend, tensors), strict=True):
        assert_same_maths(actual, wanted, terms=30 + WIDTH)


@both_backends
def test_one_compiled_function_serves_each_pattern_it_is_given(backend: str) -> None:
    attend: Callable[..., Any] = functools.partial(sparse_attention, backend=backend)
    tensors = random_tensors(tokens=30, width=WIDTH)
    compiled = torch.compile(attend, fullgraph=True, backend=Counting())
    for case in (*CASES[:3], CASES[0]):
        assert torch.equal(compiled(*tensors, pattern=case.pattern), attend(*tensors, pattern=case.pattern))


@both_backends
def test_one_compiled_function_serves_each_layer(backend: str) -> None:
    case = case_of("longformer_window_by_layer")
    attend = attention(case.pattern, backend=backend)
    tensors = random_tensors(tokens=30, width=WIDTH)
    compiled = torch.compile(attend, fullgraph=True, backend=Counting())
    for layer in (0, 1, 0):
        assert torch.equal(compiled(*tensors, layer=layer), attend(*tensors, layer=layer))


def test_a_compiled_call_draws_dropout_anew() -> None:
    attend = attention(CASES[0].pattern, backend="gather", dropout=0.5)
    tensors = random_tensors(tokens=30, width=WIDTH)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(*tensors), compiled(*tensors)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(first, compiled(*tensors))


def gather_arguments(
    *,
    has_masks: bool,
    dropout: float,
    is_half: bool = False,
    may_be_whole: bool = False,
    has_terms: bool = False,
) -> tuple[Any, ...]:
    """Return the arguments of the operator."""
    tensors = random_tensors(batch=2, tokens=20, key_heads=2, width=WIDTH, value_width=3)
    leaves = [tensor.to(torch.bfloat16 if is_half else torch.float64).requires_grad_() for tensor in tensors]
    masks: list[Tensor | None] = [None] * 5
    if has_masks:
        masks[0] = torch.ones(2, 20, dtype=torch.bool).tril(12)
        masks[1] = torch.zeros(2, 20, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
    seed = torch.tensor([5]) if dropout else None
    pattern = case_of("longformer").pattern.json
    # a cap, and a bias by distance
    terms = (3.0, torch.randn(HEADS, 7, dtype=leaves[0].dtype), None) if has_terms else ()
    return (*leaves, *masks, seed, pattern, 0, True, 0.5, dropout, 0, HEADS, "all", may_be_whole, *terms)


@pytest.mark.parametrize(
    ("has_masks", "dropout", "is_half", "may_be_whole", "has_terms"),
    [
        (False, 0.0, False, False, False),
        (False, 0.0, True, True, False),
        (True, 0.2, True, True, False),
        (True, 0.2, False, False, True),
    ],
)
def test_the_gather_operator_is_declared_as_it_behaves(
    has_masks: bool, dropout: float, is_half: bool, may_be_whole: bool, has_terms: bool
) -> None:
    arguments = gather_arguments(
        has_masks=has_masks, dropout=dropout, is_half=is_half, may_be_whole=may_be_whole, has_terms=has_terms
    )
    torch.library.opcheck(gather_attention, arguments)
    out, lse = gather_attention(*arguments)
    backward = torch.ops.hf_sparse.gather_backward.default
    tensors = [tensor.detach() for tensor in (*arguments[:3], out, lse)]
    for grad_lse in (None, torch.ones_like(tensors[-1])):
        results = torch.library.opcheck(backward, (torch.ones_like(out), grad_lse, *tensors, *arguments[3:]))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("is_by_token", [False, True])
def test_a_short_sequence_in_one_call_comes_back_in_the_declared_layout(is_by_token: bool) -> None:
    tensors = [tensor.float() for tensor in random_tensors(batch=2, tokens=20, width=WIDTH)]
    if is_by_token:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    arguments = (*leaves, *gather_arguments(has_masks=False, dropout=0.0, may_be_whole=True)[3:])
    assert set(torch.library.opcheck(gather_attention, arguments).values()) == {"SUCCESS"}
    out, lse = gather_attention(*arguments)
    held = [tensor.detach() for tensor in (*leaves, out, lse)]
    backward = torch.ops.hf_sparse.gather_backward.default
    results = torch.library.opcheck(backward, (torch.ones_like(out), None, *held, *arguments[3:]))
    assert set(results.values()) == {"SUCCESS"}


def test_the_mask_operator_is_declared_as_it_behaves() -> None:
    query, key, _, *masks = gather_arguments(has_masks=True, dropout=0.0)[:8]
    pattern = gather_arguments(has_masks=False, dropout=0.0)[9]
    arguments = (query.detach(), key.detach(), *masks, pattern, 0, True, 0, HEADS, "all")
    assert set(torch.library.opcheck(draw_edges, arguments).values()) == {"SUCCESS"}
