"""The commands ``recipe``: fine-tune a sparse checkpoint, and configs of accelerate for several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse.console import make_app
from hf_sparse.errors import RecipeError

CONFIGS = Path(__file__).parent / "configs"
# how several processes are started on a CPU; standalone takes a free port, so two runs on one machine do not meet
ON_CPU = "torchrun --standalone --nproc-per-node 2 -m hf_sparse.recipes.finetune classify --use-cpu ..."
# what each task is, and what it is given beside --model, --dataset and --output
TASKS = {
    "classify": ("Classify long documents, with one label or several for each", "--label-column labels"),
    "answer": ("Answer questions by a span of one long context", "--baselines roberta-base"),
    "tag": ("Tag the words of long documents, such as names", "--label-column ner_tags"),
    "summarize": ("Summarise long documents, by an encoder and decoder", "--max-summary-length 256"),
    "mlm": ("Go on training a masked language model", "--save-steps 500"),
    "clm": ("Go on training a causal language model", "--streaming --max-steps 1000 --save-steps 500"),
    "retrieve": ("Embed long documents so that queries find them", "--query-column queries.query"),
    "classify-images": ("Classify images at high resolution", "--text-column photo"),
    "distill": ("Let a sparse model learn from the dense one it was converted from", "--teacher roberta-base"),
}

recipe_app = make_app()


@recipe_app.callback()
def top() -> None:
    """Fine-tune a sparse checkpoint, or list accelerate's configs."""


def _add(name: str, what: str, example: str) -> None:
    def command(context: typer.Context) -> None:
        _finetune(name, context)

    command.__doc__ = f"""{what}; --help lists the arguments.

    \b
    Example:
      hf-sparse recipe {name} --model roberta-4096 --dataset documents/ --output run {example}
    """
    make: Callable[[Callable[[typer.Context], None]], object] = recipe_app.command(
        name, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
    )
    make(command)


for _name, (_what, _example) in TASKS.items():
    _add(_name, _what, _example)


def _finetune(name: str, context: typer.Context) -> None:
    try:
        from hf_sparse.recipes.arguments import read_arguments
        from hf_sparse.recipes.finetune import finetune, is_first_process
        from hf_sparse.recipes.processes import part
    except ImportError as error:
        raise RecipeError(f"recipes need {error.name}; pip install 'hf-sparse[recipes]'") from error
    arguments = read_arguments(context.args, context.command_path, name)
    results = finetune(name, arguments)
    part()
    if not is_first_process():
        return
    for run in results["runs"]:
        said = ", ".join(f"{metric} {value:.4f}" for metric, value in run["metrics"].items())
        title = results["models"][run["model"]]["title"]
        print(f"{title}, seed {run['seed']}: {said}; {run['seconds']:.0f} s")
    print(f"{arguments.output}: results.md, results.json and a model for each seed")


@recipe_app.command("configs")
def configs(
    name: Annotated[str | None, typer.Argument(help="One of them, to print the path of its file alone.")] = None,
) -> None:
    """List accelerate's configs for one process and many, and how several start on a CPU.

    \b
    Example:
      accelerate launch --config_file "$(hf-sparse recipe configs ddp)" -m hf_sparse.recipes.finetune classify ...
    """
    files = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name is not None:
        if name not in files:
            raise ValueError(f"unknown config {name!r}; known: {', '.join(files)}")
        print(files[name])
        return
    for key, path in files.items():
        print(f"{key:6} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    print(f"\nSeveral processes on a CPU: {ON_CPU}")
