"""Rows of Star's relays have query, key, value and output projections of their own, which start as the layer's."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

import hf_sparse
from hf_sparse.global_rows import FewRows
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.projections import RelayProjections
from tests.pattern_cases import BACKENDS, attention
from tests.support import system_rules
from tests.support.gradients import with_gradients
from tests.support.models import tiny_batch, tiny_model
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
# so wide that the projections of relays are folded
HEADS, KEY_HEADS, WIDTH, HIDDEN, RELAYS = 4, 2, 3, 16, 2
STAR = hf_sparse.pattern("star", num_relays=RELAYS)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Layer(nn.Module):
    """An attention call whose state is a module of its own, so that its weights can be given from outside."""

    def __init__(self, pattern: Pattern, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"num_heads": HEADS, "num_key_value_heads": KEY_HEADS, "head_dim": WIDTH}
        self.state = pattern.make_state(hidden_size=HIDDEN, **sizes).double()  # type: ignore[union-attr]
        self.attend = attention(pattern, return_lse=True, **settings)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Any:
        return self.attend(query, key, value, hidden_states=hidden, state=self.state)

    def given(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, *weights: Tensor) -> Any:
        """Call with the weights of the state given."""
        named = dict(zip((name for name, _ in self.named_parameters()), weights, strict=True))
        return torch.func.functional_call(self, named, (query, key, value, hidden))


def project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a projection, one head after another: ``[B, heads, N, WIDTH]``."""
    heads = [slice(first, first + WIDTH) for first in range(0, len(weight), WIDTH)]
    return torch.stack([hidden @ weight[head].T + bias[head] for head in heads], 1)


def oracle(mask: Tensor, relays: Sequence[int], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Attend by loops, and by the projections of their own for the rows of relays.

    Args:
        mask: bool ``[B, H, N, N]``.
        relays: where they stand.
        inputs: query, key, value, hidden states, then weight and bias of the relays' query, key, value and output.
    """
    query, key, value, hidden, *weights = inputs
    out, lse = attend_by_rows(query, key, value, mask)
    projected = (project(hidden, w, b) for w, b in zip(weights[:6:2], weights[1:6:2], strict=True))
    rows, row_lse = attend_by_rows(*projected, mask)
    merged = torch.cat(list(rows.unbind(1)), 2)
    added = merged @ weights[6].T + weights[7]
    rows = torch.stack([(merged + added)[..., WIDTH * h : WIDTH * (h + 1)] for h in range(HEADS)], 1)
    is_relay = torch.zeros(mask.shape[0], HEADS, mask.shape[2], dtype=torch.bool)
    is_relay[:, :, list(relays)] = True
    is_relay &= row_lse > float("-inf")
    return torch.where(is_relay[..., None], rows, out), torch.where(is_relay, row_lse, lse)


def inputs_of(n: int, batch: int, layer: Layer) -> list[Tensor]:
    """Return query, key, value, hidden states and drawn weights."""
    total = n + RELAYS
    drawn = torch.Generator().manual_seed(3)
    hidden = torch.randn(batch, total, HIDDEN, dtype=torch.float64, generator=drawn)
    weights = [torch.randn(p.shape, dtype=torch.float64, generator=drawn) / 2 for p in layer.parameters()]
    tensors = random_tensors(batch=batch, tokens=total, heads=HEADS, key_heads=KEY_HEADS, width=WIDTH)
    return [*tensors, hidden, *weights]


@both_backends
@pytest.mark.parametrize("n", [1, 7, 40])
def test_outputs_and_gradients_equal_the_loop_oracle(n: int, backend: str) -> None:
    layer = Layer(STAR, backend=backend)
    inputs = inputs_of(n, 1, layer)
    mask = system_rules.star(n, num_relays=RELAYS).expand(1, HEADS, -1, -1)
    wanted = with_gradients(functools.partial(oracle, mask, range(n, n + RELAYS)), inputs)
    for one, other in zip(with_gradients(layer.given, inputs), wanted, strict=True):
        assert_same_maths(one, other, terms=2 * (n + RELAYS) + HIDDEN)


@both_backends
def test_rows_of_a_padded_batch_equal_rows_alone(backend: str) -> None:
    n, stretches = 30, [(0, 30), (0, 23), (11, 30), (5, 6)]
    is_real = torch.zeros(4, n + RELAYS, dtype=torch.bool)
    for row, (start, stop) in enumerate(stretches):
        is_real[row, start:stop] = True
    layer = Layer(STAR, backend=backend, key_padding_mask=is_real)
    inputs = inputs_of(n, 4, layer)
    mask = torch.zeros(4, HEADS, n + RELAYS, n + RELAYS, dtype=torch.bool)
    for row, (start, stop) in enumerate(stretches):
        at = torch.tensor([*range(start, stop), n, n + 1])
        mask[row, :, at[:, None], at] = system_rules.star(stop - start, num_relays=RELAYS)
    wanted = with_gradients(functools.partial(oracle, mask, (n, n + 1)), inputs)
    for one, other in zip(with_gradients(layer.given, inputs), wanted, strict=True):
        assert_same_maths(one, other, terms=8 * (n + RELAYS) + HIDDEN)


def test_relays_are_few_enough_to_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    put = FewRows.put
    seen: list[int] = []
    monkeypatch.setattr(FewRows, "put", lambda self, *args, **kwargs: seen.append(1) or put(self, *args, **kwargs))
    layer = Layer(STAR)
    layer.given(*inputs_of(7, 1, layer))
    assert seen == [1]


def test_dropout_falls_on_the_same_pairs_on_each_backend() -> None:
    outputs = []
    for backend in BACKENDS:
        layer = Layer(STAR, backend=backend, dropout=0.4)
        torch.manual_seed(7)
        outputs.append(layer.given(*inputs_of(40, 1, layer))[0])
    assert not torch.allclose(outputs[0], Layer(STAR).given(*inputs_of(40, 1, layer))[0])
    for other in outputs[1:]:
        assert_same_maths(other, outputs[0], terms=80)


@both_backends
def test_relays_of_a_causal_call_use_the_layers_projections(backend: str) -> None:
    layer = Layer(STAR, backend=backend, is_causal=True)
    inputs = inputs_of(20, 1, layer)
    mask = system_rules.star(20, num_relays=RELAYS, is_causal=True).expand(1, HEADS, -1, -1)
    wanted = attend_by_rows(*inputs[:3], mask)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out, lse = layer.given(*leaves)
    for one, other in zip((out, lse), wanted, strict=True):
        assert_same_maths(one.detach(), other, terms=40)
    # distributed training waits for a gradient of every weight
    assert all(g is not None and not g.any() for g in torch.autograd.grad(out.sum(), leaves[4:]))


def test_without_a_state_or_without_the_field_relays_share_the_layers_projections() -> None:
    tensors = random_tensors(tokens=22, heads=HEADS, key_heads=KEY_HEADS, width=WIDTH)
    plain = hf_sparse.pattern("star", num_relays=RELAYS, relay_projections=False)
    assert plain.make_state(hidden_size=HIDDEN, num_heads=1, num_key_value_heads=1, head_dim=6) is None
    assert torch.equal(attention(STAR)(*tensors), attention(plain)(*tensors))


def states(model: Any) -> list[RelayProjections]:
    return [module for module in model.modules() if isinstance(module, RelayProjections)]


def test_a_converted_checkpoint_starts_with_copies(tmp_path: Path) -> None:
    tiny_model("Bert").save_pretrained(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "own", STAR)
    hf_sparse.convert(
        tmp_path / "dense", tmp_path / "shared", hf_sparse.pattern("star", num_relays=RELAYS, relay_projections=False)
    )
    model, found = AutoModel.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not found["missing_keys"]
    shared = AutoModel.from_pretrained(tmp_path / "shared")
    assert len(states(model)) == model.config.num_hidden_layers
    for state, layer in zip(states(model), model.encoder.layer, strict=True):
        for name in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                own, copied = (getattr(getattr(x, name), kind) for x in (layer.attention.self, state))
                assert torch.equal(own, copied)
        assert not state.output.weight.any()
        assert not state.output.bias.any()
    with torch.no_grad():
        outputs = [x.eval()(**tiny_batch(40)).last_hidden_state for x in (model, shared)]
        assert torch.allclose(*outputs, atol=1e-5)
        # what a relay reads on the last layer, no token ever reads
        first = states(model)[0]
        for weight in (first.query.weight, first.output.weight):
            kept = weight.clone()
            nn.init.normal_(weight)
            assert not torch.allclose(model(**tiny_batch(40)).last_hidden_state, outputs[0], atol=1e-3)
            weight.copy_(kept)


def test_a_trained_output_projection_is_one_of_the_relays_own(tmp_path: Path) -> None:
    """With ``output``, the layer's output projection W gives relays W (x + M x + m) + b, and tokens what it gave before."""
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), STAR).eval()
    seen: dict[str, Tensor] = {}
    own, dense = model.encoder.layer[0].attention.self, model.encoder.layer[0].attention.output.dense
    dense.register_forward_pre_hook(lambda _, given: seen.update(given=given[0].detach()))
    with torch.no_grad():
        model(**tiny_batch(20))
        before = seen["given"]
        for parameter in own.sparse_state.output.parameters():
            nn.init.normal_(parameter)
        model(**tiny_batch(20))
        after, output = seen["given"], own.sparse_state.output
        wanted = before[:, 20:] + before[:, 20:] @ output.weight.T + output.bias
    assert torch.equal(before[:, :20], after[:, :20])
    assert torch.allclose(after[:, 20:], wanted, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pairs = [x(**tiny_batch(20)).last_hidden_state for x in (model, again)]
    assert torch.equal(*pairs)
