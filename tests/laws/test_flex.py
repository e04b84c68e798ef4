"""The ``flex`` backend, forward and uncompiled on the CPU: what it computes, what it compiles, what it refuses."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.backends import flex
from hf_sparse.backends.dense import draw_edges
from hf_sparse.backends.dropout import draw_words, mix, threshold
from hf_sparse.patterns import Pattern
from tests.pattern_cases import HEADS, IN_FLEX, Case, Setting, attention, case_name, case_of, sampled
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH = 4
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])


def both_results(pattern: Pattern, tensors: tuple[Tensor, ...], **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """Return output and logsumexp of flex and of dense."""
    return [attention(pattern, backend=name, return_lse=True, **settings)(*tensors) for name in ("flex", "dense")]


def check_equals_dense(pattern: Pattern, tensors: tuple[Tensor, ...], **settings: Any) -> None:
    """Compare output and logsumexp of flex with those of dense."""
    for actual, wanted in zip(*both_results(pattern, tensors, **settings), strict=True):
        assert_same_maths(actual, wanted, terms=tensors[1].shape[2] + WIDTH)


@both_ways
@pytest.mark.parametrize("n", [1, pytest.param(7, marks=pytest.mark.slow), 65])
@pytest.mark.parametrize("case", IN_FLEX, ids=case_name)
def test_outputs_equal_the_loop_oracle(case: Case, n: int, is_causal: bool) -> None:
    tensors = random_tensors(tokens=n, key_heads=2, width=WIDTH, value_width=3)
    results = attention(case.pattern, is_causal=is_causal, layer=1, backend="flex", return_lse=True)(*tensors)
    wanted = attend_by_rows(*tensors, case.mask(Setting(n, 1, is_causal))[None])
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


@both_ways
@pytest.mark.parametrize("n", [pytest.param(130, marks=pytest.mark.slow), 300])
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_longer_outputs_equal_dense(case: Case, n: int, is_causal: bool) -> None:
    check_equals_dense(case.pattern, random_tensors(tokens=n, key_heads=2, width=WIDTH), is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_padding_documents_and_global_masks_equal_dense(case: Case, is_causal: bool) -> None:
    n, column = 90, torch.arange(90)
    tensors = random_tensors(batch=4, tokens=n, key_heads=2, width=WIDTH)
    real = torch.stack([column >= 31, column < 50, column % 7 > 1, column < 0])
    documents = torch.stack([column // 90, column // 40, (column - 13) // 13, column // 60 - 1])
    is_global = torch.stack([column == 33, column % 30 == 8, column < 0, column == 2])
    globals_ = {"global_mask": is_global} if case.pattern.has_global_tokens else {}
    for masks in ({"key_padding_mask": real}, {"document_ids": documents}):
        check_equals_dense(case.pattern, tensors, is_causal=is_causal, **masks, **globals_)


@both_ways
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_cached_decoding_equals_dense(case: Case, is_causal: bool) -> None:
    query, key, value = random_tensors(batch=2, tokens=70, key_heads=2, width=WIDTH)
    real = torch.ones(2, 70, dtype=torch.bool)
    real[0, :9] = False
    globals_ = {"global_mask": real & (torch.arange(70) % 30 == 10)} if case.pattern.has_global_tokens else {}
    settings: dict[str, Any] = {"is_causal": is_causal, "key_padding_mask": real, **globals_}
    for last in (1, 13):
        check_equals_dense(case.pattern, (query[:, :, -last:], key, value), **settings)
    # a kept subset of the keys, in another order
    kept = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:40].expand(2, -1)
    positions = {"query_positions": torch.tensor([[69, 3]]).expand(2, -1), "key_positions": kept}
    check_equals_dense(
        case.pattern, (query[:, :, :2], key[:, :, :40], value[:, :, :40]), is_causal=is_causal, **positions
    )


@both_ways
def test_global_projections_equal_dense(is_causal: bool) -> None:
    pattern = hf_sparse.pattern("longformer", window=4, global_tokens=(0, 9))
    torch.manual_seed(0)
    state = pattern.make_state(hidden_size=6, num_heads=HEADS, num_key_value_heads=2, head_dim=WIDTH)
    assert isinstance(state, nn.Module)
    given: dict[str, Any] = {
        "state": state.double(),
        "hidden_states": torch.randn(2, 33, 6, dtype=torch.float64),
        "is_causal": is_causal,
    }
    with torch.no_grad():
        check_equals_dense(pattern, random_tensors(batch=2, tokens=33, key_heads=2, width=WIDTH), **given)
        is_global = torch.arange(33).expand(2, -1) == torch.tensor([[5], [32]])
        given["global_mask"] = is_global
        check_equals_dense(pattern, random_tensors(batch=2, tokens=33, key_heads=2, width=WIDTH), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_rounding_is_no_worse_than_dense_torch(case: Case, dtype: torch.dtype) -> None:
    tensors = tuple(tensor.to(dtype) for tensor in random_tensors(tokens=65, width=WIDTH))
    mask = case.mask(Setting(65))[None]
    oracle, oracle_lse = attend_by_rows(*tensors, mask)
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask).nan_to_num()
    out, lse = attention(case.pattern, backend="flex", return_lse=True)(*tensors)
    assert_within_rounding(out, oracle, dense)
    assert lse.dtype == torch.float32
    assert torch.equal(lse == float("-inf"), oracle_lse == float("-inf"))


def kept_pairs(seed: int, batch: int, n: int, p: float) -> Tensor:
    """Return the pairs that dropout keeps under a seed: bool ``[B, H, N, N]``."""
    torch.manual_seed(seed)
    words = draw_words(torch.randint(0, 2**62, (1,)), batch, HEADS, n, n, torch.device("cpu"))
    return mix(words[0][..., :, None], words[1]) < threshold(p)


@both_ways
@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_dropout_equals_the_oracle_with_the_draw_replayed(case: Case, is_causal: bool) -> None:
    n, p, seed = 40, 0.3, 123
    tensors = random_tensors(batch=2, tokens=n, key_heads=2, width=WIDTH)
    mask = case.mask(Setting(n, 0, is_causal))[None].expand(2, -1, -1, -1)
    multiplier = kept_pairs(seed, 2, n, p).double() / (1 - p)
    wanted = attend_by_rows(*tensors, mask, multiplier=multiplier)
    torch.manual_seed(seed)
    results = attention(case.pattern, is_causal=is_causal, backend="flex", dropout=p, return_lse=True)(*tensors)
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


@pytest.mark.parametrize("case", sampled(IN_FLEX))
def test_values_that_are_the_identity_show_the_draw(case: Case) -> None:
    n, p, seed = 40, 0.4, 5
    query, key, _ = random_tensors(batch=2, tokens=n, key_heads=2, width=WIDTH)
    identity = torch.eye(n, dtype=torch.float64).expand(2, 2, -1, -1)
    torch.manual_seed(seed)
    dropped = attention(case.pattern, backend="flex", dropout=p)(query, key, identity)
    assert torch.equal(dropped > 0, case.mask(Setting(n))[None] & kept_pairs(seed, 2, n, p))


@pytest.mark.parametrize("p", [1e-9, 0.999])
def test_the_smallest_and_largest_chance_work(p: float) -> None:
    tensors = random_tensors(batch=2, tokens=65, width=WIDTH)
    is_real = torch.arange(65).expand(2, -1) < torch.tensor([[65], [20]])
    attend = attention(hf_sparse.pattern("band", radius=3), backend="flex", key_padding_mask=is_real)
    out = attend(*tensors, dropout=p)
    assert out.isfinite().all()
    assert not out[1, :, 20:].any()
    if p < 0.5:
        assert_same_maths(out, attend(*tensors) / (1 - p), terms=65 + WIDTH)


class Counting:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Compile on the CPU as is done on CUDA, but for the code of the kernel, and count."""
    counting = Counting()
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "run_plainly", functools.partial(flex.run_compiled, backend=counting))
    return counting


def masks_of(case: Case, batch: int, n: int, kind: int) -> dict[str, Tensor]:
    """Return no masks, or padding, documents and global tokens that differ by row and kind."""
    column, row = torch.arange(n), torch.arange(batch)[:, None]
    masks: dict[str, Tensor] = {}
    if kind in (1, 3):
        masks["key_padding_mask"] = (column >= 5 * row) & (column < n - 3 * kind)
    if kind in (2, 3):
        masks["document_ids"] = column // (20 * kind + row)
    if kind and case.pattern.has_global_tokens:
        masks["global_mask"] = (column + row) % 50 == 9 * kind
    return masks


@pytest.mark.parametrize(
    ("name", "p"),
    [
        ("longformer", 0.2),
        pytest.param("by_head", 0.0, marks=pytest.mark.slow),
        *(
            pytest.param(name, 0.2, marks=pytest.mark.slow)
            for name in ("band", "bigbird_published", "union_of_all_atoms")
        ),
    ],
)
def test_one_graph_serves_lengths_batches_padding_documents_and_globals(
    name: str, p: float, counting: Counting
) -> None:
    case = case_of(name)
    attend = attention(case.pattern, is_causal=True, backend="flex", dropout=p)
    dense = attention(case.pattern, is_causal=True, backend="dense")
    # dropout takes two graphs: one that drops, and one for the logsumexp alone
    graphs = 2 if p else 1
    for n, batch, kind in ((300, 2, 0), (150, 2, 1), (400, 3, 2), (129, 5, 3), (300, 2, 3)):
        tensors = random_tensors(batch=batch, tokens=n, key_heads=2, width=WIDTH)
        masks = masks_of(case, batch, n, kind)
        out = attend(*tensors, **masks)
        if not p:
            assert_same_maths(out, dense(*tensors, **masks), terms=n + WIDTH)
        assert counting.graphs == graphs
    # torch takes sizes of 1 for constants: one block of keys, one row, one token
    for n, batch in ((100, 2), (20, 3), (300, 1), (1, 2)):
        attend(*random_tensors(batch=batch, tokens=n, key_heads=2, width=WIDTH))
    assert counting.graphs <= 4 * graphs


def test_one_graph_serves_every_layer_and_every_number_of_a_pattern(counting: Counting) -> None:
    tensors = random_tensors(tokens=300, batch=2, width=WIDTH)
    windows = case_of("longformer_window_by_layer").pattern
    for layer in (0, 1):
        check_equals_dense(windows, tensors, layer=layer)
    for pattern in (hf_sparse.pattern("longformer", window=512), hf_sparse.pattern("longformer", window=8, dilation=3)):
        check_equals_dense(pattern, tensors)
    assert counting.graphs == 1


def test_another_scale_takes_another_graph_in_which_it_is_a_constant(counting: Counting) -> None:
    attend = attention(hf_sparse.pattern("band", radius=3), backend="flex")
    tensors = random_tensors(tokens=20, batch=2, width=WIDTH)
    for scale in (0.3, 0.7, 0.3, 0.7):
        attend(*tensors, scale=scale)
    assert counting.graphs == 2


@pytest.mark.parametrize("p", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize(
    "name", ["longformer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("band", "by_head"))]
)
def test_gradients_equal_an_explicit_softmax(name: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch refuses gradients on the CPU, but has the formulae of the backward pass in plain operations
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "check_served", lambda *_: None)
    monkeypatch.setattr(flex, "run_plainly", functools.partial(flex.run_compiled, backend="aot_eager"))
    case, n, seed = case_of(name), 150, 3
    masks = masks_of(case, 2, n, 3)
    query, key, value = random_tensors(batch=2, tokens=n, key_heads=2, width=WIDTH)
    held = [masks.get(name) for name in ("key_padding_mask", "global_mask", "document_ids")]
    mask = draw_edges(query, key, *held, None, None, case.pattern.json, 0, True, 0, HEADS, "all")
    multiplier = kept_pairs(seed, 2, n, p).double() / (1 - p)

    def explicit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        is_empty = ~mask.any(-1, keepdim=True)
        scores = (q @ k.transpose(2, 3) * WIDTH**-0.5).masked_fill(~mask, float("-inf")).masked_fill(is_empty, 0.0)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp().masked_fill(is_empty, 0.0) * multiplier
        return weights @ v, lse.masked_fill(is_empty, float("-inf"))[..., 0]

    def attend(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return attention(case.pattern, is_causal=True, backend="flex", dropout=p, return_lse=True, **masks)(*leaves)

    results, wanted = (with_gradients(function, (query, key, value)) for function in (attend, explicit))
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


def call(**settings: Any) -> Tensor:
    """Attend along a band."""
    tensors = settings.pop("tensors", random_tensors(tokens=9, width=WIDTH))
    return attention(hf_sparse.pattern("band", radius=2), backend="flex", **settings)(*tensors)


def test_a_gradient_on_the_cpu_is_refused() -> None:
    leaves = [tensor.requires_grad_() for tensor in random_tensors(tokens=9, width=WIDTH)]
    with pytest.raises(ValueError, match="backend 'flex' has no gradient on the cpu; pass backend='gather'"):
        call(tensors=leaves)
    with torch.no_grad():
        assert torch.equal(call(tensors=leaves), call())


@pytest.mark.parametrize(("name", "value"), [("bias", torch.zeros(9)), ("softcap", 1.0), ("sinks", torch.zeros(HEADS))])
def test_terms_of_the_scores_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"backend 'flex' does not serve {name}; pass backend='auto'"):
        call(**{name: value})


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="backend 'flex' runs on cuda and, uncompiled, on the cpu, not on meta"):
        call(tensors=[tensor.to("meta") for tensor in random_tensors(tokens=9, width=WIDTH)])


def test_autocast_changes_nothing() -> None:
    tensors = [tensor.float() for tensor in random_tensors(tokens=9, width=WIDTH)]
    with torch.autocast("cpu", torch.bfloat16):
        out = call(tensors=tensors)
    assert out.dtype == torch.float32
    assert torch.equal(out, call(tensors=tensors))


def test_a_compiled_model_breaks_its_graph_there_and_goes_on() -> None:
    torch._dynamo.reset()
    tensors = random_tensors(tokens=9, width=WIDTH)
    attend = attention(hf_sparse.pattern("band", radius=2), backend="flex")
    compiled = torch.compile(lambda q, k, v: attend(q + 1, k, v) * 2, backend="eager")
    assert torch.equal(compiled(*tensors), attend(tensors[0] + 1, *tensors[1:]) * 2)
