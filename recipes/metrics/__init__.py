"""Metrics of the recipes: scripts of ``evaluate`` that ship with the package, so that none is downloaded."""

import uuid
from pathlib import Path
from typing import Any

import evaluate

METRICS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__"))


def load_metric(name: str, **settings: Any) -> evaluate.EvaluationModule:
    """Return a metric: one of ours by its name, else the one of that name on the Hub.

    Args:
        name: one of ``METRICS``, the path of a script, or an id on the Hub such as "org/metric"; a name without "/" is never
            asked for there.
        settings: of ``evaluate.load``, such as ``config_name`` or ``process_id``.

    Raises:
        ValueError: if the name is none of these.
    """
    # processes, and metrics of one process, would else wait for one another's files
    settings.setdefault("experiment_id", uuid.uuid4().hex)
    if name in METRICS:
        return evaluate.load(str(Path(__file__).parent / f"{name}.py"), **settings)
    if Path(name).is_file():
        return evaluate.load(str(Path(name).resolve()), **settings)
    if "/" not in name:
        raise ValueError(
            f"unknown metric {name!r}; known: {', '.join(METRICS)}; one on the Hub is named as owner/name, a script by its path"
        )
    return evaluate.load(name, **settings)
