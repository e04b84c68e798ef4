"""Fine-tuning a converted checkpoint on documents: it learns, resumes, reloads, and says what does not fit."""

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

import hf_sparse
from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments, read_arguments
from hf_sparse.recipes.documents import read_splits
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.classify import Classification
from tests.support.checkpoints import write_checkpoint, write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
FILLER = ("a", "every", "long", "of", "page", "reads", "the", "word")
SIZES = {"train": 24, "validation": 8, "test": 8}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT of 128 tokens, converted to a window and a global first token."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "dense", "Bert", "ForMaskedLM")
    write_tokenizer(folder / "dense", "Bert")
    hf_sparse.convert(folder / "dense", folder / "sparse", hf_sparse.pattern("longformer", window=8), max_length=128)
    return str(folder / "sparse")


def write_documents(
    folder: Path, label: Callable[[str], Any], *, sizes: dict[str, int] = SIZES, words: int = 60
) -> str:
    """Write documents that name a river or a stone somewhere, as JSON lines, and return the folder."""
    drawn = random.Random(0)
    folder.mkdir(exist_ok=True)
    for split, count in sizes.items():
        lines = []
        for i in range(count):
            thing = ("river", "stone")[i % 2]
            held = [drawn.choice(FILLER) for _ in range(drawn.randrange(words // 2, words))]
            for place in drawn.sample(range(len(held)), 8):
                held[place] = thing
            lines.append(json.dumps({"text": " ".join(held), "label": label(thing)}))
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


def arguments(source: str, dataset: str, output: Path, **fields: Any) -> RecipeArguments:
    held: dict[str, Any] = {"epochs": 4.0, "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 3e-3}
    return RecipeArguments(source, dataset, str(output), **{**held, "use_cpu": True, **fields})


def check_reload(folder: Path) -> None:
    """Load twice with the Auto class: the same logits, and still sparse."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("the river reads a page", return_tensors="pt")
    models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for _ in range(2)]
    assert type(models[0]).__name__ == "SparseBertForSequenceClassification"
    with torch.no_grad():
        assert torch.equal(*(model(**batch).logits for model in models))


def test_a_classifier_learns_what_stands_anywhere_and_is_reloaded(source: str, tmp_path: Path) -> None:
    # enough of them that what is learned does not depend on their order
    sizes = {**SIZES, "train": 96}
    dataset = write_documents(tmp_path / "data", str, sizes=sizes)
    results = finetune("classify", arguments(source, dataset, tmp_path / "run", seeds=[0, 1], epochs=2))
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    for run in results["runs"]:
        assert run["steps"] == 48
        assert statistics.fmean(run["losses"][-6:]) < 0.5 * statistics.fmean(run["losses"][:6])
        assert run["metrics"] == {"accuracy": 1.0, "f1_micro": 1.0, "f1_macro": 1.0}
        assert run["tokens_per_second"] > 0
        assert run["folder"] == str(tmp_path / "run" / f"seed-{run['seed']}")
        check_reload(Path(run["folder"]))
    held = json.loads((tmp_path / "run" / "results.json").read_text())
    assert held["splits"] == sizes
    assert held["versions"]["hf_sparse"] == hf_sparse.__version__
    page = (tmp_path / "run" / "results.md").read_text()
    assert "| longformer, 128 tokens | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 |" in page
    assert "2 seeds: 0, 1" in page


def test_several_labels_and_their_threshold(source: str, tmp_path: Path) -> None:
    labels = {"river": ["water", "long"], "stone": ["hard"]}
    dataset = write_documents(tmp_path / "data", labels.__getitem__)
    results = finetune("classify", arguments(source, dataset, tmp_path / "run", epochs=8))
    (run,) = results["runs"]
    assert run["metrics"] == {"f1_micro": 1.0, "f1_macro": 1.0}
    assert 0 < run["threshold"] < 1
    # what one run chose does not choose the epochs of the next
    held = arguments(source, dataset, tmp_path / "other")
    task = Classification(read_splits(held, Classification.columns(held)), held)
    task.threshold = 0.9
    task.load(source)
    assert task.threshold == 0.5
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "seed-0")
    assert model.config.id2label == {0: "hard", 1: "long", 2: "water"}
    assert model.config.problem_type == "multi_label_classification"


def test_a_new_head_begins_with_how_often_labels_are_and_a_trained_one_stays(source: str, tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "data", {"river": ["water", "long"], "stone": ["water"]}.__getitem__)
    held = arguments(source, dataset, tmp_path / "run")
    splits = read_splits(held, Classification.columns(held))
    task = Classification(splits, held)
    # half of the 24 documents are long, all have to do with water
    task.encode(splits["train"], "train", AutoTokenizer.from_pretrained(source), Reading(128))
    model: Any = task.load(source)
    long, water = (torch.tensor((count + 1) / 26).logit() for count in (12, 24))
    assert torch.allclose(model.classifier.bias.data, torch.stack([long, water]))
    model.classifier.bias.data.fill_(7.0)
    model.save_pretrained(tmp_path / "trained")
    assert (task.load(str(tmp_path / "trained")).classifier.bias == 7.0).all()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("lora", [0, 2])
def test_a_new_head_may_learn_at_a_rate_of_its_own(source: str, tmp_path: Path, lora: int) -> None:
    if lora:
        pytest.importorskip("peft", reason="adapters need hf-sparse[peft]")
    dataset = write_documents(tmp_path / "data", str)
    rates: Any = {"learning_rate": 0.0, "head_learning_rate": 0.01}
    finetune("classify", arguments(source, dataset, tmp_path / "run", max_steps=4, lora=lora, **rates))
    trained: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "seed-0")
    before = AutoModelForMaskedLM.from_pretrained(source).state_dict()
    kept = {name: held for name, held in trained.state_dict().items() if name in before}
    assert len(kept) > 20
    assert all(torch.equal(held, before[name]) for name, held in kept.items())
    # the two began alike, as there are as many documents of one label as of the other
    assert (trained.classifier.bias[0] - trained.classifier.bias[1]).abs() > 1e-4


def test_a_run_goes_on_where_it_was_stopped_with_the_same_losses(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_documents(tmp_path / "data", str)
    whole = finetune("classify", arguments(source, dataset, tmp_path / "whole"))["runs"][0]
    done = Trainer.training_step

    class Stopped(Exception):
        pass

    def stop_in_the_third_epoch(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 15:
            raise Stopped
        return done(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", stop_in_the_third_epoch)
    with pytest.raises(Stopped):
        finetune("classify", arguments(source, dataset, tmp_path / "parts"))
    monkeypatch.setattr(Trainer, "training_step", done)
    with pytest.raises(RecipeError, match=r"is not empty; pass --resume to go on with it"):
        finetune("classify", arguments(source, dataset, tmp_path / "parts"))
    with pytest.raises(RecipeError, match=r"was begun with learning_rate=0\.003, not 0\.1"):
        finetune("classify", arguments(source, dataset, tmp_path / "parts", resume=True, learning_rate=0.1))
    # the process ended while this one was written
    (tmp_path / "parts" / "seed-0" / "checkpoint-15").mkdir()
    parts = finetune("classify", arguments(source, dataset, tmp_path / "parts", resume=True))["runs"][0]
    assert parts["losses"] == whole["losses"]
    assert parts["loss"] == whole["loss"]
    # a run that is done is read, and neither trained nor judged again
    again = finetune("classify", arguments(source, dataset, tmp_path / "parts", resume=True))["runs"][0]
    assert again == parts


def test_what_does_not_fit_is_said_before_anything_is_trained(source: str, tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "data", str)

    def refused(match: str, **fields: Any) -> None:
        held = {"source": source, "dataset": dataset, "output": tmp_path / "run", **fields}
        with pytest.raises(RecipeError, match=match):
            finetune("classify", arguments(**held))
        # so that the next try is not told that the folder is in use
        assert not (tmp_path / "run").exists()

    refused("has no column 'words'; it has text, label", text_column="words")
    refused(
        "has no split 'dev'; it has test, train, validation: name one by --validation_split", validation_split="dev"
    )
    refused("is dense; convert it first: hf-sparse convert", source=str(Path(source).parent / "dense"))
    refused("cannot be loaded", source=str(tmp_path / "nowhere"))
    refused("a document has .* tokens, more than 20: pass --truncate to cut such off", max_length=20)
    refused("--max_length=512 is more than the 128 tokens of", max_length=512)
    refused("is a file; name the folder that holds a file for each split", dataset=f"{dataset}/train.jsonl")
    (tmp_path / "data" / "test.jsonl").write_text("not json\n")
    refused("test.jsonl cannot be read as json")
    write_documents(tmp_path / "data", str, sizes={**SIZES, "test": 0})
    refused("test.jsonl cannot be read as json|the split 'test' is empty")
    write_documents(tmp_path / "data", str)
    (tmp_path / "data" / "test.jsonl").write_text(json.dumps({"text": "the page", "label": "cloud"}) + "\n")
    refused("the test split has labels that the training split has not: 'cloud'")
    write_documents(tmp_path / "data", lambda thing: "same")
    refused("has no two different labels to tell apart")


def test_arguments_come_from_the_command_line_and_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: one\ndataset: two\nepochs: 7\nseeds: [3, 4]\n")
    held = read_arguments(["--config", str(path), "--output", "out", "--model", "mine", "--batch-size", "2"], "it")
    assert (held.model, held.dataset, held.output, held.epochs, held.seeds) == ("mine", "two", "out", 7, [3, 4])
    assert held.batch_size == 2
    with pytest.raises(ValueError, match="required: --dataset, --output"):
        read_arguments(["--model", "x"], "it")
    with pytest.raises(ValueError, match="unrecognized arguments: --batch 3"):
        read_arguments(["--config", str(path), "--output", "out", "--batch", "3"], "it")
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        read_arguments(["--config", str(path), "--output", "out", "--batch_size", "0"], "it")
    with pytest.raises(SystemExit):
        read_arguments(["--help"], "it", "classify")
    said = capsys.readouterr().out
    assert "--label-column" in said
    assert "--teacher" not in said
    path.write_text("modle: one\n")
    with pytest.raises(ValueError, match="has the unknown key 'modle'; known: model, dataset"):
        read_arguments(["--config", str(path)], "it")


@pytest.mark.slow
@pytest.mark.several_processes
def test_two_processes_share_a_run(source: str, tmp_path: Path) -> None:
    dataset = write_documents(tmp_path / "data", str)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["hf_sparse.recipes.finetune", "classify", "--model", source, "--dataset", dataset]
    command += [
        "--output",
        str(tmp_path / "run"),
        "--use-cpu",
        "--epochs",
        "2",
        "--batch-size",
        "2",
        "--learning-rate",
        "3e-3",
    ]
    command += ["--gradient-accumulation-steps", "1"]
    found = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert found.returncode == 0, found.stderr[-2000:]
    held = json.loads((tmp_path / "run" / "results.json").read_text())
    # 24 documents by twos on two processes, twice
    assert held["runs"][0]["steps"] == 12
    check_reload(tmp_path / "run" / "seed-0")
