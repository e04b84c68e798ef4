"""Accelerate's configs: each loads, has no key that nobody reads, and a reason above every key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from hf_sparse.recipes.command import CONFIGS

FILES = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
NAMES = ("cpu", "ddp", "fsdp2", "gpu", "nodes", "zero2", "zero3")
all_configs = pytest.mark.parametrize("path", FILES.values(), ids=FILES)


def check_keys(path: Path) -> None:
    """Check that accelerate knows every key, those of sections as well.

    Raises:
        ValueError: if it does not know one.
    """
    load_config_from_file(str(path))
    known = {action.dest for action in launch_command_parser()._actions}
    for name, held in yaml.safe_load(path.read_text()).items():
        if isinstance(held, dict):
            for key in held:
                wanted = key if name != "fsdp_config" or key.startswith("fsdp") else f"fsdp_{key}"
                if wanted not in known:
                    raise ValueError(f"{path.name}: {name}.{key} is unknown")


def test_there_is_one_for_each_way() -> None:
    assert tuple(FILES) == NAMES


@all_configs
def test_each_loads_and_every_key_is_known(path: Path) -> None:
    check_keys(path)
    held: Any = load_config_from_file(str(path))
    assert held.num_processes >= 1


@pytest.mark.parametrize(
    "line", ["proceses: 2", "fsdp_config:\n  fsdp_verzion: 2", "deepspeed_config:\n  zero_stag: 3"]
)
def test_an_unknown_key_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{FILES['ddp'].read_text()}{line}\n")
    with pytest.raises(ValueError, match="unknown"):
        check_keys(path)


@all_configs
def test_a_reason_stands_above_every_key(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    keys = [place for place, line in enumerate(lines) if re.match(r" *\w+:", line)]
    assert keys
    for place in keys:
        assert lines[place - 1].strip().startswith("# "), lines[place]
