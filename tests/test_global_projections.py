"""Rows of Longformer's global tokens have projections of their own: their queries, and the keys and values of all tokens."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.patterns import Pattern
from tests.pattern_cases import BACKENDS, attention
from tests.support import rules
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
N, HEADS, KEY_HEADS, WIDTH, HIDDEN = 33, 4, 2, 4, 6
LONGFORMER = hf_sparse.pattern("longformer", window=4, global_tokens=(0, 9))
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])


def state_of(pattern: Pattern = LONGFORMER) -> nn.Module:
    """Return drawn projections in float64."""
    torch.manual_seed(0)
    made = pattern.make_state(hidden_size=HIDDEN, num_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=WIDTH)
    assert made is not None
    return made.double()


def hidden_states(batch: int = 1) -> Tensor:
    """Return what the attention layer was given."""
    return torch.randn(batch, N, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def tensors(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of the layer's own projections."""
    return random_tensors(batch=batch, tokens=N, heads=HEADS, key_heads=KEY_HEADS, width=WIDTH)


def project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a projection, one head after another: ``[B, heads, N, WIDTH]``."""
    heads = [slice(first, first + WIDTH) for first in range(0, len(weight), WIDTH)]
    return torch.stack([hidden @ weight[head].T + bias[head] for head in heads], 1)


def oracle(mask: Tensor, is_global: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Attend twice by loops and take the rows of global tokens from the second.

    Args:
        mask: bool ``[B, H, N, N]``.
        is_global: bool ``[B, N]``.
        inputs: query, key, value, hidden states, then weight and bias of the global query, key and value.
    """
    query, key, value, hidden, *weights = inputs
    own = attend_by_rows(query, key, value, mask)
    global_query, global_key, global_value = (
        project(hidden, weight, bias) for weight, bias in zip(weights[::2], weights[1::2], strict=True)
    )
    rows = attend_by_rows(global_query, global_key, global_value, mask)
    at = is_global[:, None]
    return torch.where(at[..., None], rows[0], own[0]), torch.where(at, rows[1], own[1])


def run(pattern: Pattern, settings: dict[str, Any], *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """Call with a state that holds the given weights; inputs as for the oracle."""
    query, key, value, hidden, *weights = inputs
    state = state_of()
    names = [name for name, _ in state.named_parameters()]
    call = functools.partial(attention(pattern, hidden_states=hidden, return_lse=True), query, key, value)

    class Held(nn.Module):
        def forward(self, given: Tensor) -> Any:
            return torch.func.functional_call(state, dict(zip(names, weights, strict=True)), (given,))

        def finish(self, rows: Tensor) -> Tensor:
            return rows

    return call(state=Held(), **settings)


def check(pattern: Pattern, mask: Tensor, is_global: Tensor, settings: dict[str, Any]) -> None:
    """Compare with the oracle: outputs, logsumexp, gradients of inputs, hidden states and weights."""
    batch = len(mask)
    inputs = [*tensors(batch), hidden_states(batch), *(weight.detach() for weight in state_of().parameters())]
    wanted = with_gradients(functools.partial(oracle, mask, is_global), inputs)
    actual = with_gradients(functools.partial(run, pattern, settings), inputs)
    for one, other in zip(actual, wanted, strict=True):
        # a weight's gradient sums over all tokens as well
        assert_same_maths(one, other, terms=2 * batch * N + HIDDEN)


@both_backends
@both_ways
def test_global_rows_use_projections_of_their_own(is_causal: bool, backend: str) -> None:
    mask = rules.draw(rules.longformer(4, (0, 9)), N, heads=HEADS, is_causal=is_causal)[None]
    is_global = torch.zeros(1, N, dtype=torch.bool)
    is_global[0, [0, 9]] = True
    check(LONGFORMER, mask, is_global, {"is_causal": is_causal, "backend": backend})


@both_backends
def test_global_rows_differ_by_sample_and_skip_padding(backend: str) -> None:
    is_real = torch.ones(3, N, dtype=torch.bool)
    is_real[0, :5] = is_real[1, 28:] = False
    is_global = torch.zeros(3, N, dtype=torch.bool)
    is_global[0, [5, 20]] = is_global[1, [0, 1, 2]] = True
    mask = rules.draw_batch(
        lambda n, positions: rules.draw(rules.longformer(4, positions or ()), n, heads=HEADS),
        batch=3,
        tokens=N,
        heads=HEADS,
        key_padding_mask=is_real,
        global_mask=is_global,
    )
    settings = {"key_padding_mask": is_real, "global_mask": is_global, "backend": backend}
    check(LONGFORMER, mask, is_global, settings)


@both_backends
def test_a_window_over_everything_leaves_global_rows_their_projections(backend: str) -> None:
    mask = torch.ones(1, HEADS, N, N, dtype=torch.bool)
    is_global = torch.zeros(1, N, dtype=torch.bool)
    is_global[0, [0, 9]] = True
    check(LONGFORMER.wide_open(N), mask, is_global, {"backend": backend})


@both_backends
def test_copies_of_the_layers_own_projections_change_nothing(backend: str) -> None:
    state, hidden = state_of(), hidden_states()
    own = tuple(tensor.detach() for tensor in state(hidden))
    attend = functools.partial(attention(LONGFORMER, backend=backend), *own)
    with_state = attend(state=state, hidden_states=hidden)
    assert_same_maths(with_state, attend(), terms=N + HIDDEN)


@both_backends
def test_unused_projections_still_get_a_gradient_of_zero(backend: str) -> None:
    state = state_of()
    pattern = hf_sparse.pattern("longformer", window=4)
    attend = functools.partial(attention(pattern, backend=backend), *tensors())
    out = attend(state=state, hidden_states=hidden_states())
    assert torch.equal(out, attend())
    gradients = torch.autograd.grad(out.sum(), list(state.parameters()))
    assert not any(gradient.any() for gradient in gradients)


@both_backends
def test_global_blocks_of_another_member_stay_when_longformer_has_no_global_token(backend: str) -> None:
    pattern = hf_sparse.pattern("longformer", window=4) | hf_sparse.pattern("bigbird", block_size=4)
    attend = functools.partial(attention(pattern, backend=backend), *tensors())
    out = attend(state=state_of(), hidden_states=hidden_states())
    assert_same_maths(out, attend(), terms=N + WIDTH)


@both_backends
def test_heads_without_longformer_keep_the_layers_own_projections(backend: str) -> None:
    pattern = hf_sparse.by_head({(0, 1): LONGFORMER, (2, 3): hf_sparse.pattern("bigbird", block_size=4)})
    attend = functools.partial(attention(pattern, backend=backend), *tensors())
    with_state, plain = attend(state=state_of(), hidden_states=hidden_states()), attend()
    assert_same_maths(with_state[:, 2:], plain[:, 2:], terms=N + WIDTH)
    assert not torch.equal(with_state[:, :2, [0, 9]], plain[:, :2, [0, 9]])


@both_backends
def test_rows_that_another_member_makes_global_keep_the_layers_own_projections(backend: str) -> None:
    pattern = hf_sparse.pattern("longformer", window=4, global_tokens=(9,)) | hf_sparse.pattern("bigbird", block_size=4)
    attend = functools.partial(attention(pattern, backend=backend), *tensors())
    with_state, plain = attend(state=state_of(), hidden_states=hidden_states()), attend()
    others = torch.arange(N) != 9
    assert_same_maths(with_state[:, :, others], plain[:, :, others], terms=N + WIDTH)
    assert not torch.equal(with_state[:, :, 9], plain[:, :, 9])
