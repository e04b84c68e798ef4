"""Training: the Trainer, gradient checkpointing, compilation, pipelines."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments, pipeline

import hf_sparse
from hf_sparse.integration import attention
from tests.support.models import FAMILIES, tiny_batch, tiny_model
from tests.support.zoo import tiny_of_type

LONGFORMER = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))
PATTERNS = (
    LONGFORMER,
    hf_sparse.pattern("bigbird", block_size=8, num_random_blocks=1),
    hf_sparse.pattern("band", radius=3),
)


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    out = model(**batch).to_tuple()[0]
    (out.float() ** 2).mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.key)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(pattern: Any, use_reentrant: bool) -> None:
    fields = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM", **fields), pattern).train()
    batch = tiny_batch()
    out, plain = loss_and_gradients(model, batch)
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    again, checkpointed = loss_and_gradients(model, batch)
    assert torch.equal(out, again)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_every_weight_gets_a_gradient_with_and_without_global_tokens() -> None:
    for pattern in (LONGFORMER, hf_sparse.pattern("longformer", window=8)):
        model = hf_sparse.sparsify_(tiny_model("Roberta", "ForMaskedLM"), pattern).train()
        _, gradients = loss_and_gradients(model, tiny_batch())
        assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.key)
def test_a_compiled_model_equals_the_plain_one_and_does_not_recompile_by_length(
    pattern: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM"), pattern)
    graphs = []

    def counting(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True, dynamic=True)
    # a compiled graph projects every token, where the plain call would fold the rows of a few global tokens
    monkeypatch.setattr("hf_sparse.attention.can_fold", lambda state: False)
    for tokens in (33, 40, 57, 64, 100):
        batch = tiny_batch(tokens)
        want, gradients = loss_and_gradients(model, batch)
        got, compiled_gradients = loss_and_gradients(compiled, batch)
        assert torch.equal(got, want)
        assert all(torch.equal(g, compiled_gradients[f"_orig_mod.{name}"]) for name, g in gradients.items())
    assert len(graphs) == 1


class Marked(Dataset[dict[str, Tensor]]):
    """Rows of ids in which the label is whether the first id is large, with a global mask of their own."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = tiny_batch(24, rows=1, padding=0, seed=index)
        ids, mask = batch["input_ids"][0], batch["attention_mask"][0]
        is_global = torch.zeros_like(ids)
        is_global[index % 5] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "global_attention_mask": is_global,
            "labels": (ids[0] > 30).long(),
        }


def test_the_trainer_keeps_the_global_mask_learns_and_reloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_sparse.sparsify_(
        tiny_model("Roberta", "ForSequenceClassification"), hf_sparse.pattern("longformer", window=8)
    )
    seen: list[Tensor] = []
    original = attention.sparse_attention

    def spying(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["global_mask"])
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "sparse_attention", spying)
    checkpointing = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=5e-3, logging_steps=1, save_steps=12,
        report_to=[], use_cpu=True, seed=0, **{checkpointing: True}, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Marked())
    trainer.train()
    assert seen
    assert all(int(mask.sum()) == mask.shape[0] for mask in seen)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12").eval()
    batch = tiny_batch()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_global_mask_stands_in_the_signature_of_every_head(family: str) -> None:
    import inspect

    for head in ("Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification"):
        model = hf_sparse.sparsify_(tiny_model(family, head), LONGFORMER)
        names = list(inspect.signature(model.forward).parameters)
        assert "global_attention_mask" in names
        assert "input_ids" in names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMultipleChoice", "ForQuestionAnswering"])
def test_a_head_marks_its_default_global_tokens(family: str, head: str) -> None:
    pattern = hf_sparse.pattern("longformer", window=4)
    model, batch = hf_sparse.sparsify_(tiny_model(family, head), pattern), tiny_batch()
    marked = torch.zeros_like(batch["input_ids"])
    marked[:, : 6 if head == "ForQuestionAnswering" else 1] = 1
    if head == "ForMultipleChoice":
        batch, marked = {key: value[None] for key, value in batch.items()}, marked[None]
    with torch.no_grad():
        default = model(**batch).to_tuple()[0]
        told = model(**batch, global_attention_mask=marked).to_tuple()[0]
        none = model(**batch, global_attention_mask=torch.zeros_like(marked)).to_tuple()[0]
    assert torch.equal(default, told)
    assert not torch.equal(default, none)


def test_a_question_without_a_known_separator_is_refused() -> None:
    model = tiny_model("Bert", "ForQuestionAnswering", sep_token_id=None, eos_token_id=None)
    hf_sparse.sparsify_(model, hf_sparse.pattern("longformer", window=4))
    with pytest.raises(ValueError, match=r"set model.config.sep_token_id"):
        model(**tiny_batch())


def test_a_sparse_model_can_be_copied_and_pickled() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), LONGFORMER)
    batch = tiny_batch()
    with torch.no_grad():
        want = model(**batch).last_hidden_state
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(**batch).last_hidden_state, want)


def test_half_precision_runs_and_stays_near_float32() -> None:
    batch = tiny_batch()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = hf_sparse.sparsify_(tiny_model("Bert"), LONGFORMER)(**batch).last_hidden_state[real]
        dense = tiny_model("Bert")(**batch).last_hidden_state[real]
        for dtype in (torch.bfloat16, torch.float16):
            got = hf_sparse.sparsify_(tiny_model("Bert").to(dtype), LONGFORMER)(**batch).last_hidden_state[real]
            theirs = tiny_model("Bert").to(dtype)(**batch).last_hidden_state[real]
            assert got.dtype == dtype
            # twice what the dense model loses in that precision
            assert (got.float() - want).abs().max() <= 2 * (theirs.float() - dense).abs().max()


def test_the_pipeline_runs_a_sparse_checkpoint(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[CLS]", "[PAD]", "[SEP]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(59))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=128
    )
    model = hf_sparse.sparsify_(
        tiny_model("Bert", "ForSequenceClassification"), hf_sparse.pattern("longformer", window=8)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    text = " ".join(f"w{i % 59}" for i in range(70))
    (answer,) = classify(text)
    with torch.no_grad():
        scores = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    assert answer["label"] == model.config.id2label[int(scores.argmax())]
    assert answer["score"] == pytest.approx(float(scores.max()), rel=1e-6)
    assert type(classify.model).__name__ == "SparseBertForSequenceClassification"


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.key)
def test_autocast_changes_neither_the_precision_inside_nor_the_gradient(pattern: Any) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 50, 8).bfloat16().requires_grad_() for _ in range(3))
    for backend in ("gather", "dense"):
        results = []
        for enabled in (False, True):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = hf_sparse.sparse_attention(query, key, value, pattern, dropout=0.2, backend=backend)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))])
        for plain, cast in zip(*results, strict=True):
            assert torch.equal(plain, cast)


def test_autocast_training_runs_with_dropout() -> None:
    fields = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM", **fields), PATTERNS[1]).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**tiny_batch()).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt_neox", "mistral", "phi3"])
def test_rotary_decoders_are_trained_under_autocast(model_type: str) -> None:
    dense, sparse = tiny_of_type(model_type).train(), tiny_of_type(model_type).train()
    # as wide as the text
    hf_sparse.sparsify_(sparse, hf_sparse.pattern("band", radius=63))
    ids = torch.arange(5, 45)[None]
    losses = []
    for model in (dense, sparse):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert abs(losses[1].item() - losses[0].item()) < 0.02 * losses[0].item()


PARKED = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))


def come_in(module: torch.nn.Module, call: Callable[[], Any]) -> list[Any]:
    """Let another thread make a call when a module next runs, before that is done; return a list that gets what it returns."""
    found: list[Any] = []

    def hook(*_: Any) -> None:
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(call).result())

    handle = module.register_forward_hook(hook)
    return found


def test_two_threads_run_one_model() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PARKED)
    batches = [tiny_batch(40, rows=2, seed=seed) for seed in range(2)]
    with torch.no_grad():
        wanted = [model(**batch).last_hidden_state for batch in batches]
        # between the layer and its attention function
        inside = model.encoder.layer[0].attention.self.query
        other = come_in(inside, lambda: model(**batches[1]).last_hidden_state)
        assert torch.equal(model(**batches[0]).last_hidden_state, wanted[0])
    assert torch.equal(other[0], wanted[1])


def test_threads_that_would_share_nodes_are_told_so() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("star"))
    batches = [tiny_batch(40, rows=2, seed=seed) for seed in range(2)]
    with torch.no_grad():
        wanted = model(**batches[1]).last_hidden_state
        other = come_in(model.embeddings.word_embeddings, lambda: model(**batches[1]).last_hidden_state)
        with pytest.raises(RuntimeError, match="two threads run a model with pattern 'star' at a time"):
            model(**batches[0])
        assert torch.equal(other[0], wanted)
        # and it goes on
        assert torch.equal(model(**batches[1]).last_hidden_state, wanted)


def test_a_pass_that_fails_leaves_the_nodes_of_another_thread_alone() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("star"))
    batch = tiny_batch(40)

    def fail() -> None:
        with pytest.raises(ValueError, match=r"needs a padding mask \[batch, tokens\]"):
            model(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 1, 40, dtype=torch.int64))

    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
        other = come_in(model.embeddings.word_embeddings, fail)
        assert torch.equal(model(**batch).last_hidden_state, wanted)
    assert other == [None]


def test_a_model_that_is_seen_dense_keeps_no_hidden_states() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), PARKED).train()
    model.set_attn_implementation("sdpa")
    model(**tiny_batch(40)).last_hidden_state.sum().backward()
    # what was kept with its graph could not be copied
    again = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch(40)).last_hidden_state, model.eval()(**tiny_batch(40)).last_hidden_state)
    assert not any(hasattr(module, "_sparse_hidden") for module in model.modules())
