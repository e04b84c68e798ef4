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

# seconds up to a checkpoint, in its folder: what is written last
CLOCK = "clock.json"
# what patterns learned that are no parameters, beside adapters, whose files hold nothing else
BUFFERS = "pattern_buffers.safetensors"


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
    # torch's files are archives, whose table stands at the end
    return all(zipfile.is_zipfile(path) for path in checkpoint.glob("*.pt"))


def state_of(checkpoint: str) -> dict[str, Any]:
    """Return what Trainer wrote of a run into a checkpoint."""
    found: dict[str, Any] = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return found


def is_over(checkpoint: str) -> bool:
    """Say whether nothing was left to train behind a checkpoint: all steps were taken, or patience was at its end."""
    control = state_of(checkpoint).get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def save_state_buffers(model: Any, checkpoint: Path) -> None:
    """Write what adapters leave out of a checkpoint: the buffers of patterns, such as centroids; of other models nothing."""
    if not isinstance(model, PreTrainedModel) and (held := _state_buffers(model)):
        save_file({name: buffer.contiguous() for name, buffer in held.items()}, checkpoint / BUFFERS)


def load_state_buffers_(model: Any, checkpoint: str) -> None:
    """Load what ``save_state_buffers`` wrote, in place."""
    path = Path(checkpoint, BUFFERS)
    if path.is_file():
        held = _state_buffers(model)
        for name, buffer in load_file(path).items():
            held[name].copy_(buffer)


def _state_buffers(model: Any) -> dict[str, Any]:
    return {name: buffer.data for name, buffer in model.named_buffers() if ".sparse_state." in name}


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
