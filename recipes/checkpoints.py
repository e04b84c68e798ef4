"""The checkpoints of a run, and which of them may be gone on with."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from hf_sparse.recipes.processes import count_processes

# seconds up to a checkpoint, in its folder: what is written last
CLOCK = "clock.json"
# what else was learned where adapters are trained, whose files hold nothing else
BESIDE = "beside_adapters.safetensors"


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, or None where there is none.

    ``Trainer`` writes its own state last, and ours comes behind it, so a checkpoint without them was cut short: by a kill, or a
    full disk. Files of weights and of the optimizer have to be as long as they say, too.

    Args:
        folder: of one run; need not be there.
    """
    steps = {}
    for path in folder.glob("checkpoint-*"):
        named = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if named and _is_whole(path):
            steps[int(named[1])] = str(path)
    return steps[max(steps)] if steps else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        for name in (TRAINER_STATE_NAME, CLOCK):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        for path in checkpoint.rglob("*.safetensors"):
            # compares the length of the file with its header
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    processes = count_processes()
    # each writes its own, and none waits for the others
    drawn = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    # torch's files are archives, whose table stands at the end
    return all(zipfile.is_zipfile(path) for path in [*checkpoint.glob("*.pt"), *(checkpoint / name for name in drawn)])


def state_of(checkpoint: str) -> dict[str, Any]:
    """Return what Trainer wrote of a run into a checkpoint."""
    found: dict[str, Any] = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return found


def is_over(checkpoint: str) -> bool:
    """Say whether nothing was left to train behind a checkpoint: all steps were taken, or patience was at its end."""
    control = state_of(checkpoint).get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def save_beside_adapters(model: Any, checkpoint: Path) -> None:
    """Write what adapters leave out of a checkpoint; of a model without adapters nothing.

    These are buffers of patterns, such as centroids, and tables of positions that are no modules.
    """
    if not isinstance(model, PreTrainedModel) and (held := _beside_adapters(model)):
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, checkpoint / BESIDE)


def load_beside_adapters_(model: Any, checkpoint: str) -> None:
    """Load what ``save_beside_adapters`` wrote, in place."""
    path = Path(checkpoint, BESIDE)
    if path.is_file():
        held = _beside_adapters(model)
        for name, tensor in load_file(path).items():
            held[name].copy_(tensor)


def _beside_adapters(model: Any) -> dict[str, Any]:
    held = [(name, buffer) for name, buffer in model.named_buffers() if ".sparse_state." in name]
    held += [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad and not _is_peft(name)]
    return {name: tensor.data for name, tensor in held}


def _is_peft(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def take_home(checkpoint: str) -> None:
    """Let a checkpoint of a folder that was moved know where the best one is now."""
    path = Path(checkpoint, TRAINER_STATE_NAME)
    state = json.loads(path.read_text(encoding="utf-8"))
    best = state.get("best_model_checkpoint")
    here = None if best is None else path.parent.parent / Path(best).name
    if here is not None and here.is_dir() and str(here) != best:
        path.write_text(json.dumps({**state, "best_model_checkpoint": str(here)}, indent=2), encoding="utf-8")


def load_renamed_(model: Any, checkpoint: str) -> None:
    """Load a checkpoint into a model that it names the weights of in another way, in place; any other stays as it is.

    Some types (ViT) are saved under the names of older versions. ``from_pretrained`` translates them, ``Trainer`` does not: it
    would go on with the weights that it had.

    Args:
        model: a transformers model; of one that adapters wrap nothing is loaded.
        checkpoint: folder of the checkpoint.
    """
    folder = Path(checkpoint)
    stored = {name for path in folder.glob("*.safetensors") for name in safe_open(path, framework="pt").keys()}  # noqa: SIM118
    if not isinstance(model, PreTrainedModel) or not stored - model.state_dict().keys():
        return
    model.load_state_dict(type(model).from_pretrained(folder).state_dict())
