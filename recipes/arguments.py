"""What a recipe is told: one dataclass for the command line, a YAML file and several processes alike."""

import argparse
import dataclasses
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

# arguments that not every task has a use for
_TEXTS = ("classify", "answer", "tag", "summarize", "mlm", "clm", "retrieve")
TASKS_OF = {
    "label_column": ("classify", "answer", "tag", "summarize", "classify-images"),
    "query_column": ("answer", "retrieve"),
    "max_length": (*_TEXTS, "distill"),
    "truncate": _TEXTS,
    "baselines": (*_TEXTS, "classify-images"),
    "max_summary_length": ("summarize",),
    "metric": ("classify", "classify-images", "answer", "tag", "summarize", "retrieve"),
    "head_learning_rate": ("classify", "classify-images", "answer", "tag"),
    "packing": ("mlm", "clm"),
    "streaming": ("mlm", "clm", "distill"),
    "cpc": ("mlm",),
    "teacher": ("distill",),
    "short_share": ("distill",),
    "hidden": ("distill",),
    "attention": ("distill",),
}

# the least value of a number
_LEAST = {
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "train_size"), 1),
    **dict.fromkeys(("max_length", "max_summary_length"), 2),
    **dict.fromkeys(("patience", "lora", "save_steps", "weight_decay", "learning_rate"), 0),
    **dict.fromkeys(("policy", "cpc", "hidden", "attention", "short_share"), 0),
}
_KINDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _field(default: Any, help_: str) -> Any:
    return field(metadata={"help": help_}, default=default)


@dataclass
class RecipeArguments:
    """What to train, on what, and how; the help of each field is its documentation."""

    model: str = field(metadata={"help": "A sparse checkpoint: a folder, or the id of a model on the Hub."})
    dataset: str = field(
        metadata={
            "help": "The id of a dataset on the Hub, or a folder with <split>.parquet, .jsonl, .json, .csv or .txt, or of "
            "images."
        }
    )
    output: str = field(metadata={"help": "The folder to write: a model for each seed, results.json and results.md."})
    dataset_config: str | None = _field(None, "Which configuration of a dataset on the Hub that has several.")
    text_column: str | None = _field(None, "Column of the documents; by default text, context, tokens or image.")
    label_column: str | None = _field(None, "Column of what is to be said; by default label, answers, tags or summary.")
    query_column: str | None = _field(
        None,
        "Column of questions or queries; by default question or query. A dot leads into lists of records.",
    )
    train_split: str = _field("train", "Split to train on.")
    validation_split: str = _field("validation", "Split that chooses the best epoch, and thresholds.")
    test_split: str = _field("test", "Split that results are of.")
    max_length: int | None = _field(None, "Longest document, in tokens; the model's own limit if not given.")
    truncate: bool = _field(False, "Cut longer documents off; without it they are an error.")
    train_size: int | None = _field(None, "Documents to train on, chosen by their hash; all if not given.")
    epochs: float = _field(3.0, "Passes over the training split.")
    max_steps: int = _field(-1, "Steps of the optimizer, in the place of epochs; -1 leaves it to epochs.")
    batch_size: int | None = _field(
        None, "Documents of each process at a time; by default 1, of retrieve 4, which tells each from the others."
    )
    gradient_accumulation_steps: int | None = _field(
        None, "Batches that a step adds up; by default 8, of retrieve 2, whose batches are told apart by themselves."
    )
    learning_rate: float = _field(5e-5, "Largest learning rate; it rises over a tenth of the steps and falls to 0.")
    head_learning_rate: float | None = _field(
        None,
        "Of a head that the checkpoint does not have, which may take a hundred times as much; by default the same.",
    )
    weight_decay: float = _field(0.01, "Of AdamW.")
    precision: str | None = _field(
        None,
        "float32, bf16 or fp16: what is computed in half precision is up to autocast. By default what the launcher's config "
        "says, else float32.",
    )
    gradient_checkpointing: bool = _field(
        False, "Compute activations again in the backward pass: less memory, more time."
    )
    patience: int = _field(0, "Epochs without a better validation score after which training stops; 0 never does.")
    save_steps: int = _field(0, "Steps from one evaluation and checkpoint to the next; 0 is an epoch.")
    baselines: str | None = _field(
        None, "A dense checkpoint to train beside it: on documents cut to its length, and on chunks of that length."
    )
    metric: str | None = _field(
        None,
        "One more metric to be judged by: its id on the Hub, owner/name, or the path of a script; its code is run.",
    )
    max_summary_length: int = _field(128, "Longest summary, in tokens.")
    packing: bool = _field(True, "Join documents and cut them at the longest length, without reading across.")
    streaming: bool = _field(False, "Read the training split on the way; needs --max_steps.")
    teacher: str | None = _field(None, "The dense checkpoint to learn from.")
    short_share: float = _field(0.5, "Share of the steps in which documents are cut at its length.")
    hidden: float = _field(0.0, "Weight of the squared error of hidden states.")
    attention: float = _field(0.0, "Weight of the squared error of attention outputs.")
    lora: int = _field(
        0, "Rank of adapters that are trained, with positions, norms and heads, in the place of all weights."
    )
    policy: float = _field(0.0, "Weight of the policy loss of SAC's edges.")
    cpc: float = _field(0.0, "Weight of ETC's contrastive loss of segments; the paper has 0.2.")
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "One run for each, from the same checkpoint; results are their mean and spread."},
    )
    resume: bool = _field(False, "Go on with what stands in the output folder.")
    use_cpu: bool = _field(False, "Stay on the CPU where there is a GPU.")
    push_to_hub: str | None = _field(None, "Id on the Hub to push the model of the first seed to.")

    def __post_init__(self) -> None:
        for name in ("model", "dataset", "output", "baselines", "teacher"):
            if getattr(self, name) is not None:
                # paths will do
                setattr(self, name, str(getattr(self, name)))
        self._check_types()
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"--epochs must be above 0, got {self.epochs}")
        # transformers' Trainer would take it all the same
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.precision = self.precision or (launched if launched != "no" else "float32")
        if self.precision not in ("float32", "bf16", "fp16"):
            raise ValueError(f"--precision must be float32, bf16 or fp16, got {self.precision!r}")
        if launched not in ("no", self.precision):
            raise ValueError(
                f"--precision is {self.precision}, and mixed_precision of the launcher's config {launched}; leave --precision "
                "out, or change the config"
            )
        if self.policy and self.lora:
            raise ValueError(
                "--policy trains the predictors of sac, which --lora leaves as they are; leave one of them out"
            )
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must name at least one seed, none below 0 and none twice; got {self.seeds}")
        if self.short_share > 1:
            raise ValueError(f"--short_share must be at most 1, got {self.short_share}")
        if self.train_split in (self.validation_split, self.test_split):
            raise ValueError(f"--train_split {self.train_split} is judged too; name another split to train on")
        if self.head_learning_rate is not None and self.head_learning_rate <= 0:
            raise ValueError(f"--head_learning_rate must be above 0, got {self.head_learning_rate}")
        if self.streaming and self.max_steps < 1:
            raise ValueError("--streaming needs --max_steps: how many there are to come is not known")
        if self.streaming and self.train_size is not None:
            raise ValueError(
                "--train_size chooses from all documents, and --streaming has not seen them; leave one out"
            )

    def _check_types(self) -> None:
        """Check the types of what came from a file or a caller."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), typing.get_args(hint) or (hint,)
            if typing.get_origin(hint) is list:
                is_right = isinstance(value, list) and all(type(one) is int for one in value)
            else:
                is_right = type(value) in kinds or (float in kinds and type(value) is int)
            if not is_right:
                said = "a list of whole numbers" if typing.get_origin(hint) is list else _KINDS[kinds[0]]
                raise ValueError(f"--{name} must be {said}, got {value!r}")

    def for_task(self, name: str) -> "RecipeArguments":
        """Return them with what a task has for defaults of its own.

        Raises:
            ValueError: if something is asked for that the task has no use for, or cannot learn from.
        """
        for one in dataclasses.fields(self):
            tasks = TASKS_OF.get(one.name, (name,))
            if name not in tasks and getattr(self, one.name) != one.default:
                raise ValueError(f"--{one.name} is of {', '.join(tasks)}; {name} has no use for it")
        size, steps = (4, 2) if name == "retrieve" else (1, 8)
        found = dataclasses.replace(
            self,
            batch_size=self.batch_size or size,
            gradient_accumulation_steps=self.gradient_accumulation_steps or steps,
        )
        if name == "retrieve" and found.batch_size == 1:
            raise ValueError(
                "retrieve tells each document from the others of its batch, and --batch_size 1 has none; pass at least 2"
            )
        return found


def read_arguments(args: Sequence[str], prog: str, task: str = "") -> RecipeArguments:
    """Return the arguments of a command line; what it says goes before what a file says (``--config FILE``).

    Args:
        args: of the command line, without the name of the task.
        prog: what help and errors call the command.
        task: whose help leaves out what it has no use for; without it nothing is.

    Raises:
        ValueError: if an argument is unknown, lacking or out of range, or the file has an unknown key.
        OSError: if the file cannot be read.
        SystemExit: after ``--help``.
    """
    parser: Any = HfArgumentParser(RecipeArguments, prog=prog, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE", help="A YAML file of these arguments by their names.")
    parser.error = _raise
    for action in parser._actions:
        if task and task not in TASKS_OF.get(action.dest, (task,)):
            action.help = argparse.SUPPRESS
    given = list(args)
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config", nargs="?")
    file = before.parse_known_args(given)[0].config
    if file is not None:
        held = _read_file(Path(file))
        for action in parser._actions:
            action.required = action.required and action.dest not in held
        parser.set_defaults(**held)
    found = vars(parser.parse_args(given))
    found.pop("config")
    return RecipeArguments(**found)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    known = [f.name for f in dataclasses.fields(RecipeArguments)]
    if not isinstance(held, dict):
        raise ValueError(f"{path} must map arguments to values, got {type(held).__name__}")
    if unknown := sorted(set(map(str, held)) - set(known)):
        raise ValueError(f"{path} has the unknown key {unknown[0]!r}; known: {', '.join(known)}")
    return held


def _raise(message: str) -> None:
    raise ValueError(message)
