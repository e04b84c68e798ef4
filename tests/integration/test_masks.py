"""What reaches the attention function: padding on either side, packing, and forms that cannot be honoured."""

from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.integration.mask import SparseMask, sparse_mask
from tests.support.models import FAMILIES, tiny_batch, tiny_model
from tests.support.zoo import tiny_of_type

PATTERN = hf_sparse.pattern("band", radius=3) | hf_sparse.pattern("global")


def hidden(model: PreTrainedModel, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


def assert_equal_to_rounding(one: Tensor, other: Tensor) -> None:
    """Allow what two orders of float32 sums over 32 wide states may differ by."""
    assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * other.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(family: str, side: str) -> None:
    model = hf_sparse.sparsify_(tiny_model(family), PATTERN)
    batch = tiny_batch(side=side)
    real = batch["attention_mask"].bool()
    alone = batch["input_ids"][-1:, real[-1]]
    if family in ("Bert", "DistilBert", "Electra"):
        # these count positions from the left edge; where the tokens stand is given to them
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        kept = {"position_ids": positions} if family != "DistilBert" else {}
        if family == "DistilBert" and side == "left":
            pytest.skip("DistilBert takes no position_ids, so the dense model itself moves with left padding")
    else:
        kept = {}
    padded = hidden(model, **batch, **kept)[-1:, real[-1]]
    assert_equal_to_rounding(padded, hidden(model, input_ids=alone))


def test_packed_documents_equal_separate_ones() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    ids = tiny_batch(30, rows=1, padding=0)["input_ids"]
    lengths = (11, 4, 15)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    separate = torch.cat([hidden(model, input_ids=part) for part in ids.split(lengths, 1)], 1)
    # told, and read from the restarts of the positions
    told = hidden(model, input_ids=ids, position_ids=positions, document_ids=documents)
    read = hidden(model, input_ids=ids, position_ids=positions)
    assert_equal_to_rounding(told, separate)
    assert torch.equal(read, told)
    bled = hidden(model, input_ids=ids, position_ids=positions, document_ids=torch.zeros_like(documents))
    assert (bled - separate).abs().max() > 0.01


def test_positions_that_only_look_packed_are_one_document() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    ids = tiny_batch(12, rows=1, padding=0)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 7, 8, 9, 10, 3, 4, 5, 6]])
    one = torch.zeros_like(ids)
    assert torch.equal(
        hidden(model, input_ids=ids, position_ids=positions),
        hidden(model, input_ids=ids, position_ids=positions, document_ids=one),
    )


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_compiled_models_keep_packed_documents_apart(family: str) -> None:
    model = hf_sparse.sparsify_(tiny_model(family), PATTERN)
    ids = tiny_batch(30, rows=1, padding=0)["input_ids"]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for lengths in ((11, 4, 15), (30,)):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        separate = torch.cat([hidden(model, input_ids=part) for part in ids.split(lengths, 1)], 1)
        assert_equal_to_rounding(hidden(compiled, input_ids=ids, position_ids=positions), separate)
    torch._dynamo.reset()


# causal, and with sliding windows; dense layers beside sparse ones
@pytest.mark.parametrize(
    "model_type",
    ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mistral", "modernbert", "t5"))],
)
def test_a_compiled_model_is_one_graph_whatever_its_masks(model_type: str) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if model_type in ("gemma2", "modernbert") else {}
    layer = "encoder.0" if model_type == "t5" else 0
    model = hf_sparse.sparsify_(
        tiny_of_type(model_type, **kinds), hf_sparse.pattern("band", radius=3), layers={layer: "dense"}
    )
    ids = tiny_batch(30, rows=1, padding=0)["input_ids"] % 60
    given: dict[str, Any] = {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model_type == "t5" else {"use_cache": False}
    )
    packed = {**given, "position_ids": torch.arange(30)[None] % 12}
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    for inputs in (given,) if model_type == "t5" else (given, packed):
        with torch.no_grad():
            assert_equal_to_rounding(compiled(**inputs).logits, model(**inputs).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("positions", [[5, 6, 7, 0, 1, 2], [0, 1, 2, 0, 1, 1]])
def test_a_compiled_model_tells_documents_by_the_rule_of_a_plain_one(positions: list[int]) -> None:
    model: Any = hf_sparse.sparsify_(tiny_of_type("llama"), hf_sparse.pattern("band", radius=3))
    given = {"input_ids": torch.arange(10, 16)[None], "position_ids": torch.tensor([positions]), "use_cache": False}
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_equal_to_rounding(compiled(**given).logits, model(**given).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "pattern",
    [
        hf_sparse.pattern("bp_transformer", spans="pooled"),
        hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=1, random_plan="evaluation", length="padded"),
    ],
    ids=lambda pattern: pattern.key,
)
def test_ordinary_positions_are_no_packing_in_a_compiled_model(pattern: hf_sparse.Pattern) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), pattern)
    ids = tiny_batch(64, rows=1, padding=0)["input_ids"]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    positions = torch.arange(64)[None]
    assert_equal_to_rounding(hidden(compiled, input_ids=ids, position_ids=positions), hidden(model, input_ids=ids))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_decoder_writes_what_a_plain_one_writes() -> None:
    model: Any = hf_sparse.sparsify_(tiny_of_type("mistral"), hf_sparse.pattern("band", radius=3))
    given = {"input_ids": torch.arange(10, 20)[None], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    wanted = model.generate(**given, cache_implementation="static")
    torch._dynamo.reset()
    model.model.compile(backend="eager")
    assert torch.equal(model.generate(**given, cache_implementation="static", disable_compile=True), wanted)
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_part_of_a_model_keeps_packed_documents_apart(fullgraph: bool) -> None:
    model: Any = hf_sparse.sparsify_(tiny_of_type("llama"), hf_sparse.pattern("band", radius=3))
    ids = tiny_batch(30, rows=1, padding=0)["input_ids"] % 60
    packed = {"input_ids": ids, "position_ids": torch.arange(30)[None] % 12, "use_cache": False}
    wanted = hidden(model.model, **packed)
    torch._dynamo.reset()
    model.model.compile(backend="eager", fullgraph=fullgraph)
    assert_equal_to_rounding(hidden(model.model, **packed), wanted)
    with torch.no_grad():
        assert_equal_to_rounding(model(**packed).logits, model.lm_head(wanted))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_whose_nodes_documents_would_share_says_so_when_it_runs(backend: str) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("star"))
    ids = tiny_batch(30, rows=1, padding=0)["input_ids"]
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend)
    whole = torch.arange(30)[None]
    assert_equal_to_rounding(hidden(compiled, input_ids=ids, position_ids=whole), hidden(model, input_ids=ids))
    with pytest.raises(RuntimeError, match="position_ids say that rows are packed, which SparseBertModel cannot"):
        hidden(compiled, input_ids=ids, position_ids=whole % 15)
    torch._dynamo.reset()


def test_a_four_dimensional_mask_is_refused() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    batch = tiny_batch()
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 40, 40\) cannot be honoured.*2-D padding mask"):
        model(input_ids=batch["input_ids"], attention_mask=mask)


def test_an_additive_padding_mask_equals_the_two_dimensional_one() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    additive = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)[:, None, None]
    for form in (additive, real[:, None, None]):
        got = hidden(model, input_ids=batch["input_ids"], attention_mask=form)
        assert torch.equal(got[real], hidden(model, **batch)[real])
    with pytest.raises(ValueError, match="weights tokens cannot be honoured"):
        hidden(model, input_ids=batch["input_ids"], attention_mask=torch.full((2, 1, 1, 40), -0.5))


def test_a_global_mask_for_a_pattern_without_global_tokens_is_refused() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("band", radius=3))
    batch = tiny_batch()
    with pytest.raises(ValueError, match="'band' has no global tokens"):
        model(**batch, global_attention_mask=torch.zeros_like(batch["input_ids"]))


def test_a_global_mask_of_another_shape_is_refused() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    with pytest.raises(ValueError, match=r"global_attention_mask must have shape.*\[2, 40\], got \[2, 39\]"):
        model(**tiny_batch(), global_attention_mask=torch.zeros(2, 39))


def test_what_cannot_be_honoured_is_refused_by_name() -> None:
    sliding = sparse_mask(batch_size=1, q_length=4, kv_length=4, local_size=2)
    assert sliding.refusal == "the model's own sliding window or chunk of 2 tokens"
    foreign = sparse_mask(batch_size=1, q_length=4, kv_length=4, mask_function=lambda b, h, q, k: q >= k)
    assert foreign.refusal is not None
    assert "mask function" in foreign.refusal


def test_the_mask_moves_between_devices_as_accelerate_moves_batches() -> None:
    mask = SparseMask(torch.ones(1, 3, dtype=torch.bool), False, torch.zeros(1, 3, dtype=torch.int64))
    moved = send_to_device(mask, torch.device("meta"))
    assert isinstance(moved, SparseMask)
    assert moved.padding is not None
    assert moved.padding.device.type == "meta"
    assert moved.padding.dtype == torch.bool
    assert mask.to(torch.device("meta"), non_blocking=True).document_ids.device.type == "meta"  # type: ignore[union-attr]


def test_a_padding_mask_of_another_length_is_refused_by_its_name() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    with pytest.raises(ValueError, match=r"attention_mask must have shape.*\[2, 40\], got \[2, 39\]"):
        model(input_ids=tiny_batch()["input_ids"], attention_mask=torch.ones(2, 39))


@pytest.mark.parametrize("mask", [torch.ones(40), [1] * 40])
def test_a_global_mask_that_is_no_batch_is_refused(mask: Any) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    with pytest.raises(ValueError, match="global_attention_mask must be a tensor"):
        model(**tiny_batch(), global_attention_mask=mask)


def test_attention_weights_are_refused() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PATTERN)
    with pytest.raises(ValueError, match=r"keeps no attention weights.*eager"):
        model(**tiny_batch(), output_attentions=True)


def test_default_global_tokens_do_not_depend_on_how_the_input_is_given() -> None:
    model = hf_sparse.sparsify_(
        tiny_model("Bert", "ForSequenceClassification"), hf_sparse.pattern("longformer", window=4)
    )
    ids = tiny_batch(padding=0)["input_ids"]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits)
    asking = hf_sparse.sparsify_(tiny_model("Bert", "ForQuestionAnswering"), hf_sparse.pattern("longformer", window=4))
    with pytest.warns(UserWarning, match="do not show where the question ends"):
        asking(inputs_embeds=embeddings)
    padded, real = tiny_batch(), tiny_batch()["attention_mask"].bool()
    with torch.no_grad():
        four = asking(input_ids=padded["input_ids"], attention_mask=real[:, None, None, :]).start_logits
        assert torch.equal(four[real], asking(**padded).start_logits[real])
