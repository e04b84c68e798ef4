"""Bad input to the attention function: a clear error that names what came and what would do."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse import sparse_attention
from hf_sparse.segments import find_segments
from hf_sparse.shapes import check_attention_inputs, check_token_mask

BAND = hf_sparse.pattern("band", radius=2)
LONGFORMER = hf_sparse.pattern("longformer", window=4)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return query, key and value; one shape serves all three."""
    return [torch.zeros(shape, dtype=dtype) for shape in (shapes if len(shapes) == 3 else shapes * 3)]


def call(*inputs: Tensor, pattern: Any = BAND, **settings: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Call with small tensors unless others are given."""
    return sparse_attention(*(inputs or tensors((2, 2, 6, 4))), pattern, **settings)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 6, 4)] * 3, "query, key and value must be [batch, heads, tokens, width]; got query (2, 6, 4)"),
        ([(1, 2, 6, 4), (6, 4), (6, 4)], "must be [batch, heads, tokens, width]"),
        ([(2, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)], "batch, key heads, key tokens or width do not agree"),
        ([(1, 2, 6, 4), (1, 2, 6, 4), (1, 1, 6, 4)], "batch, key heads, key tokens or width do not agree"),
        ([(1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 5, 4)], "value (1, 2, 5, 4)"),
        ([(1, 2, 6, 4), (1, 2, 6, 3), (1, 2, 6, 4)], "batch, key heads, key tokens or width do not agree"),
        ([(1, 3, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)], "query heads must be a multiple of the number of key heads"),
        ([(1, 1, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)], "query heads must be a multiple of the number of key heads"),
        ([(1, 2, 6, 4), (1, 0, 6, 4), (1, 0, 6, 4)], "query heads must be a multiple of the number of key heads"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: list[tuple[int, ...]], message: str) -> None:
    inputs = tensors(*shapes)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*inputs)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_attention_inputs(*inputs)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16, torch.float32), (torch.int64,) * 3])
def test_dtypes_must_be_one_floating_dtype(dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = [tensor.to(dtype) for tensor, dtype in zip(tensors((1, 2, 6, 4)), dtypes, strict=True)]
    with pytest.raises(TypeError, match=f"must share one floating dtype; got {dtypes[0]}, {dtypes[1]}, {dtypes[2]}"):
        call(*inputs)


@pytest.mark.parametrize("pattern", ["band", None, {"key": "band"}])
def test_what_is_no_pattern_is_refused(pattern: object) -> None:
    with pytest.raises(TypeError, match=r"pattern must be a pattern such as hf_sparse.pattern\('band'\), got"):
        call(pattern=pattern)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_is_a_probability_below_one(dropout: float) -> None:
    with pytest.raises(ValueError, match=f"dropout must be at least 0 and below 1, got {dropout}"):
        call(dropout=dropout)


@pytest.mark.parametrize("backend", ["triton", "", "Dense"])
def test_an_unknown_backend_is_refused_with_the_known_ones(backend: str) -> None:
    with pytest.raises(ValueError, match=f"unknown backend '{backend}'; known: auto, dense, gather, flex, varlen"):
        call(backend=backend)


@pytest.mark.parametrize("name", ["key_padding_mask", "global_mask"])
@pytest.mark.parametrize("shape", [(6,), (2, 5), (1, 6), (2, 1, 1, 6)])
def test_a_token_mask_of_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    message = rf"{name} must have shape \[batch, tokens\] = \[2, 6\], got {re.escape(str(list(shape)))}"
    with pytest.raises(ValueError, match=message):
        call(pattern=LONGFORMER, **{name: torch.ones(shape, dtype=torch.bool)})


@pytest.mark.parametrize("name", ["key_padding_mask", "global_mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_token_mask_that_is_not_boolean_is_refused_with_the_way_out(name: str, dtype: torch.dtype) -> None:
    message = rf"{name} must be bool \(True = real or global\), got {dtype}; pass `{name} != 0`"
    with pytest.raises(TypeError, match=message):
        call(pattern=LONGFORMER, **{name: torch.ones(2, 6, dtype=dtype)})


@pytest.mark.parametrize("name", ["document_ids", "query_positions", "key_positions"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_positions_and_documents_must_be_integers(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer tensor, got {dtype}"):
        call(**{name: torch.ones(2, 6, dtype=dtype)})


@pytest.mark.parametrize("name", ["document_ids", "query_positions", "key_positions"])
def test_positions_and_documents_must_fit_the_tokens(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must have shape \[batch, tokens\] = \[2, 6\], got \[2, 7\]"):
        call(**{name: torch.ones(2, 7, dtype=torch.int64)})


@pytest.mark.parametrize("key", ["band", "dilated", "strided", "block_local", "random", "bigbird"])
def test_a_global_mask_that_a_pattern_would_ignore_is_refused(key: str) -> None:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    message = f"a global mask was given, but pattern '{key}' has no global tokens; use a union such as"
    with pytest.raises(ValueError, match=message):
        call(pattern=hf_sparse.pattern(key), global_mask=mask)
    assert isinstance(call(pattern=hf_sparse.pattern(key) | hf_sparse.pattern("global"), global_mask=mask), Tensor)


def test_more_queries_than_keys_need_positions() -> None:
    query, key = torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="6 queries over 5 keys need query_positions"):
        call(query, key, key)
    assert isinstance(call(query, key, key, query_positions=torch.arange(6)[None]), Tensor)


@pytest.mark.parametrize("name", [None, "query_positions", "key_positions"])
def test_documents_need_queries_that_are_the_keys(name: str | None) -> None:
    ids = torch.zeros(1, 6, dtype=torch.int64)
    key = torch.zeros(1, 2, 6, 4)
    query = key[:, :, :3] if name is None else key
    with pytest.raises(ValueError, match="document_ids cannot be used where the queries are not the keys"):
        call(query, key, key, document_ids=ids, **({name: torch.arange(6)[None]} if name else {}))


@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_the_tokens_of_a_document_stand_together(backend: str) -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="document_ids: the tokens of a document must stand together in a row"):
        call(document_ids=ids, backend=backend)
    with pytest.raises(ValueError, match="stand together"):
        find_segments(2, 6, document_ids=ids)


def test_a_layer_beyond_the_windows_is_refused() -> None:
    pattern = hf_sparse.pattern("longformer", window=(4, 8))
    with pytest.raises(ValueError, match="window has 2 entries, one a layer, but this is layer 2"):
        call(pattern=pattern, layer=2)


@pytest.mark.parametrize(("heads", "offset"), [(3, 0), (2, 1)])
def test_heads_beyond_those_of_the_pattern_are_refused(heads: int, offset: int) -> None:
    query = torch.zeros(1, heads, 6, 4)
    dilated = hf_sparse.pattern("longformer", window=4, dilation=(1, 2))
    with pytest.raises(ValueError, match="dilation has 2 entries, one a head, but there are 3 heads"):
        call(query, query, query, pattern=dilated, head_offset=offset)
    by_head = hf_sparse.by_head({0: BAND, 1: LONGFORMER})
    with pytest.raises(ValueError, match="by_head names 2 heads, but there are 3"):
        call(query, query, query, pattern=by_head, head_offset=offset)


@pytest.mark.parametrize(("name", "value"), [("layer", -1), ("head_offset", -1), ("num_heads", 1), ("num_heads", 0)])
def test_a_place_that_cannot_be_is_refused(name: str, value: int) -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=1)
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        call(pattern=pattern, **{name: value})


def test_a_state_needs_hidden_states() -> None:
    state = LONGFORMER.make_state(hidden_size=8, num_heads=2, num_key_value_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="state was given without hidden_states, which its projections read"):
        call(pattern=LONGFORMER, state=state)


def test_global_projections_refuse_cached_decoding() -> None:
    state = LONGFORMER.make_state(hidden_size=8, num_heads=2, num_key_value_heads=2, head_dim=4)
    key = torch.zeros(2, 2, 6, 4)
    message = "pattern 'longformer' with global projections cannot serve cached decoding; set global_projections=False"
    with pytest.raises(ValueError, match=message):
        call(key[:, :, -1:], key, key, pattern=LONGFORMER, state=state, hidden_states=torch.zeros(2, 6, 8))


@pytest.mark.parametrize(("n", "heads"), [(0, 1), (-1, 1), (4, 0)])
def test_a_drawing_needs_tokens_and_heads(n: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"n and heads must be at least 1, got n={n}, heads={heads}"):
        BAND.mask(n, heads=heads)


def test_checks_let_good_input_pass() -> None:
    check_attention_inputs(*tensors((1, 4, 6, 4), (1, 2, 9, 4), (1, 2, 9, 7)))
    check_token_mask(torch.ones(2, 3, dtype=torch.bool), "mask", batch=2, tokens=3)
    check_token_mask(torch.ones(2, 3, dtype=torch.int32), "ids", batch=2, tokens=3, is_boolean=False)
    assert isinstance(call(), Tensor)
