"""The code that a checkpoint may bring, so that ``trust_remote_code=True`` loads it where nobody imported hf_sparse."""

from pathlib import Path
from typing import Any

MODULE = "register_hf_sparse"


def auto_map_of(config_class: Any) -> dict[str, str]:
    """Return what config.json says of the code: the config alone, since the model classes register with it."""
    return {"AutoConfig": f"{MODULE}.{config_class.__name__}"}


def write_code(folder: Path, config_class: Any) -> None:
    """Write the module that ``auto_map_of`` names.

    Args:
        folder: with config.json.
        config_class: a sparse config class.
    """
    text = f'''"""Imports hf_sparse, which has to be installed, and with it registers the model type of this checkpoint."""

import hf_sparse  # noqa: F401
from transformers import CONFIG_MAPPING

{config_class.__name__} = CONFIG_MAPPING["{config_class.model_type}"]
'''
    (folder / f"{MODULE}.py").write_text(text, encoding="utf-8")
