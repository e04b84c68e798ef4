"""Tiny checkpoints and datasets of Python's manual for the recipes, and the arguments of a run."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BartConfig, BertConfig, GPT2Config, PreTrainedTokenizerFast, Trainer

import hf_sparse
from hf_sparse.recipes.arguments import RecipeArguments

LENGTH, DENSE = 256, 64
BART_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {"train": 16, "validation": 6, "test": 6}
TEXTS = [" ".join(re.findall(r"[A-Za-z]+[.,]?", topics[name])) for name in sorted(topics)]


def write_checkpoints(folder: Path) -> None:
    """Save a tiny BERT, GPT-2 and BART with a vocabulary of Python's manual, dense and converted."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXTS[:40], trainers.WordPieceTrainer(vocab_size=600, special_tokens=list(SPECIAL)))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **dict(zip(names, SPECIAL, strict=True)))
    tokenizer.model_max_length = DENSE
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=DENSE,
        # scores of random weights are else all about 0
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    gpt2 = GPT2Config(
        vocab_size=600,
        n_positions=DENSE,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    bart = BartConfig(
        vocab_size=600,
        d_model=32,
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIZES.items()},
        max_position_embeddings=DENSE,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    )
    dense = {
        "": transformers.BertForMaskedLM(config),
        "gpt2-": transformers.GPT2LMHeadModel(gpt2),
        "bart-": transformers.BartForConditionalGeneration(bart),
    }
    for prefix, model in dense.items():
        model.save_pretrained(folder / f"{prefix}dense")
        tokenizer.save_pretrained(folder / f"{prefix}dense")
        pattern = hf_sparse.pattern("longformer", window=32, global_tokens=(0,), global_projections=prefix == "")
        hf_sparse.convert(folder / f"{prefix}dense", folder / f"{prefix}sparse", pattern, max_length=LENGTH)


def write(folder: Path, make: Callable[[random.Random, int], dict[str, Any]]) -> str:
    """Write what ``make`` gives as JSON lines, a file for each split, and return the folder."""
    drawn = random.Random(0)
    folder.mkdir()
    for split, count in SIZES.items():
        lines = [json.dumps(make(drawn, i)) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def words_of(drawn: random.Random, most: int = 60) -> list[str]:
    """Return some words in a row of Python's manual."""
    words = drawn.choice(TEXTS).split()
    start = drawn.randrange(max(1, len(words) - most))
    return words[start : start + most]


def passage(drawn: random.Random, most: int = 60) -> str:
    return " ".join(words_of(drawn, most))


def labelled(drawn: random.Random, i: int) -> dict[str, Any]:
    return {"text": " ".join([passage(drawn, 40), *["true" if i % 2 else "false"] * 10]), "label": str(i % 2)}


def asked(drawn: random.Random, i: int) -> dict[str, Any]:
    before, name = passage(drawn, 30), drawn.choice(("module", "class", "object"))
    context = f"{before} the name is {name} here. {passage(drawn, 10)}"
    start = context.index(f"is {name} here") + 3
    return {"question": "what is the name", "context": context, "answers": {"text": [name], "answer_start": [start]}}


def tagged(drawn: random.Random, i: int) -> dict[str, Any]:
    words = words_of(drawn, 50)
    return {"tokens": words, "tags": ["B-NAME" if word[0].isupper() else "O" for word in words]}


def searched(drawn: random.Random, i: int) -> dict[str, Any]:
    words = words_of(drawn, 60)
    return {"text": " ".join(words), "queries": [{"query": " ".join(words[10 * k : 10 * k + 8])} for k in (1, 3)]}


def plain(drawn: random.Random, i: int) -> dict[str, Any]:
    return {"text": passage(drawn, 150)}


def summed_up(drawn: random.Random, i: int) -> dict[str, Any]:
    words = words_of(drawn, 60)
    return {"text": " ".join(words), "summary": " ".join(words[:5])}


TASKS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any], Any]] = {
    "classify": (labelled, {}, "AutoModelForSequenceClassification"),
    "answer": (asked, {}, "AutoModelForQuestionAnswering"),
    "tag": (tagged, {}, "AutoModelForTokenClassification"),
    "retrieve": (searched, {"query_column": "queries.query"}, "AutoModel"),
    "mlm": (plain, {}, "AutoModelForMaskedLM"),
    "clm": (plain, {}, "AutoModelForCausalLM"),
    "summarize": (summed_up, {"max_summary_length": 12}, "AutoModelForSeq2SeqLM"),
    "distill": (plain, {"teacher": "dense", "short_share": 1.0}, "AutoModelForMaskedLM"),
}


# which of the checkpoints a task takes
FAMILIES = {"clm": ("gpt2-", "SparseGPT2"), "summarize": ("bart-", "SparseBart")}


def arguments(models: Path, dataset: str, output: Path, task: str = "", **fields: Any) -> RecipeArguments:
    prefix, _ = FAMILIES.get(task, ("", ""))
    held = {"epochs": 4.0, "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "use_cpu": True}
    for name in ("teacher", "baselines"):
        if name in fields:
            fields[name] = str(models / f"{prefix}{fields[name]}")
    return RecipeArguments(str(models / f"{prefix}sparse"), dataset, str(output), **{**held, **fields})


class Stopped(Exception):
    """What a run is broken off by."""


def break_off(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    done = Trainer.training_step

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == at:
            raise Stopped
        return done(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)


def keep_saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets the model of each run that is saved at its end, as it was in memory."""
    save, kept = Trainer.save_model, []

    def saving(self: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save(self, output_dir, _internal_call)
        if not _internal_call:
            kept.append(self.model)

    monkeypatch.setattr(Trainer, "save_model", saving)
    return kept


def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of each step that is taken."""
    done, taken = Trainer.training_step, []

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        taken.append(self.state.global_step)
        return done(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    return taken
