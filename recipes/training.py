"""One run: a model trained by ``Trainer``, judged, and left in its folder."""

import contextlib
import ctypes
import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from hf_sparse.errors import FailedRunError, RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.checkpoints import (
    CLOCK,
    is_over,
    last_whole_checkpoint,
    save_beside_adapters,
    state_of,
    take_home,
)
from hf_sparse.recipes.chunks import read_in_chunks_
from hf_sparse.recipes.lora import add_lora, merge_lora
from hf_sparse.recipes.losses import added_losses
from hf_sparse.recipes.processes import tells_of_a_peer
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.parent import Task

# what a run found, in its folder: it is done
DONE = "run.json"


@dataclass(frozen=True)
class Reader:
    """A model that a recipe trains, and how it reads.

    Attributes:
        name: "sparse", or that of a baseline: "truncated" or "chunks".
        title: what tables call it.
        source: the checkpoint.
        reading: how it reads documents.
    """

    name: str
    title: str
    source: str
    reading: Reading


class StepClock(TrainerCallback):
    """Adds up the seconds of the optimizer's steps, without what is evaluated and saved in between; checkpoints keep them."""

    def __init__(self) -> None:
        self.seconds, self._start = 0.0, 0.0

    def go_on_from(self, checkpoint: str) -> None:
        """Begin with the seconds up to a checkpoint."""
        self.seconds = float(json.loads(Path(checkpoint, CLOCK).read_text(encoding="utf-8")))

    def on_save(self, args: Any, state: Any, *_: Any, model: Any = None, **__: Any) -> None:
        if state.is_world_process_zero:
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", CLOCK)
            save_beside_adapters(model, path.parent)
            path.write_text(json.dumps(self.seconds), encoding="utf-8")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter() - self._start


class Watch(TrainerCallback):
    """Ends a run whose loss is no number."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not math.isfinite(float((logs or {}).get("loss", 0.0))):
            raise FailedRunError(
                f"the loss of step {state.global_step} is {logs['loss']}: the run has diverged; take a smaller "  # type: ignore[index]
                f"--learning_rate and another --output ({args.output_dir} keeps its checkpoints)"
            )


def train(
    task: Task,
    reader: Reader,
    arguments: RecipeArguments,
    seed: int,
    splits: dict[str, Any],
    tokenizer: Any,
    begin: Callable[[], None],
) -> dict[str, Any]:
    """Train and judge one model, and leave it in the folder of its seed; what is done already is read there.

    Args:
        task: what to learn.
        reader: which model.
        arguments: everything else.
        seed: of the run.
        splits: "train", "validation" and "test" as the reader reads them.
        tokenizer: of the model.
        begin: called once nothing is left that may not fit, before anything is written.
    """
    folder = folder_of(reader, arguments, seed)
    if (folder / DONE).is_file():
        return read_json(folder / DONE)
    start = time.perf_counter()
    set_seed(seed)
    model = task.load(reader.source)
    if reader.reading.chunk:
        read_in_chunks_(model, reader.reading.chunk)
    losses = added_losses(model, arguments, tokenizer) if reader.name == "sparse" else []
    if arguments.lora:
        model = add_lora(model, arguments.lora, task.made)
    collator = task.collator(tokenizer, model, reader.reading)
    begin()
    clock = StepClock()
    stopping = [EarlyStoppingCallback(arguments.patience)] if arguments.patience else []
    trainer = _with_losses(task.trainer, losses)(
        model=model,
        args=_training_arguments(task, arguments, seed, folder),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=lambda held: _validated(task, held),
        preprocess_logits_for_metrics=task.reduce,
        callbacks=[clock, Watch(), *stopping],
    )
    # heads take a number of tokens that they make nothing of: Trainer would not average over the batches of a step
    trainer.model_accepts_loss_kwargs = task.counts_tokens
    trainer.head, trainer.head_rate = task.made, arguments.head_learning_rate
    task.prepare(trainer)
    last = last_whole_checkpoint(folder) if arguments.resume else None
    if last is not None:
        _go_on(trainer, last, clock, stopping)
    with _failing(folder):
        before = {"before": _judged_before(task, trainer, splits)} if task.judges_before else {}
        _begin_peak(trainer.args.device)
        # sharded, a model is loaded where it is trained alone
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if last is not None and is_over(last) and not is_sharded:
            trainer.take_over(last)
        else:
            trainer.train(resume_from_checkpoint=last)
        judged = _judged(task, trainer, splits)
    run = {
        "model": reader.name,
        "seed": seed,
        "folder": str(folder),
        "steps": trainer.state.global_step,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": clock.seconds,
        "tokens_per_second": _speed(trainer.state.num_input_tokens_seen, clock.seconds),
        "peak_memory_mib": _peak_memory(trainer.args.device),
        **before,
        **judged,
    }
    with _failing(folder):
        if arguments.lora:
            trainer.model = merge_lora(trainer.model)
        if trainer.is_fsdp_enabled:
            # checkpoints may be sharded, a model is not
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            if not any(folder.glob("*.safetensors")):
                raise FailedRunError(f"Trainer wrote no weights to {folder}, which keeps its checkpoints")
            run["wall_seconds"] = time.perf_counter() - start
            (folder / DONE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    return run


def folder_of(reader: Reader, arguments: RecipeArguments, seed: int) -> Path:
    """Return the folder of a run."""
    own = Path(arguments.output) if reader.name == "sparse" else Path(arguments.output, reader.name)
    return own / f"seed-{seed}"


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of an output folder holds.

    Raises:
        RecipeError: if it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is damaged ({error}); remove it, and the run before it is done again") from error
    return found


def _go_on(trainer: Any, checkpoint: str, clock: StepClock, stopping: list[EarlyStoppingCallback]) -> None:
    """Give what a checkpoint says of its run to those whom Trainer does not tell."""
    clock.go_on_from(checkpoint)
    for one in stopping:
        held = state_of(checkpoint)["stateful_callbacks"][type(one).__name__]
        one.early_stopping_patience_counter = held["attributes"]["early_stopping_patience_counter"]
    # the others have read what is now written
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        take_home(checkpoint)
    trainer.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _failing(folder: Path) -> Iterator[None]:
    """Say of what goes wrong in the middle of a run that it had begun.

    Raises:
        FailedRunError: in the place of an error of a value, or of the system.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, FailedRunError) or tells_of_a_peer(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise FailedRunError(f"{said} (after training had begun; {folder} keeps its checkpoints)") from error


def _validated(task: Task, held: Any) -> dict[str, float]:
    """Return the metrics of the validation split, with what is chosen on it chosen anew."""
    task.choose(held.predictions, held.label_ids)
    return task.metrics(held.predictions, held.label_ids, "validation")


def _judged(task: Task, trainer: Any, splits: dict[str, Any]) -> dict[str, Any]:
    """Return loss and metrics of the test split, after what is chosen on the validation split was chosen there."""
    metrics, trainer.compute_metrics = trainer.compute_metrics, None
    held = trainer.predict(splits["validation"])
    task.choose(held.predictions, held.label_ids)
    found = trainer.predict(splits["test"])
    trainer.compute_metrics = metrics
    scores = task.metrics(found.predictions, found.label_ids, "test")
    return {"metrics": scores, "loss": (found.metrics or {}).get("test_loss"), **task.details()}


def _judged_before(task: Task, trainer: Any, splits: dict[str, Any]) -> dict[str, float]:
    """Return the metrics before training.

    Accelerate takes a model that it has prepared for judging for one that is prepared to be trained, and each process would
    train its own: the model is given back as it was.
    """
    found: dict[str, float] = _judged(task, trainer, splits)["metrics"]
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.model._is_accelerate_prepared = False
    return found


def _with_losses(parent: Any, losses: list[Callable[[dict[str, Any], Tensor], Tensor]]) -> Any:
    """Return a trainer that adds losses to the task's own, in training."""
    if not losses:
        return parent

    class WithLosses(parent):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if model.training:
                # what counts tokens gives a batch's part of the step's mean
                parts = self.current_gradient_accumulation_steps if self.model_accepts_loss_kwargs else 1
                loss = loss + sum(added(inputs, parts * loss) for added in losses) / parts
            return (loss, outputs) if return_outputs else loss

    return WithLosses


def _training_arguments(task: Task, arguments: RecipeArguments, seed: int, folder: Path) -> Any:
    # transformers 5.23 calls it anew, and 5.20 does not know the new name
    names = "activation_checkpointing", "gradient_checkpointing"
    checkpointing: dict[str, Any] = {
        next(name for name in names if hasattr(TrainingArguments, name)): arguments.gradient_checkpointing
    }
    when = "steps" if arguments.save_steps else "epoch"
    settings: dict[str, Any] = dict(
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
        train_sampling_strategy="random" if arguments.streaming else "group_by_length",
        # what counts tokens sees to the processes itself
        average_tokens_across_devices=False,
        # a stream's batches are read by each process for itself: sent around they would have to be of one length
        accelerator_config={"dispatch_batches": False} if arguments.streaming else None,
        # a loss that is no number would be logged as 0
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy=when,
        save_strategy=when,
        eval_steps=arguments.save_steps or None,
        save_steps=arguments.save_steps or 500,
        logging_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=task.best,
        greater_is_better=task.is_larger_better,
        report_to=["tensorboard"],
        # what a collator adds is no column of the dataset
        remove_unused_columns=False,
        label_names=list(task.labels),
        **checkpointing,
    )
    return task.settings(**{**settings, **task.more})


def _begin_peak(device: torch.device) -> None:
    """Forget the most memory that was held so far; Linux can, elsewhere the process's own record goes on."""
    # what earlier runs of the process left would count as this one's: models in cycles, and what the allocator keeps of them
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None) is not None:
        trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # where it is not allowed, earlier runs of the process count too
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> float:
    """Return the most memory that was held, in MiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    # of what is no Linux, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _speed(tokens: int, seconds: float) -> float | None:
    """Return tokens a second; None where nothing was trained, or what is read are no tokens."""
    return tokens / seconds if tokens and seconds else None
