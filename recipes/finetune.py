"""Fine-tuning: a task, a dataset and a sparse checkpoint, run by ``Trainer`` on one process or many.

``hf-sparse recipe``, ``accelerate launch -m hf_sparse.recipes.finetune`` and ``torchrun -m hf_sparse.recipes.finetune`` take
the same arguments.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_sparse.errors import RecipeError
from hf_sparse.integration.families import family_of
from hf_sparse.integration.hub import check_account, clean_token
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.documents import read_splits, some_of
from hf_sparse.recipes.hub import push_run
from hf_sparse.recipes.metrics import load_metric
from hf_sparse.recipes.processes import telling_of_lost_processes
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.results import write_results
from hf_sparse.recipes.tasks import TASKS
from hf_sparse.recipes.training import Reader, read_json, train

# what a folder was begun with
BEGUN = "recipe.json"


def finetune(name: str, arguments: RecipeArguments) -> dict[str, Any]:
    """Train and judge a model for each seed, and return the results, which are written to the output folder as well.

    Args:
        name: of the task.
        arguments: everything else.

    Raises:
        RecipeError: if the checkpoint, the dataset or the output folder do not fit what is asked for.
        PushError: if the model of the first seed could not be pushed; it is in its folder.
        ValueError: if an argument is of other tasks alone.
        FailedRunError: if a run failed on the way.
    """
    arguments = arguments.for_task(name)
    # models and datasets may be the Hub's
    clean_token(None)
    readers = _readers(name, arguments)
    _check_launcher(name, arguments)
    _check_metric(arguments)
    folder = Path(arguments.output)
    pushes = arguments.push_to_hub is not None and is_first_process()
    if pushes:
        check_account()
    begun = _what_a_run_is(name, arguments)
    _check_folder(folder, begun, arguments)
    columns = TASKS[name].columns(arguments)
    splits = read_splits(arguments, columns)
    # each keeps what it chose, and what it reads answers in
    tasks = {reader.name: TASKS[name](splits, arguments) for reader in readers}
    if arguments.train_size is not None:
        # what there is to tell apart is known from all of them
        splits["train"] = some_of(splits["train"], arguments.train_size, columns[0])
    # a dense model reads an image in the size it knows, and chunks of what the sparse one reads
    processors = {
        reader.name: TASKS[name].processor(reader.source if reader.name == "truncated" else arguments.model)
        for reader in readers
    }
    encoded = {
        reader.name: {
            kind: tasks[reader.name].encode(split, kind, processors[reader.name], reader.reading)
            for kind, split in splits.items()
        }
        for reader in readers
    }
    # what is read has to stay the same as well
    begun["documents"] = {kind: len(split) if hasattr(split, "__len__") else None for kind, split in splits.items()}
    begun["labels"] = getattr(tasks["sparse"], "names", None)
    _check_folder(folder, begun, arguments)
    begin = functools.partial(_begin_folder, folder, begun)
    with telling_of_lost_processes(folder):
        runs = [
            train(tasks[reader.name], reader, arguments, seed, encoded[reader.name], processors[reader.name], begin)
            for seed in arguments.seeds
            for reader in readers
        ]
    results = {
        "task": name,
        "arguments": dataclasses.asdict(arguments),
        "splits": begun["documents"],
        "models": {reader.name: {"title": reader.title, **dataclasses.asdict(reader.reading)} for reader in readers},
        "runs": runs,
    }
    if is_first_process():
        write_results(folder, results)
    if pushes:
        push_run(name, arguments, runs[0])
    return results


def is_first_process() -> bool:
    """Say whether this process writes for all."""
    return int(os.environ.get("RANK", "0")) == 0


def _readers(name: str, arguments: RecipeArguments) -> list[Reader]:
    """Return the model and the baselines that are asked for."""
    config = _config(arguments.model)
    if getattr(config, "sparse_attention", None) is None:
        of_images = "--pattern image_2d --image-size 512"
        of_texts = f"--pattern longformer --max-length {arguments.max_length or 4096}"
        raise RecipeError(
            f"{arguments.model} is dense; convert it first: hf-sparse convert {arguments.model} "
            f"{Path(arguments.model).name}-sparse {of_images if name == 'classify-images' else of_texts}"
        )
    longest = family_of(config).length(config)
    if arguments.max_length is not None:
        if arguments.max_length > longest:
            raise RecipeError(
                f"--max_length={arguments.max_length} is more than the {longest} tokens of {arguments.model}; convert its "
                f"dense checkpoint again with --max-length {arguments.max_length}"
            )
        longest = arguments.max_length
    pattern = config.sparse_attention["pattern"]
    reading = Reading(longest, cuts=arguments.truncate)
    readers = [Reader("sparse", f"{pattern.get('key', 'sparse')}, {longest} tokens", arguments.model, reading)]
    if arguments.baselines:
        dense = _config(arguments.baselines)
        if getattr(dense, "sparse_attention", None) is not None:
            raise RecipeError(f"--baselines names {arguments.baselines}, which is sparse; name the dense checkpoint")
        if getattr(dense, "vocab_size", None) != getattr(config, "vocab_size", None):
            raise RecipeError(
                f"--baselines names {arguments.baselines}, whose vocabulary is another ({dense.vocab_size} tokens, not "
                f"{config.vocab_size}); name the dense checkpoint that {arguments.model} was converted from"
            )
        own = min(family_of(dense).length(dense), longest)
        for kind, title, how in (
            ("truncated", TASKS[name].title_of_truncated(arguments, own), Reading(own, cuts=True, is_dense=True)),
            (
                "chunks",
                f"dense, {longest} tokens in chunks of {own}",
                Reading(longest, own, arguments.truncate, is_dense=True),
            ),
        ):
            if kind in TASKS[name].baselines:
                readers.append(Reader(kind, title, arguments.baselines, how))
    return readers


def _config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source!r} cannot be loaded: {error}") from error


def _check_launcher(name: str, arguments: RecipeArguments) -> None:
    """Check that what is asked for runs where weights are spread over processes, if the launcher spreads them."""
    spreads = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    spread = next((one for one, said in spreads.items() if os.environ.get(said, "").lower() in ("1", "true")), None)
    asked = {
        f"{name} judges the model before it is trained": TASKS[name].judges_before,
        "--lora merges adapters at the end": arguments.lora,
        "--policy and --cpc run parts of the model by themselves": arguments.policy or arguments.cpc,
    }
    for why, is_asked in asked.items():
        if spread and is_asked:
            raise RecipeError(f"{why}, which {spread} does not allow; take the config ddp, or one process")


def _check_metric(arguments: RecipeArguments) -> None:
    """Check before anything is trained that the metric that was asked for is there."""
    if arguments.metric is None:
        return
    try:
        load_metric(arguments.metric)
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"--metric {arguments.metric} cannot be loaded: {error}") from error


def _check_folder(folder: Path, wanted: dict[str, Any], arguments: RecipeArguments) -> None:
    """Check that the output folder is free, or holds what is to be gone on with; the first process does it for all."""
    if not is_first_process():
        return
    if folder.is_file():
        raise RecipeError(f"{folder} is a file; name a folder by --output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not arguments.resume:
        raise RecipeError(f"{folder} is not empty; pass --resume to go on with it, or name another folder by --output")
    held = read_json(folder / BEGUN) if (folder / BEGUN).is_file() else {}
    for field, value in wanted.items():
        # baselines may be added later, or left away, and older folders do not say how many processes there were
        is_free = field == "baselines" and None in (held.get(field), value)
        is_free |= field == "processes" and bool(held) and field not in held
        if held.get(field) != value and not is_free:
            raise RecipeError(
                f"{folder} was begun with {field}={_short(held.get(field))}, not {_short(value)}; name another folder by "
                "--output"
            )


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) < 80 else f"{said[:76]}..."


def _begin_folder(folder: Path, begun: dict[str, Any]) -> None:
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEGUN).write_text(json.dumps(begun, indent=2) + "\n", encoding="utf-8")


def _what_a_run_is(name: str, arguments: RecipeArguments) -> dict[str, Any]:
    """Return what has to stay the same when a run is gone on with: all that is not where, how many or on what."""
    free = {"output", "resume", "use_cpu", "push_to_hub", "seeds", "gradient_checkpointing"}
    held = dataclasses.asdict(arguments)
    config = AutoConfig.from_pretrained(arguments.model).to_dict()
    # where it lies and who wrote it may change
    said = json.dumps({**config, "_name_or_path": "", "transformers_version": ""}, sort_keys=True, default=str)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    own = {"task": name, "processes": processes, "config_of_model": hashlib.sha256(said.encode()).hexdigest()[:16]}
    return {**own, **{field: value for field, value in held.items() if field not in free}}


if __name__ == "__main__":
    from hf_sparse.console import run
    from hf_sparse.recipes.command import recipe_app

    run(recipe_app, "hf_sparse.recipes.finetune")
