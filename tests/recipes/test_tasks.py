"""Every task on a tiny converted checkpoint: it learns, goes on where it was stopped, is reloaded, and has its baselines."""

import dataclasses
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

import transformers
from transformers import AutoConfig, AutoTokenizer

import hf_sparse
from hf_sparse.errors import RecipeError
from hf_sparse.recipes.checkpoints import load_beside_adapters_, save_beside_adapters
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.lora import add_lora
from tests.recipe_cases import (
    FAMILIES,
    LENGTH,
    SIZES,
    TASKS,
    Stopped,
    arguments,
    break_off,
    count_steps,
    keep_saved,
    labelled,
    passage,
    plain,
    write,
)
from tests.support.checkpoints import write_image_processor
from tests.support.models import tiny_vision_model
from tests.support.zoo import tiny_of_type

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_learns_goes_on_and_is_reloaded(
    task: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fields, auto = TASKS[task]
    dataset = write(tmp_path / "data", make)
    with monkeypatch.context() as patch:
        trained = keep_saved(patch)
        (run,) = finetune(task, arguments(checkpoints, dataset, tmp_path / "whole", task, **fields))["runs"]
    losses = run["losses"]
    assert statistics.fmean(losses[-4:]) < statistics.fmean(losses[:4])
    assert all(value == value for value in run["metrics"].values())
    with monkeypatch.context() as patch:
        break_off(patch, at=run["steps"] // 2 + 1)
        with pytest.raises(Stopped):
            finetune(task, arguments(checkpoints, dataset, tmp_path / "parts", task, **fields))
    with monkeypatch.context() as patch:
        taken = count_steps(patch)
        (again,) = finetune(task, arguments(checkpoints, dataset, tmp_path / "parts", task, resume=True, **fields))[
            "runs"
        ]
    # from the checkpoint behind the second epoch of four
    assert len(taken) == run["steps"] // 2
    assert again["losses"] == losses
    assert again["seconds"] > 0.2 * run["seconds"]
    assert again["metrics"] == run["metrics"]
    folders = [tmp_path / name / "seed-0" for name in ("whole", "parts")]
    batch = AutoTokenizer.from_pretrained(folders[0])(passage(random.Random(1), 100), return_tensors="pt")
    loaded = [getattr(transformers, auto).from_pretrained(folder) for folder in folders]
    with torch.no_grad():
        said = [next(iter(model.eval()(**batch).values())) for model in (*loaded, *trained)]
    assert type(loaded[0]).__name__.startswith(FAMILIES.get(task, ("", "SparseBert"))[1])
    # of the run that was broken off
    assert torch.equal(said[0], said[1])
    # and of the model that was trained, whose weights lie elsewhere in memory, so that they may be added in another order
    torch.testing.assert_close(said[0], said[2])
    held = trained[0].state_dict()
    assert all(torch.equal(weight, held[name]) for name, weight in loaded[0].state_dict().items())


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
        "is_dense": True,
    }
    page = (tmp_path / "run" / "results.md").read_text()
    for title in [model["title"] for model in results["models"].values()]:
        assert f"| {title} |" in page
    for name in wanted[1:]:
        config = AutoConfig.from_pretrained(tmp_path / "run" / name / "seed-0")
        assert not hasattr(config, "sparse_attention")
        assert config.architectures[0].startswith(("Bert", "GPT2", "Bart"))


def test_images_are_classified_beside_their_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with monkeypatch.context() as patch:
        break_off(patch, at=13)
        with pytest.raises(Stopped):
            finetune("classify-images", dataclasses.replace(held, output=str(tmp_path / "parts"), baselines=None))
    taken = count_steps(monkeypatch)
    again = finetune(
        "classify-images", dataclasses.replace(held, output=str(tmp_path / "parts"), baselines=None, resume=True)
    )
    assert taken == list(range(12, 24))
    assert again["runs"][0]["losses"] == results["runs"][0]["losses"]
    assert [run["model"] for run in results["runs"]] == ["sparse", "truncated", "chunks"]
    for run in results["runs"]:
        assert statistics.fmean(run["losses"][-4:]) < statistics.fmean(run["losses"][:4])
        assert run["metrics"]["accuracy"] == 1.0
        assert run["tokens_per_second"] is None
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "seed-0")
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "parts" / "seed-0")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels).logits, other.eval()(pixels).logits)
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


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_what_the_checkpoint_did_not_hold_is_trained_beside_adapters(checkpoints: Path) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")
    model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints / "sparse", output_loading_info=True
    )
    adapted = add_lora(model, 2, frozenset(told["missing_keys"]))
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for name in ("bert.pooler.dense.modules_to_save.default.weight", "classifier.modules_to_save.default.weight"):
        assert f"base_model.model.{name}" in trained


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_tables_of_positions_are_trained_beside_adapters_whatever_they_are(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")

    def trained(model: Any) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    # a parameter of its own, which is in no file of adapters
    images = add_lora(hf_sparse.sparsify_(tiny_vision_model("ViT"), hf_sparse.pattern("image_2d")), 2)
    assert "base_model.model.embeddings.position_embeddings" in trained(images)
    table = images.base_model.model.embeddings.position_embeddings
    wanted = table.detach().clone()
    save_beside_adapters(images, tmp_path)
    table.data.zero_()
    load_beside_adapters_(images, str(tmp_path))
    assert torch.equal(table, wanted)
    # a bias by distance, in the first layer of each stack
    t5 = add_lora(hf_sparse.sparsify_(tiny_of_type("t5"), hf_sparse.pattern("band", radius=4)), 2)
    assert sum("relative_attention_bias.modules_to_save" in name for name in trained(t5)) == 2
    ids = torch.arange(5, 25)[None]
    t5(input_ids=ids, decoder_input_ids=ids).logits.square().sum().backward()
    bias = next(p for name, p in t5.named_parameters() if "relative_attention_bias.modules_to_save" in name)
    assert bias.grad is not None
    assert bias.grad.abs().max() > 0


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_language_head_that_is_new_is_trained_beside_adapters(checkpoints: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")
    transformers.AutoModel.from_pretrained(checkpoints / "dense").save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(checkpoints / "dense").save_pretrained(tmp_path / "dense")
    pattern = hf_sparse.pattern("longformer", window=32)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=LENGTH, verify=False)
    dataset = write(tmp_path / "data", plain)
    (run,) = finetune("mlm", arguments(tmp_path, dataset, tmp_path / "run", lora=2, learning_rate=1e-2))["runs"]
    assert statistics.fmean(run["losses"][-4:]) < statistics.fmean(run["losses"][:4])
    model = transformers.AutoModelForMaskedLM.from_pretrained(run["folder"])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = transformers.AutoModel.from_pretrained(tmp_path / "sparse").get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before)


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("key", "settings", "fields"),
    [
        ("routing", {"num_clusters": 4, "decay": 0.5}, {}),
        pytest.param("sac", {}, {}, marks=pytest.mark.slow),
        ("etc", {"radius": 16, "num_global": 16, "segments": "given"}, {"cpc": 0.5}),
    ],
)
def test_adapters_go_on_with_what_patterns_learned(
    key: str,
    settings: dict[str, Any],
    fields: dict[str, Any],
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")
    pattern = hf_sparse.pattern(key, **settings)
    hf_sparse.convert(checkpoints / "dense", tmp_path / "sparse", pattern, max_length=LENGTH, verify=False)
    dataset = write(tmp_path / "data", plain)

    def learned(output: str, **more: Any) -> dict[str, Any]:
        held = arguments(
            tmp_path, dataset, tmp_path / output, lora=2, epochs=2.0, packing=False, truncate=True, **fields, **more
        )
        found: dict[str, Any] = finetune("mlm", held)["runs"][0]
        return found

    whole = learned("whole")
    with monkeypatch.context() as patch:
        break_off(patch, at=5)
        with pytest.raises(Stopped):
            learned("parts")
    again = learned("parts", resume=True)
    assert again["losses"] == whole["losses"]
    before, one, other = (
        transformers.AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "sparse", whole["folder"], again["folder"])
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    assert any(name.endswith("query.weight") for name in moved)
    assert any("sparse_state" in name for name in moved) == (key == "routing")


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


def test_queries_have_segments_too(checkpoints: Path, tmp_path: Path) -> None:
    pattern = hf_sparse.pattern("etc", radius=16, num_global=16, segments="given")
    hf_sparse.convert(checkpoints / "dense", tmp_path / "sparse", pattern, max_length=LENGTH, verify=False)
    make, fields, _ = TASKS["retrieve"]
    dataset = write(tmp_path / "data", make)
    (run,) = finetune("retrieve", arguments(tmp_path, dataset, tmp_path / "run", epochs=1.0, **fields))["runs"]
    assert len(run["losses"]) == 4


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
    refused("mlm", "--metric is of classify, .*; mlm has no use for it", metric="owner/name")
    refused("classify", "--metric bleu cannot be loaded: unknown metric 'bleu'; known: .*", metric="bleu")
    refused("classify", "--metric ./no.py cannot be loaded: Couldn't find a metric script", metric="./no.py")
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
