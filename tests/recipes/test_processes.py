"""Several processes share a run: they learn what one learns, and what is lost with one of them is little."""

import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse.console import run
from hf_sparse.errors import LostProcessError
from hf_sparse.recipes.command import CONFIGS, recipe_app
from hf_sparse.recipes.processes import telling_of_lost_processes
from tests.ranks.learning import learn
from tests.recipe_cases import plain, searched, summed_up, tagged, write
from tests.support.checkpoints import write_checkpoint, write_tokenizer
from tests.support.documents import write_labelled
from tests.support.ranks import ON_TWO, finish, run_on_two, start

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"train": 16, "validation": 4, "test": 4}
LONGFORMER = hf_sparse.pattern("longformer", window=8)
ROUTING = hf_sparse.pattern("routing", num_clusters=4, decay=0.5) | hf_sparse.pattern("band", radius=4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_labelled(tmp_path_factory.mktemp("data") / "things", SIZES)


def sparse_checkpoint(folder: Path, pattern: hf_sparse.Pattern, **fields: Any) -> str:
    """Convert a tiny BERT of 128 tokens, without dropout unless told."""
    write_checkpoint(folder / "dense", "Bert", "ForMaskedLM", **fields)
    write_tokenizer(folder / "dense", "Bert")
    hf_sparse.convert(folder / "dense", folder / "sparse", pattern, max_length=128)
    return str(folder / "sparse")


def recipe(model: str, dataset: str, output: Path, **fields: Any) -> dict[str, Any]:
    """Return the arguments of a recipe of two documents a process and step, four steps an epoch."""
    held = {"batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 3e-3, "use_cpu": True}
    return {"model": model, "dataset": dataset, "output": str(output), **held, **fields}


def learn_on_two(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Run recipes in two processes."""
    (folder / "runs.json").write_text(json.dumps(runs))
    run_on_two("tests.ranks.learning", str(folder / "runs.json"))


def logged(checkpoint: Path) -> dict[str, Any]:
    """Return what Trainer knows of a run."""
    found: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())
    return found


def numbers(checkpoint: Path) -> Tensor:
    """Return losses and lengths of gradients, step by step, and the losses of evaluations."""
    names = ("loss", "grad_norm", "eval_loss")
    return torch.tensor([entry[name] for entry in logged(checkpoint)["log_history"] for name in names if name in entry])


def check_same(two: Path, one: Path) -> None:
    """Check that two runs of five steps logged and saved the same, up to 1e-5 of its size.

    But for the biases of keys, which add the same to all scores of a query: their gradient is 0 but for rounding, of which
    AdamW makes whole steps.
    """
    for step in (4, 5):
        paths = [folder / "seed-0" / f"checkpoint-{step}" for folder in (two, one)]
        found, wanted = (numbers(path) for path in paths)
        assert len(wanted) == 2 * step + (step + 3) // 4
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
        weights, others = (load_file(path / "model.safetensors") for path in paths)
        assert weights.keys() == others.keys()
        for name, other in others.items():
            if not name.endswith("key.bias"):
                assert (weights[name] - other).norm() <= 1e-5 * other.norm(), f"{name} after {step} steps"


@pytest.mark.several_processes
def test_two_processes_learn_what_one_learns_with_twice_the_batch(dataset: str, tmp_path: Path) -> None:
    longformer = sparse_checkpoint(tmp_path / "longformer", LONGFORMER)
    routing = sparse_checkpoint(tmp_path / "routing", ROUTING)

    def runs(folder: Path, **fields: Any) -> list[dict[str, Any]]:
        steps = {"max_steps": 5, **fields}
        return [
            {"arguments": recipe(longformer, dataset, folder / "longformer", **steps)},
            {"arguments": recipe(routing, dataset, folder / "routing", **steps, learning_rate=0.1), "sgd": True},
        ]

    learn_on_two(tmp_path, runs(tmp_path / "two"))
    for one in runs(tmp_path / "one", batch_size=4):
        learn(**one)
    # with AdamW
    check_same(tmp_path / "two" / "longformer", tmp_path / "one" / "longformer")
    # without, since keys would wander with their biases; centroids and their averages are among the weights that are saved
    check_same(tmp_path / "two" / "routing", tmp_path / "one" / "routing")


@pytest.mark.slow
@pytest.mark.several_processes
def test_tasks_whose_losses_are_no_means_of_documents_learn_the_same_too(checkpoints: Path, tmp_path: Path) -> None:
    """Tokens of documents of several lengths, queries against the documents of all processes, divergences of tokens."""
    made = {
        "tag": (tagged, {}),
        "retrieve": (searched, {"query_column": "queries.query"}),
        "distill": (plain, {"teacher": str(checkpoints / "dense")}),
        "mlm": (plain, {"packing": False, "truncate": True}),
        "summarize": (summed_up, {"max_summary_length": 12}),
    }
    data = {task: write(tmp_path / task, make) for task, (make, _) in made.items()}

    def runs(folder: Path, **fields: Any) -> list[dict[str, Any]]:
        found = []
        for task, (_, own) in made.items():
            model = str(checkpoints / ("bart-sparse" if task == "summarize" else "sparse"))
            steps = {"max_steps": 3, "save_steps": 3, **own, **fields}
            found.append({"task": task, "arguments": recipe(model, data[task], folder / task, **steps)})
        return found

    learn_on_two(tmp_path, runs(tmp_path / "two"))
    for one in runs(tmp_path / "one", batch_size=4):
        learn(**one)
    for task in made:
        two, one = (tmp_path / name / task / "seed-0" / "checkpoint-3" for name in ("two", "one"))
        found, wanted = (
            [(entry["loss"], entry["grad_norm"]) for entry in logged(path)["log_history"] if "loss" in entry]
            for path in (two, one)
        )
        assert len(found) == 3
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=2e-5, atol=0, msg=task)


@pytest.mark.slow
@pytest.mark.several_processes
def test_losses_of_patterns_are_learned_in_two_processes(checkpoints: Path, tmp_path: Path) -> None:
    patterns = {
        "etc": (hf_sparse.pattern("etc", radius=16, num_global=16, segments="given"), {"cpc": 0.5}),
        "sac": (hf_sparse.pattern("sac"), {"policy": 0.5}),
    }
    data = write(tmp_path / "data", plain)
    runs = []
    for key, (pattern, fields) in patterns.items():
        model = tmp_path / key
        hf_sparse.convert(checkpoints / "dense", model, pattern, max_length=128, verify=False)
        steps = {"max_steps": 3, "save_steps": 3, "packing": False, "truncate": True, **fields}
        runs.append({"task": "mlm", "arguments": recipe(str(model), data, tmp_path / f"{key}-run", **steps)})
    learn_on_two(tmp_path, runs)
    for key in patterns:
        (run_,) = json.loads((tmp_path / f"{key}-run" / "results.json").read_text())["runs"]
        assert len(run_["losses"]) == 3
        assert all(loss > 0 for loss in run_["losses"])
    before, after = (
        AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "sac", tmp_path / "sac-run" / "seed-0")
    )
    # predictors learn from their reward alone
    learned = [name for name in after if "sparse_state" in name and not torch.equal(after[name], before[name])]
    assert learned


@pytest.mark.slow
@pytest.mark.several_processes
def test_two_processes_go_on_inside_the_second_epoch(dataset: str, checkpoints: Path, tmp_path: Path) -> None:
    classifier = sparse_checkpoint(tmp_path / "model", LONGFORMER, hidden_dropout_prob=0.1)
    data = write(tmp_path / "data", plain)

    def runs(folder: str, **fields: Any) -> list[dict[str, Any]]:
        steps = {"epochs": 2.0, "save_steps": 6, **fields}
        masked = recipe(
            str(checkpoints / "sparse"), data, tmp_path / folder / "mlm", packing=False, truncate=True, **steps
        )
        return [
            {"arguments": recipe(classifier, dataset, tmp_path / folder / "classify", **steps)},
            {"task": "mlm", "arguments": masked},
        ]

    learn_on_two(tmp_path, [*runs("whole"), *runs("parts")])
    for task in ("classify", "mlm"):
        folder = tmp_path / "parts" / task / "seed-0"
        # an epoch has four steps
        shutil.rmtree(folder / "checkpoint-8")
        (folder / "run.json").unlink()
    learn_on_two(tmp_path, runs("parts", resume=True))
    for task in ("classify", "mlm"):
        found, wanted = (numbers(tmp_path / name / task / "seed-0" / "checkpoint-8") for name in ("parts", "whole"))
        assert found.equal(wanted), task


def test_centroids_move_with_each_batch_so_that_accumulating_two_is_another_run(dataset: str, tmp_path: Path) -> None:
    model = sparse_checkpoint(tmp_path / "routing", ROUTING)
    for name, batch in (("whole", 4), ("parts", 2)):
        fields = {"max_steps": 2, "batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        learn(recipe(model, dataset, tmp_path / name, **fields), sgd=True)
    whole, parts = (load_file(tmp_path / name / "seed-0" / "model.safetensors") for name in ("whole", "parts"))
    name = "bert.encoder.layer.0.attention.self.sparse_state.weight"
    assert (whole[name] - parts[name]).norm() > 1e-3 * whole[name].norm()


def test_a_run_goes_on_from_before_a_checkpoint_that_was_cut_short(dataset: str, tmp_path: Path) -> None:
    model = sparse_checkpoint(tmp_path, LONGFORMER, hidden_dropout_prob=0.1)
    fields = {"batch_size": 4, "epochs": 2.0}
    for name in ("whole", "parts"):
        learn(recipe(model, dataset, tmp_path / name, **fields))
    cut = tmp_path / "parts" / "seed-0" / "checkpoint-8"
    (cut / "trainer_state.json").unlink()
    (cut / "optimizer.pt").write_bytes(b"")
    # and the run was not done
    (cut.parent / "run.json").unlink()
    learn(recipe(model, dataset, tmp_path / "parts", **fields, resume=True))
    found, wanted = (
        load_file(tmp_path / name / "seed-0" / "checkpoint-8" / "model.safetensors") for name in ("parts", "whole")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], weights) for name, weights in wanted.items())
    assert numbers(cut).equal(numbers(tmp_path / "whole" / "seed-0" / "checkpoint-8"))


@pytest.mark.slow
@pytest.mark.several_processes
def test_the_printed_command_starts_two_processes(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(recipe_app, "hf-sparse recipe", ["configs"])
    printed = re.search(r"^Several processes on a CPU: (torchrun .*) \.\.\.$", capsys.readouterr().out, re.MULTILINE)
    assert printed
    launcher, *rest = shlex.split(printed[1])
    model = sparse_checkpoint(tmp_path, LONGFORMER)
    own = ["--model", model, "--dataset", dataset, "--output", str(tmp_path / "run"), "--max-steps", "2"]
    code, _, complained = finish(start([str(Path(sys.executable).parent / launcher), *rest, *own]), seconds=240)
    assert code == 0, complained[-4000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.several_processes
def test_accelerate_starts_a_recipe_with_a_config_that_ships(dataset: str, tmp_path: Path) -> None:
    model = sparse_checkpoint(tmp_path, LONGFORMER)
    own = ["--model", model, "--dataset", dataset, "--output", str(tmp_path / "run"), "--max-steps", "2"]
    accelerate = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    launcher = start([*accelerate, "-m", "hf_sparse.recipes.finetune", "classify", *own])
    code, _, complained = finish(launcher, seconds=240)
    assert code == 0, complained[-4000:]
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["processes"], found["runs"][0]["steps"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.several_processes
@pytest.mark.parametrize("packing", [True, False])
def test_two_processes_share_a_stream(packing: bool, checkpoints: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data", plain)
    fields = {"max_steps": 3, "save_steps": 3, "streaming": True, "packing": packing, "truncate": True}
    held = recipe(str(checkpoints / "sparse"), data, tmp_path / "run", **fields)
    learn_on_two(tmp_path, [{"task": "mlm", "arguments": held}])
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (found["processes"], found["runs"][0]["steps"]) == (2, 3)
    assert all(loss > 0 for loss in found["runs"][0]["losses"])


def _wait_for_one_that_is_gone(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.distributed.barrier()
    if rank == 1:
        # without a fault, so that whoever started both does not end the other
        os._exit(0)
    try:
        with telling_of_lost_processes(folder / "run"):
            torch.distributed.all_reduce(torch.ones(3))
    except LostProcessError as error:
        (folder / "said").write_text(str(error))
    os._exit(0)


@pytest.mark.slow
@pytest.mark.several_processes
def test_a_process_that_waits_for_one_that_is_gone_says_how_to_go_on(tmp_path: Path) -> None:
    mp.spawn(_wait_for_one_that_is_gone, (tmp_path,), nprocs=2)
    said = (tmp_path / "said").read_text()
    assert said.startswith("another of the 2 processes has ended or does not answer")
    assert said.endswith(f"go on from the last checkpoint in {tmp_path / 'run'} with --resume")
    with pytest.raises(RuntimeError, match="connection closed"), telling_of_lost_processes(tmp_path):
        # of one process alone it is another fault
        raise RuntimeError("connection closed")


@pytest.mark.slow
@pytest.mark.several_processes
def test_a_run_whose_process_is_killed_ends_and_is_gone_on_with_to_the_same_losses(
    dataset: str, tmp_path: Path
) -> None:
    model = sparse_checkpoint(tmp_path, LONGFORMER, hidden_dropout_prob=0.1)
    whole = recipe(model, dataset, tmp_path / "whole", epochs=3.0)
    parts = recipe(model, dataset, tmp_path / "parts", epochs=3.0)
    (tmp_path / "runs.json").write_text(json.dumps([{"arguments": whole}, {"arguments": parts, "end_at": 6}]))
    launcher = start([*ON_TWO, "-m", "tests.ranks.learning", str(tmp_path / "runs.json")])
    code, _, complained = finish(launcher, seconds=240)
    ended = time.time()
    assert code == 1
    # the launcher ends the other one before it has noticed, and says which was the first
    assert re.search(r"Root Cause.*rank *: 1 .*SIGKILL", complained, re.DOTALL)
    assert ended - (tmp_path / "parts" / "killed").stat().st_mtime < 60
    held = {name: tmp_path / name / "seed-0" for name in ("whole", "parts")}
    # dropout moves the generators of the ranks apart, and yet each document is read once an epoch
    history = logged(held["whole"] / "checkpoint-12")["log_history"]
    seen = {entry["step"]: entry["num_input_tokens_seen"] for entry in history if "loss" in entry}
    assert 3 * seen[8] == 2 * seen[12]
    assert not (held["parts"] / "checkpoint-8").exists()
    assert logged(held["parts"] / "checkpoint-4")["global_step"] == 4
    AutoModelForSequenceClassification.from_pretrained(held["parts"] / "checkpoint-4")
    learn_on_two(tmp_path, [{"arguments": {**parts, "resume": True}}])
    assert numbers(held["parts"] / "checkpoint-12").equal(numbers(held["whole"] / "checkpoint-12"))
    found, wanted = (
        json.loads((tmp_path / name / "results.json").read_text())["runs"][0] for name in ("parts", "whole")
    )
    assert found["losses"] == wanted["losses"]
    assert found["loss"] == wanted["loss"]
