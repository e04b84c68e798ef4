"""What is asked of a run happens, what cannot be done is said in time, and what was begun is gone on with."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from datasets import Dataset, load_dataset
from PIL import Image
from transformers import AutoModelForMaskedLM, AutoTokenizer

import hf_sparse
from hf_sparse.errors import FailedRunError, RecipeError
from hf_sparse.recipes import losses as added
from hf_sparse.recipes import results
from hf_sparse.recipes.arguments import RecipeArguments, read_arguments
from hf_sparse.recipes.documents import read_splits, some_of
from hf_sparse.recipes.finetune import _readers, finetune
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.distill import Distillation
from hf_sparse.recipes.tasks.language import Masked
from hf_sparse.recipes.training import _begin_peak, _peak_memory, _training_arguments, _with_losses
from tests.recipe_cases import (
    LENGTH,
    arguments,
    asked,
    labelled,
    plain,
    searched,
    tagged,
    write,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def things(tmp_path: Path) -> str:
    return write(tmp_path / "things", labelled)


def test_what_is_asked_for_reaches_the_trainer(checkpoints: Path, things: str, tmp_path: Path) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", precision="bf16", gradient_checkpointing=True).for_task(
        "mlm"
    )
    splits = read_splits(held, Masked.columns(held))
    found = _training_arguments(Masked(splits, held), held, 7, tmp_path)
    assert (found.bf16, found.fp16, found.load_best_model_at_end) == (True, False, True)
    assert getattr(found, "activation_checkpointing", None) or found.gradient_checkpointing
    assert (found.metric_for_best_model, found.greater_is_better) == ("loss", False)
    assert (found.seed, found.data_seed) == (7, 7)


def test_each_seed_is_a_run_of_its_own(checkpoints: Path, things: str, tmp_path: Path) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", seeds=[0, 1], epochs=1.0, train_size=8)
    found = finetune("classify", held)
    first, second = found["runs"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert first["losses"] != second["losses"]
    # eight documents of sixteen, four at a time
    assert (found["splits"]["train"], first["steps"]) == (8, 2)
    # TensorBoard finds them side by side
    assert all(list(Path(run["folder"]).rglob("events.out.tfevents.*")) for run in found["runs"])


def test_packed_documents_read_themselves_and_each_has_a_global_token(checkpoints: Path) -> None:
    texts = ["the module object is a name " * 8, "a class of the function here " * 8]
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_dict({"text": texts}))
    task = Masked(splits, RecipeArguments("m", "d", "o"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "dense")
    model: Any = task.load(str(checkpoints / "sparse")).eval()
    (row,) = task.encode(splits["train"], "train", tokenizer, Reading(LENGTH))
    second = row["document_ids"].index(1)
    task.finish = lambda batch, tokenizer: batch  # type: ignore[method-assign]
    batch = task.collator(tokenizer, model, Reading(LENGTH))([row])
    assert batch["global_attention_mask"][0].nonzero()[:, 0].tolist() == [0, second]

    def first_tokens(at: int) -> Any:
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, at] = 50
        with torch.no_grad():
            before, after = (model(**held).logits[0] for held in (batch, changed))
        return [float((before - after)[place].abs().max()) for place in (0, second)]

    # far beyond the window of 16 to each side
    assert first_tokens(second - 5)[0] > 1e-3
    assert first_tokens(second - 5)[1] == 0.0
    end = len(row["input_ids"]) - 3
    assert first_tokens(end)[0] == 0.0
    assert first_tokens(end)[1] > 1e-3


def test_a_baseline_reads_no_more_than_is_asked_for(checkpoints: Path, things: str, tmp_path: Path) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", baselines="dense", max_length=32)
    _, truncated, chunks = _readers("classify", held)
    assert (truncated.reading, truncated.title) == (Reading(32, cuts=True, is_dense=True), "dense, the first 32 tokens")
    assert chunks.reading == Reading(32, 32, is_dense=True)
    for packing, title in ((True, "dense, 64 tokens at a time"), (False, "dense, the first 64 tokens")):
        one = arguments(checkpoints, things, tmp_path / "run", baselines="dense", packing=packing)
        assert [reader.title for reader in _readers("mlm", one)][1:] == [title]


def test_hidden_states_and_attention_have_their_weight(checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", plain)

    def distillation(**fields: Any) -> tuple[Any, Any]:
        held = arguments(checkpoints, dataset, tmp_path / "run", teacher="dense", **fields)
        task = Distillation(read_splits(held, Distillation.columns(held)), held)
        trainer: Any = type("Trainer", (), {"args": type("Args", (), {"device": "cpu"})})()
        task.prepare(trainer)
        return task, trainer.teacher

    task, teacher = distillation()
    assert not teacher.training
    model = task.load(str(checkpoints / "sparse")).eval()
    batch = {"input_ids": torch.arange(5, 65)[None], "attention_mask": torch.ones(1, 60, dtype=torch.int64)}
    plain_loss = task.loss(model, teacher, batch)
    with torch.no_grad():
        mine, theirs = (held(**batch, output_hidden_states=True).hidden_states[1:] for held in (model, teacher))
    errors = [(one - other).square().mean() / other[0].var() for one, other in zip(mine, theirs, strict=True)]
    wanted = plain_loss + 2 * torch.stack(errors).mean()
    assert distillation(hidden=2.0)[0].loss(model, teacher, batch).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert distillation(attention=2.0)[0].loss(model, teacher, batch) > plain_loss + 1e-3


def test_edges_are_rewarded_for_a_small_loss(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_sparse.convert(checkpoints / "dense", tmp_path / "sac", hf_sparse.pattern("sac"), verify=False)
    rewards = []

    class Spy:
        def __init__(self, model: Any) -> None:
            pass

        def __call__(self, reward: Any) -> Any:
            rewards.append(reward)
            return torch.tensor(3.0)

    monkeypatch.setattr(added, "PolicyLoss", Spy)
    (loss,) = added.added_losses(None, RecipeArguments("m", "d", "o", policy=0.5), None)
    assert loss({}, torch.tensor(2.0)) == 1.5
    assert rewards == [torch.tensor(-2.0)]


def test_a_loss_of_a_pattern_counts_once_in_each_step() -> None:
    given = []

    def added_to(_batch: Any, loss: torch.Tensor) -> torch.Tensor:
        given.append(loss.item())
        return torch.tensor(8.0)

    class Parent:
        current_gradient_accumulation_steps = 4
        model_accepts_loss_kwargs = True

        def compute_loss(self, *_: Any, **__: Any) -> Any:
            return torch.tensor(1.0), {}

    trainer, model = _with_losses(Parent, [added_to])(), SimpleNamespace(training=True)
    # a quarter of a step's mean, and then the mean of a batch
    assert trainer.compute_loss(model, {}) == 3.0
    trainer.model_accepts_loss_kwargs = False
    assert trainer.compute_loss(model, {}) == 9.0
    assert given == [4.0, 1.0]


def test_a_batch_of_one_segment_has_none_to_be_told_from(checkpoints: Path, tmp_path: Path) -> None:
    pattern = hf_sparse.pattern("etc", radius=16, num_global=16, segments="given")
    hf_sparse.convert(checkpoints / "dense", tmp_path / "etc", pattern, max_length=LENGTH, verify=False)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "etc")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "dense")
    (loss,) = added.added_losses(model, RecipeArguments("m", "d", "o", cpc=0.5), tokenizer)
    batch = {
        "input_ids": torch.arange(5, 25)[None],
        "attention_mask": torch.ones(1, 20, dtype=torch.int64),
        "segment_ids": torch.zeros(1, 20, dtype=torch.int64),
    }
    assert loss(batch, torch.tensor(2.0)) == 0.0
    batch["segment_ids"][0, 9:] = 1
    assert loss(batch, torch.tensor(2.0)) > 0.0


def test_a_run_that_diverges_says_so(checkpoints: Path, things: str, tmp_path: Path) -> None:
    with pytest.raises(FailedRunError, match=r"the run has diverged; take a smaller --learning_rate"):
        finetune("classify", arguments(checkpoints, things, tmp_path / "run", learning_rate=1e20))
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_token_that_is_none_is_not_sent(
    checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET\x0bmore")
    with pytest.raises(ValueError, match="the token for the Hub holds characters that no token has") as caught:
        finetune("classify", arguments(checkpoints, things, tmp_path / "run"))
    assert "SECRET" not in str(caught.value)


def test_results_need_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.shutil, "which", lambda name: None)
    assert results.surroundings(use_cpu=True)["commit"] is None


def test_results_say_which_commit_of_the_package_ran_wherever_it_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = shutil.which("git")
    if git is None or not (Path(results.__file__).resolve().parents[1] / ".git").exists():
        pytest.skip("this is no checkout, or git is not installed")
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run([git, "-C", str(tmp_path), *command], check=True)
    monkeypatch.chdir(tmp_path)
    asked = [git, "-C", str(Path(results.__file__).resolve().parent), "rev-parse", "HEAD"]
    wanted = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    assert results.surroundings(use_cpu=True)["commit"].removesuffix("-dirty") == wanted
    # installed into a folder of another checkout
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results.surroundings(use_cpu=True)["commit"] is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_model_without_a_head_is_adapted_too(checkpoints: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="--lora needs hf-sparse[peft]")
    dataset = write(tmp_path / "data", searched)
    fields = {"query_column": "queries.query", "lora": 2, "epochs": 1.0, "learning_rate": 1e-2}
    (run,) = finetune("retrieve", arguments(checkpoints, dataset, tmp_path / "run", **fields))["runs"]
    assert len(set(run["losses"])) > 1


def test_a_file_may_be_named_in_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: one\ndataset: two\noutput: three\nlearning_rate: 0.123\n")
    for line in (["--config", str(path)], [f"--config={path}"]):
        assert read_arguments(line, "it").learning_rate == 0.123


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text_column": 5}, "--text_column must be text, got 5"),
        ({"batch_size": 2.5}, "--batch_size must be a whole number, got 2.5"),
        ({"batch_size": True}, "--batch_size must be a whole number, got True"),
        ({"use_cpu": 7}, "--use_cpu must be true or false, got 7"),
        ({"learning_rate": "fast"}, "--learning_rate must be a number, got 'fast'"),
        ({"seeds": 3}, "--seeds must be a list of whole numbers, got 3"),
        ({"lora": None}, "--lora must be a whole number, got None"),
        ({"seeds": [0, 0]}, "none below 0 and none twice"),
        ({"seeds": [-1]}, "none below 0 and none twice"),
        ({"learning_rate": -1.0}, "--learning_rate must be at least 0"),
        ({"weight_decay": -3}, "--weight_decay must be at least 0"),
        ({"short_share": 3}, "--short_share must be at most 1"),
        ({"policy": 0.1, "lora": 2}, "--policy trains the predictors of sac, which --lora leaves as they are"),
        ({"test_split": "train"}, "--train_split train is judged too"),
    ],
)
def test_arguments_of_another_kind_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RecipeArguments("m", "d", "o", **fields)


def spoil(dataset: str, split: str, **fields: Any) -> None:
    """Change fields of the first row of a split; None takes a field's value away."""
    path = Path(dataset) / f"{split}.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **fields}), *others]) + "\n")


@pytest.mark.parametrize(
    ("task", "make", "fields", "said"),
    [
        ("classify", labelled, {"text": None}, "the split 'test' has 1 rows without 'text'"),
        ("classify", labelled, {"label": None}, "the split 'test' has 1 rows without 'label'"),
        ("mlm", plain, {"text": None}, "the split 'test' has 1 rows without 'text'"),
        ("answer", asked, {"answers": {"text": ["x"], "answer_start": []}}, 'row 0: column .answers. must be {"text"'),
        (
            "answer",
            asked,
            {"answers": {"text": ["qq"], "answer_start": [3]}},
            "'qq' stands at character 3 of the context",
        ),
        ("answer", asked, {"answers": {"text": ["a"], "answer_start": [-1]}}, "stands at character -1"),
        ("tag", tagged, {"tags": ["O"]}, "words and 1 tags"),
        ("tag", tagged, {"tags": ["B-QQ"] * 50}, "the test split has tags that the training split has not: B-QQ"),
    ],
)
def test_what_is_wrong_in_a_document_is_said(
    task: str, make: Any, fields: dict[str, Any], said: str, checkpoints: Path, tmp_path: Path
) -> None:
    dataset = write(tmp_path / "data", make)
    spoil(dataset, "test", **fields)
    with pytest.raises(RecipeError, match=said):
        finetune(task, arguments(checkpoints, dataset, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_a_dataset_is_said(checkpoints: Path, tmp_path: Path) -> None:
    def refused(said: str, task: str, dataset: str, **fields: Any) -> None:
        with pytest.raises((RecipeError, ValueError), match=said):
            finetune(task, arguments(checkpoints, dataset, tmp_path / "run", **fields))
        assert not (tmp_path / "run").exists()

    dataset = write(tmp_path / "data", labelled)
    path = Path(dataset) / "test.jsonl"
    held = path.read_text()
    path.write_text("")
    refused("test.jsonl cannot be read as json: it is empty", "classify", dataset)
    path.write_text('{"text": "x", "label": ["0"]}\n')
    refused("column 'label' holds text in the train split and lists of text in the test split", "classify", dataset)
    path.write_text('{"text": "  ", "label": "0"}\n')
    refused("the split 'test' has no text in column 'text'", "classify", dataset)
    path.write_text(held)
    (Path(dataset) / "test.csv").write_text("text,label\nx,0\n")
    refused("holds both test.csv and test.jsonl; leave one of them", "classify", dataset)
    (Path(dataset) / "test.csv").unlink()
    refused(
        "--label_column is of classify, answer, tag, summarize, classify-images", "mlm", dataset, label_column="label"
    )
    refused("--baselines is of .*; distill has no use for it", "distill", dataset, teacher="dense", baselines="dense")
    questions = write(tmp_path / "questions", searched)
    refused("has no field 'nope' in column 'queries'", "retrieve", questions, query_column="queries.nope")
    refused("--batch_size 1 has none", "retrieve", questions, query_column="queries.query", batch_size=1)


def test_what_a_model_cannot_learn_is_said(checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", plain)

    def refused(said: str, task: str, model: str = "sparse", **fields: Any) -> None:
        held = arguments(checkpoints, dataset, tmp_path / "run", **fields)
        with pytest.raises(RecipeError, match=said):
            finetune(task, dataclasses.replace(held, model=str(checkpoints / model)))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

    refused("is no decoder: its tokens read what they are to predict; train it with mlm", "clm")
    refused("is of a model type that AutoModelForMaskedLM does not know", "mlm", "gpt2-sparse")
    star = checkpoints / "star"
    if not star.exists():
        hf_sparse.convert(checkpoints / "dense", star, hf_sparse.pattern("star"), max_length=LENGTH, verify=False)
    refused("has nodes that the documents of a joined row would share; pass --packing false", "mlm", "star")
    other = checkpoints / "other"
    if not other.exists():
        shutil.copytree(checkpoints / "dense", other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "vocab_size": 601, "hidden_size": 64}))
    refused("whose vocab_size is 601 and not 600", "distill", teacher="other")
    refused(r"whose vocabulary is another \(601 tokens, not 600\)", "mlm", baselines="other")


def test_a_few_images_are_chosen_by_what_they_show(tmp_path: Path) -> None:
    for place in ("one", "other"):
        for i in range(6):
            folder = tmp_path / place / "train" / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (i * 40, 0, 0)).save(folder / f"{i if place == 'one' else 9 - i}.png")
    shades = []
    for place in ("one", "other"):
        split = load_dataset("imagefolder", data_dir=str(tmp_path / place / "train"), split="train")
        shades.append(sorted(image.getpixel((0, 0))[0] for image in some_of(split, 3, "image")["image"]))
    assert shades[0] == shades[1]
    assert len(shades[0]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be forgotten on Linux alone")
def test_memory_that_an_earlier_run_freed_is_not_counted() -> None:
    """In pieces that the allocator keeps for itself, with one that is still used behind them, and in a cycle."""
    _begin_peak(torch.device("cpu"))
    before = _peak_memory(torch.device("cpu"))
    held: list[Any] = [bytearray(b"x" * 50_000) for _ in range(6000)]
    held.append(held)
    last = bytearray(b"x" * 50_000)
    assert _peak_memory(torch.device("cpu")) > before + 250
    del held
    _begin_peak(torch.device("cpu"))
    assert _peak_memory(torch.device("cpu")) < before + 60
    assert len(last) == 50_000
