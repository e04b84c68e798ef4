"""The checkpoints of a run, and which of them may be gone on with."""

import json
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written to its end, or None where there is none.

    ``Trainer`` writes its own state last, so a checkpoint without it was cut short: by a kill, or a full disk.

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
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
