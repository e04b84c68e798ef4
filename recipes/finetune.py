"""Fine-tuning: a task, a dataset and a sparse checkpoint, run by ``Trainer`` on one process or many.

``hf-sparse recipe``, ``accelerate launch -m hf_sparse.recipes.finetune`` and ``torchrun -m hf_sparse.recipes.finetune`` take
the same arguments.
"""

import dataclasses
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_sparse.errors import RecipeError
from hf_sparse.integration.positions import family_of
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.checkpoints import last_whole_checkpoint
from hf_sparse.recipes.documents import read_splits
from hf_sparse.recipes.order import OrderedTrainer
from hf_sparse.recipes.processes import telling_of_lost_processes
from hf_sparse.recipes.results import write_results
from hf_sparse.recipes.tasks.classify import Classification

TASKS = {"classify": Classification}
# what a folder was begun with
BEGUN = "recipe.json"


def finetune(name: str, arguments: RecipeArguments) -> dict[str, Any]:
    """Train and judge a model for each seed, and return the results, which are written to the output folder as well.

    Args:
        name: of the task.
        arguments: everything else.

    Raises:
        RecipeError: if the checkpoint, the dataset or the output folder do not fit what is asked for.
    """
    config = _sparse_config(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    longest = family_of(config).length(config)
    if arguments.max_length is not None:
        if arguments.max_length > longest:
            raise RecipeError(
                f"--max_length={arguments.max_length} is more than the {longest} tokens of {arguments.model}; convert its "
                f"dense checkpoint again with --max-length {arguments.max_length}"
            )
        longest = arguments.max_length
    folder = Path(arguments.output)
    _check_folder(folder, arguments)
    splits = read_splits(arguments, TASKS[name].columns(arguments))
    task = TASKS[name](splits, arguments)
    encoded = {kind: task.encode(split, tokenizer, longest) for kind, split in splits.items()}
    _begin_folder(folder, arguments)
    with telling_of_lost_processes(folder):
        runs = [_run(task, arguments, seed, encoded, tokenizer) for seed in arguments.seeds]
    results = {
        "task": name,
        "arguments": dataclasses.asdict(arguments),
        "splits": {kind: len(split) for kind, split in splits.items()},
        "longest_document": longest,
        "runs": runs,
    }
    if _is_first_process():
        write_results(folder, results)
    return results


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _sparse_config(source: str) -> Any:
    """Return the config of a sparse checkpoint, and say how to make one of a dense one."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source!r} cannot be loaded: {error}") from error
    if getattr(config, "sparse_attention", None) is None:
        raise RecipeError(
            f"{source} is dense; convert it first: hf-sparse convert {source} {Path(source).name}-sparse --pattern longformer "
            "--max-length 4096"
        )
    return config


def _check_folder(folder: Path, arguments: RecipeArguments) -> None:
    """Check that the output folder is free, or holds what is to be gone on with; the first process does it for all."""
    if not _is_first_process():
        return
    if folder.is_file():
        raise RecipeError(f"{folder} is a file; name a folder by --output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not arguments.resume:
        raise RecipeError(f"{folder} is not empty; pass --resume to go on with it, or name another folder by --output")
    begun = folder / BEGUN
    held = json.loads(begun.read_text(encoding="utf-8")) if begun.is_file() else {}
    for name, value in _what_a_run_is(arguments).items():
        if held.get(name) != value:
            raise RecipeError(
                f"{folder} was begun with {name}={held.get(name)!r}, not {value!r}; name another folder by --output"
            )


def _begin_folder(folder: Path, arguments: RecipeArguments) -> None:
    if _is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BEGUN).write_text(json.dumps(_what_a_run_is(arguments), indent=2) + "\n", encoding="utf-8")


def _what_a_run_is(arguments: RecipeArguments) -> dict[str, Any]:
    """Return what has to stay the same when a run is gone on with."""
    names = ("model", "dataset", "text_column", "label_column", "max_length", "epochs", "max_steps", "learning_rate")
    return {name: getattr(arguments, name) for name in names}


class StepClock(TrainerCallback):
    """Adds up the seconds of the optimizer's steps, without what is evaluated and saved in between."""

    def __init__(self) -> None:
        self.seconds, self._start = 0.0, 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._start


def _run(task: Any, arguments: RecipeArguments, seed: int, encoded: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Train and judge one model, and leave it in the folder of its seed."""
    folder = Path(arguments.output) / f"seed-{seed}"
    set_seed(seed)
    model = task.load(arguments.model)
    clock = StepClock()
    stopping = [EarlyStoppingCallback(arguments.patience)] if arguments.patience else []
    trainer = OrderedTrainer(
        model=model,
        args=_training_arguments(task, arguments, seed, folder),
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=task.collator(tokenizer, model),
        compute_metrics=task.metrics,
        callbacks=[clock, *stopping],
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    last = last_whole_checkpoint(folder) if arguments.resume else None
    seen = _tokens(last)
    trainer.train(resume_from_checkpoint=last)
    held = trainer.predict(encoded["validation"])
    task.choose(held.predictions, held.label_ids)
    found = trainer.predict(encoded["test"])
    trainer.save_model(str(folder))
    if arguments.push_to_hub and seed == arguments.seeds[0]:
        trainer.push_to_hub()
    return {
        "seed": seed,
        "steps": trainer.state.global_step,
        "metrics": task.metrics(found),
        "loss": (found.metrics or {})["test_loss"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "threshold": task.threshold if task.is_multilabel else None,
        "seconds": clock.seconds,
        # of a run that was finished already there is nothing to measure
        "tokens_per_second": (trainer.state.num_input_tokens_seen - seen) / clock.seconds if clock.seconds else 0.0,
        "peak_memory_mib": _peak_memory(),
    }


def _training_arguments(task: Any, arguments: RecipeArguments, seed: int, folder: Path) -> TrainingArguments:
    # transformers 5.23 calls it anew, and 5.20 does not know the new name
    names = "activation_checkpointing", "gradient_checkpointing"
    checkpointing: dict[str, Any] = {
        next(name for name in names if hasattr(TrainingArguments, name)): arguments.gradient_checkpointing
    }
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        warmup_steps=0.1,
        bf16=arguments.precision == "bf16",
        fp16=arguments.precision == "fp16",
        use_cpu=arguments.use_cpu,
        # a warning each time, where there is no GPU to copy to
        dataloader_pin_memory=torch.cuda.is_available() and not arguments.use_cpu,
        # documents of about one length together: less padding
        train_sampling_strategy="group_by_length",
        # losses of heads that do not count tokens would be multiplied by the number of processes
        average_tokens_across_devices=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task.best,
        report_to=["tensorboard"],
        push_to_hub=bool(arguments.push_to_hub) and seed == arguments.seeds[0],
        hub_model_id=arguments.push_to_hub,
        # what a collator adds is no column of the dataset
        remove_unused_columns=False,
        **checkpointing,
    )


def _tokens(checkpoint: str | None) -> int:
    """Return how many tokens had been seen when a checkpoint was written."""
    if checkpoint is None:
        return 0
    return int(json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))["num_input_tokens_seen"])


def _peak_memory() -> float:
    """Return the most memory that was held, in MiB: of the GPU, or of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    from hf_sparse.console import run
    from hf_sparse.recipes.command import recipe_app

    run(recipe_app, "hf_sparse.recipes.finetune")
