"""``hf-sparse recipe``: what it prints, its exit codes, and errors in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from datasets import Dataset

import hf_sparse
from tests.conftest import Command
from tests.recipe_cases import LENGTH, SIZES, labelled, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def classify(hf_sparse_command: Command, checkpoints: Path, tmp_path: Path) -> Any:
    """Return a function that runs ``hf-sparse recipe classify``; what it is not told is right."""
    dataset = write(tmp_path / "data", labelled)

    def run(*args: str, model: Path = checkpoints / "sparse", data: str = dataset) -> tuple[int, str, str]:
        named = ("--model", str(model), "--dataset", data, "--output", str(tmp_path / "run"))
        return hf_sparse_command("recipe", "classify", *named, "--use-cpu", "--epochs", "1", *args)

    return run


def test_a_recipe_says_how_good_it_is(hf_sparse_command: Command, checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", labelled)
    told = {"model": str(checkpoints / "sparse"), "dataset": dataset, "output": str(tmp_path / "no"), "max_steps": 1}
    (tmp_path / "run.yaml").write_text(json.dumps({**told, "use_cpu": True}))
    # what the command line says goes before the file
    code, out, _ = hf_sparse_command(
        "recipe", "classify", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run")
    )
    assert code == 0
    (run,) = json.loads((tmp_path / "run" / "results.json").read_text())["runs"]
    assert f"accuracy {run['metrics']['accuracy']:.4f}" in out
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_read_is_said_in_one_line(classify: Any, checkpoints: Path, tmp_path: Path) -> None:
    def refused(said: str, *args: str, **fields: Any) -> None:
        code, _, err = classify(*args, **fields)
        last = err.splitlines()[-1]
        assert code == 2, err
        assert said in last
        assert last.startswith("hf-sparse recipe") or last.startswith("hf-sparse: ")
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()

    refused("has no column 'words'; it has text, label", "--text-column", "words")
    # once with what converts texts, and the length that was asked for
    dense = checkpoints / "dense"
    refused(
        f"is dense; convert it first: hf-sparse convert {dense} dense-sparse --pattern longformer --max-length 8192",
        "--max-length",
        "8192",
        model=dense,
    )
    refused("more than 16: pass --truncate to cut such off", "--max-length", "16")
    data = tmp_path / "other"
    data.mkdir()
    rows = [{"text": f"{i} true", "label": str(i % 2)} for i in range(8)]
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(data / f"{split}.parquet")
    Dataset.from_list(rows).select([]).to_parquet(data / "test.parquet")
    refused("the split 'test' is empty", data=str(data))
    Dataset.from_list([{"text": "a cloud", "label": "2"}]).to_parquet(data / "test.parquet")
    refused("the test split has labels that the training split has not: '2'", data=str(data))


def test_a_folder_of_another_model_and_a_run_that_fails_are_told_apart(
    classify: Any, checkpoints: Path, tmp_path: Path
) -> None:
    code, _, err = classify("--learning-rate", "1e20", "--batch-size", "4", "--gradient-accumulation-steps", "1")
    assert code == 1
    assert "the run has diverged" in err.splitlines()[-1]
    assert "Traceback" not in err
    other = tmp_path / "sparse"
    pattern = hf_sparse.pattern("longformer", window=16)
    hf_sparse.convert(checkpoints / "dense", other, pattern, max_length=LENGTH, verify=False)
    files = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    code, _, err = classify("--learning-rate", "1e20", "--resume", model=other)
    assert code == 2
    assert "was begun with config_of_model=" in err.splitlines()[-1]
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == files


def test_configs_are_listed_and_printed(hf_sparse_command: Command) -> None:
    code, out, _ = hf_sparse_command("recipe", "configs")
    assert code == 0
    assert "fsdp2" in out
    code, _, err = hf_sparse_command("recipe", "configs", "nowhere")
    assert code == 2
    assert err.count("\n") == 1


def test_files_are_read_as_the_hub_names_them(hf_sparse_command: Command, checkpoints: Path, tmp_path: Path) -> None:
    held = Path(write(tmp_path / "data", labelled))
    # numbers in CSV are none of JSON's texts
    names = {"0": "no", "1": "yes"}
    rows = {}
    for split in SIZES:
        lines = [json.loads(line) for line in (held / f"{split}.jsonl").read_text().splitlines()]
        rows[split] = Dataset.from_list([{"words": line["text"], "kind": names[line["label"]]} for line in lines])
    shutil.rmtree(held)
    held.mkdir()
    for i in range(2):
        rows["train"].shard(2, i).to_parquet(held / f"train-0000{i}-of-00002.parquet")
    rows["validation"].to_csv(held / "validation.csv")
    rows["test"].to_json(held / "test.json")
    told = {"model": str(checkpoints / "sparse"), "dataset": str(held), "output": str(tmp_path / "run"), "max_steps": 1}
    columns = {"text_column": "words", "label_column": "kind"}
    (tmp_path / "run.yaml").write_text(json.dumps({**told, **columns, "use_cpu": True}))
    code, _, err = hf_sparse_command("recipe", "classify", "--config", str(tmp_path / "run.yaml"))
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["splits"] == SIZES
