"""Run recipes, one after another, as ``torchrun`` starts them: ``torchrun -m tests.ranks.learning RUNS``.

RUNS is a file with a list of objects: "arguments" of a recipe; its "task", if it is not to classify; "sgd", whether plain
gradient descent takes the place of AdamW; "end_at", a step at which the last process kills itself.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_sparse.console import run
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.command import recipe_app
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.processes import part


def learn(arguments: dict[str, Any], *, task: str = "classify", sgd: bool = False) -> None:
    """Run one recipe."""
    create = Trainer.create_optimizer
    if sgd:
        Trainer.create_optimizer = plain_descent  # type: ignore[method-assign]
    try:
        finetune(task, RecipeArguments(**arguments))
    finally:
        Trainer.create_optimizer = create  # type: ignore[method-assign]


def plain_descent(self: Trainer, model: Any = None) -> Any:
    """Take plain gradient descent for the optimizer: no step of it is larger than its gradient says."""
    self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
    return self.optimizer


def learn_until(arguments: dict[str, Any], end_at: int) -> None:
    """Run one recipe as the command line does, and leave with its exit code; the last process is killed on the way."""
    step = Trainer.training_step

    def step_or_end(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        if is_last and self.state.global_step == end_at:
            (Path(arguments["output"]) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    Trainer.training_step = step_or_end  # type: ignore[method-assign]
    line = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    run(recipe_app, "recipe", ["classify", *line])


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        if "end_at" in one:
            learn_until(one["arguments"], one["end_at"])
        learn(one["arguments"], task=one.get("task", "classify"), sgd=one.get("sgd", False))
    part()
