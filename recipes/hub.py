"""Pushing the model of a finished run to the Hub."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from hf_sparse.errors import PushError
from hf_sparse.integration.hub import push_folder
from hf_sparse.integration.pushing import model_card, readme_of
from hf_sparse.recipes.arguments import RecipeArguments

# checkpoints of the training, and what names folders of this machine
_LEFT_OUT = ("checkpoint-*", "runs/*", "training_args.bin", "run.json")


def push_run(name: str, arguments: RecipeArguments, run: dict[str, Any]) -> str:
    """Push the model that a run left, with a card that says how it was scored, and return the address of the commit.

    Args:
        name: of the task.
        arguments: of the recipe; ``push_to_hub`` names the place.
        run: what the run found.

    Raises:
        PushError: if the Hub cannot be reached or refuses.
    """
    folder, place = Path(run["folder"]), str(arguments.push_to_hub)
    config = AutoConfig.from_pretrained(folder)
    # layers without their weights
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    card = model_card(model, folder, place=place)
    scores = ", ".join(f"{metric} {value:.4f}" for metric, value in run["metrics"].items())
    trained = f"It was fine-tuned by `hf-sparse recipe {name}` in {run['steps']} steps (seed {run['seed']})."
    base = None if Path(arguments.model).is_dir() else arguments.model
    card = dataclasses.replace(card, origin=f"{card.origin}\n{trained} On the test split: {scores}.", base_model=base)
    (folder / "README.md").write_text(card.text(source=readme_of(arguments.model)), encoding="utf-8")
    try:
        commit = push_folder(folder, place, message=f"Fine-tune by hf-sparse recipe {name}", leave_out=_LEFT_OUT)
    except PushError as error:
        raise PushError(f"{error}; the model is in {folder}, and the same command with --resume pushes it") from None
    return str(commit.commit_url)
