"""The README's code runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import tiny_model

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run_in_an_empty_folder(tmp_path: Path) -> None:
    assert len(blocks("python")) == 3
    code = "\n".join(blocks("python"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SparseBertModel torch.Size([1, 3002, 384])" in done.stdout
    assert "SparseRobertaForMaskedLM" in done.stdout
    assert "torch.Size([2, 128, 384])" in done.stdout


def test_the_first_python_block_has_a_dozen_lines() -> None:
    code = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(code) <= 12


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf-sparse ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    # a folder under the Hub id, so that the line runs without the network
    tiny = tmp_path / "FacebookAI" / "roberta-base"
    tiny_model("Roberta", "ForMaskedLM", positions=514).save_pretrained(tiny)
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>").save_pretrained(tiny)
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) == 3


def test_every_pattern_stands_in_the_table() -> None:
    from hf_sparse.patterns import PATTERNS

    for key in PATTERNS:
        assert re.search(rf"^\| `{key}` \|.*\| ready", README, re.MULTILINE), key
