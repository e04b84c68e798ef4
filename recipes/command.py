"""The commands ``recipe``: fine-tune a sparse checkpoint, and configs of accelerate for several processes."""

from pathlib import Path
from typing import Annotated

import typer

from hf_sparse.console import make_app
from hf_sparse.errors import RecipeError

CONFIGS = Path(__file__).parent / "configs"
# how several processes are started on a CPU; standalone takes a free port, so two runs on one machine do not meet
ON_CPU = "torchrun --standalone --nproc-per-node 2 -m hf_sparse.recipes.finetune classify --use-cpu ..."

recipe_app = make_app()


@recipe_app.callback()
def top() -> None:
    """Fine-tune a sparse checkpoint, or list accelerate's configs."""


@recipe_app.command(
    "classify",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def classify(context: typer.Context) -> None:
    """Train a classifier of long documents, with one label or several for each; --help lists the arguments.

    \b
    Example:
      hf-sparse recipe classify --model roberta-4096 --dataset contracts/ --output run --label-column labels
    """
    try:
        from hf_sparse.recipes.arguments import read_arguments
        from hf_sparse.recipes.finetune import finetune
    except ImportError as error:
        raise RecipeError(f"recipes need {error.name}; pip install 'hf-sparse[recipes]'") from error
    arguments = read_arguments(context.args, context.command_path)
    results = finetune("classify", arguments)
    for run in results["runs"]:
        said = ", ".join(f"{name} {value:.4f}" for name, value in run["metrics"].items())
        print(f"seed {run['seed']}: {said} on {results['splits']['test']} documents; {run['seconds']:.0f} s")
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
