"""Every task on a tiny converted checkpoint: it learns, goes on where it was stopped, is reloaded, and has its baselines."""

import dataclasses
import json
import random
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    Trainer,
)

import hf_sparse
from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from tests.support.checkpoints import write_image_processor
from tests.support.models import tiny_vision_model

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, DENSE = 256, 64
BART_SIZES = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZES = {"train": 16, "validation": 6, "test": 6}
TEXTS = [" ".join(re.findall(r"[A-Za-z]+[.,]?", topics[name])) for name in sorted(topics)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, GPT-2 and BART with a vocabulary of Python's manual, dense and converted."""
    folder = tmp_path_factory.mktemp("models")
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
    return folder


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


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_goes_on_and_is_reloaded(
    task: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fields, auto = TASKS[task]
    dataset = write(tmp_path / "data", make)
    (run,) = finetune(task, arguments(checkpoints, dataset, tmp_path / "whole", task, **fields))["runs"]
    losses = run["losses"]
    assert statistics.fmean(losses[-4:]) < statistics.fmean(losses[:4])
    assert all(value == value for value in run["metrics"].values())
    with monkeypatch.context() as patch:
        break_off(patch, at=run["steps"] // 2 + 1)
        with pytest.raises(Stopped):
            finetune(task, arguments(checkpoints, dataset, tmp_path / "parts", task, **fields))
    (again,) = finetune(task, arguments(checkpoints, dataset, tmp_path / "parts", task, resume=True, **fields))["runs"]
    assert again["losses"] == losses
    assert again["metrics"] == run["metrics"]
    folders = [tmp_path / name / "seed-0" for name in ("whole", "parts")]
    batch = AutoTokenizer.from_pretrained(folders[0])(passage(random.Random(1), 100), return_tensors="pt")
    loaded = [getattr(transformers, auto).from_pretrained(folder).eval() for folder in (*folders, folders[0])]
    with torch.no_grad():
        said = [next(iter(model(**batch).values())) for model in loaded]
    assert type(loaded[0]).__name__.startswith(FAMILIES.get(task, ("", "SparseBert"))[1])
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


@pytest.mark.parametrize("task", ["classify", "answer", "tag", "retrieve", "mlm", "clm", "summarize"])
def test_a_task_has_baselines(task: str, checkpoints: Path, tmp_path: Path) -> None:
    make, fields, _ = TASKS[task]
    dataset = write(tmp_path / "data", make)
    held = arguments(
        checkpoints,
        dataset,
        tmp_path / "run",
        task,
        **{**fields, "baselines": "dense", "epochs": 1.0, "max_length": 128, "truncate": True},
    )
    results = finetune(task, held)
    wanted = ["sparse", "truncated"] if task in ("mlm", "clm") else ["sparse", "truncated", "chunks"]
    assert [run["model"] for run in results["runs"]] == wanted
    assert results["models"]["truncated"] == {
        "title": "dense, 64 tokens at a time" if task in ("mlm", "clm") else "dense, the first 64 tokens",
        "longest": 64,
        "chunk": None,
        "cuts": True,
    }
    page = (tmp_path / "run" / "results.md").read_text()
    for title in [model["title"] for model in results["models"].values()]:
        assert f"| {title} |" in page
    for name in wanted[1:]:
        config = AutoConfig.from_pretrained(tmp_path / "run" / name / "seed-0")
        assert not hasattr(config, "sparse_attention")
        assert config.architectures[0].startswith(("Bert", "GPT2", "Bart"))


def test_images_are_classified_beside_their_tiles(tmp_path: Path) -> None:
    from PIL import Image

    tiny_vision_model("ViT", "ForImageClassification").save_pretrained(tmp_path / "dense")
    write_image_processor(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", hf_sparse.pattern("image_2d"), image_size=32)
    drawn = random.Random(0)
    for split, count in SIZES.items():
        for i in range(count):
            folder = tmp_path / "data" / split / ("dark", "light")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shade = (40, 200)[i % 2] + drawn.randrange(40)
            Image.new("RGB", (32, 32), (shade, shade, shade)).save(folder / f"{i}.png")
    held = arguments(tmp_path, str(tmp_path / "data"), tmp_path / "run", baselines="dense", epochs=6.0)
    results = finetune("classify-images", held)
    assert [run["model"] for run in results["runs"]] == ["sparse", "truncated", "chunks"]
    for run in results["runs"]:
        assert run["metrics"]["accuracy"] == 1.0
        assert run["tokens_per_second"] is None
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "seed-0")
    assert type(loaded).__name__ == "SparseViTForImageClassification"
    assert loaded.config.id2label == {0: "dark", 1: "light"}


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_trained_alone_and_merged(checkpoints: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")
    dataset = write(tmp_path / "data", labelled)
    (run,) = finetune("classify", arguments(checkpoints, dataset, tmp_path / "run", lora=4, learning_rate=1e-2))["runs"]
    assert statistics.fmean(run["losses"][-4:]) < statistics.fmean(run["losses"][:4])
    before, after = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (checkpoints / "sparse", tmp_path / "run" / "seed-0")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "bert.embeddings.position_embeddings.weight" in changed
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in changed
    assert "bert.embeddings.word_embeddings.weight" not in changed
    assert "bert.encoder.layer.0.output.dense.weight" not in changed


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("task", ["clm", "summarize", "mlm"])
def test_a_language_model_keeps_its_head_beside_adapters(task: str, checkpoints: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")
    make, fields, auto = TASKS[task]
    dataset = write(tmp_path / "data", make)
    held = arguments(checkpoints, dataset, tmp_path / "run", task, lora=2, learning_rate=1e-2, **fields)
    (run,) = finetune(task, held)["runs"]
    assert statistics.fmean(run["losses"][-4:]) < statistics.fmean(run["losses"][:4])
    model = getattr(transformers, auto).from_pretrained(run["folder"])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = getattr(transformers, auto).from_pretrained(held.model).state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any("attn" in name or "attention" in name for name in changed)
    assert not any("mlp" in name or "fc1" in name or "intermediate" in name for name in changed)


def test_losses_of_patterns_are_switched_on_where_they_are_used(checkpoints: Path, tmp_path: Path) -> None:
    sources = {
        "etc": hf_sparse.pattern("etc", radius=16, num_global=16, segments="given"),
        "sac": hf_sparse.pattern("sac"),
    }
    for name, pattern in sources.items():
        hf_sparse.convert(checkpoints / "dense", tmp_path / name, pattern, max_length=LENGTH, verify=False)
    dataset = write(tmp_path / "data", plain)

    def losses(source: str, **fields: Any) -> list[float]:
        held = arguments(tmp_path, dataset, tmp_path / "-".join(["run", source, *fields]), epochs=1.0, **fields)
        found: list[float] = finetune("mlm", dataclasses.replace(held, model=str(tmp_path / source)))["runs"][0][
            "losses"
        ]
        return found

    assert losses("etc", cpc=0.5)[0] > losses("etc")[0] + 0.1
    assert losses("sac", policy=0.5)[1:] != losses("sac")[1:]
    with pytest.raises(RecipeError, match="--cpc needs a model with the pattern etc and segments='given'"):
        losses("sac", cpc=0.5)
    with pytest.raises(RecipeError, match="--policy needs a model with the pattern sac"):
        losses("etc", policy=0.5)


def test_distillation_begins_at_the_dense_length(checkpoints: Path, tmp_path: Path) -> None:
    """A window that reads everything says what the dense model says, within its length and in parts beyond."""
    wide = hf_sparse.pattern("longformer", window=2 * LENGTH, global_projections=False)
    hf_sparse.convert(checkpoints / "dense", tmp_path / "wide", wide, max_length=LENGTH, verify=False)
    dataset = write(tmp_path / "data", plain)
    held = arguments(checkpoints, dataset, tmp_path / "run", teacher="dense", epochs=1.0, hidden=1.0, attention=1.0)
    (run,) = finetune("distill", dataclasses.replace(held, model=str(tmp_path / "wide")))["runs"]
    assert run["before"]["kl"] < 1e-6
    assert run["before"]["kl_long"] > 1e-4
    narrow = arguments(checkpoints, dataset, tmp_path / "narrow", teacher="dense", short_share=1.0, learning_rate=1e-3)
    (run,) = finetune("distill", narrow)["runs"]
    assert run["before"]["kl"] > 1e-5
    assert run["metrics"]["kl"] < run["before"]["kl"]


def test_what_a_task_cannot_use_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", labelled)

    def refused(task: str, match: str, **fields: Any) -> None:
        with pytest.raises((RecipeError, ValueError), match=match):
            finetune(task, arguments(checkpoints, dataset, tmp_path / "run", **fields))
        assert not (tmp_path / "run").exists()

    refused("classify", "--teacher is of distill; classify has no use for it", teacher="dense")
    refused("classify", "--packing is of mlm, clm; classify has no use for it", packing=False)
    refused("classify", "--baselines names .*, which is sparse; name the dense checkpoint", baselines="sparse")
    refused("distill", "distill needs the dense checkpoint that the model was converted from: --teacher")
    refused("distill", "--teacher names .*, which is sparse", teacher="sparse")
    refused("retrieve", "has no column 'query'")
    refused("retrieve", "the train split has no query that belongs to a single document", query_column="label")


def test_texts_are_read_on_the_way(checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", plain)
    held = arguments(checkpoints, dataset, tmp_path / "run", streaming=True, max_steps=4, save_steps=2, batch_size=2)
    results = finetune("mlm", held)
    assert results["splits"] == {**SIZES, "train": None}
    assert results["runs"][0]["steps"] == 4
    assert "trained on a stream" in (tmp_path / "run" / "results.md").read_text()
    with pytest.raises(ValueError, match="--streaming needs --max_steps"):
        arguments(checkpoints, dataset, tmp_path / "other", streaming=True)
