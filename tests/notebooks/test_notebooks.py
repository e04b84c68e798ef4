"""The notebooks run from their first cell to their last, which checks what they say, and are kept without outputs."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# what every run of the tests can wait for
QUICK = {"01_look_at_a_pattern"}


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def by_name(path: Path) -> Any:
    return pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)


@pytest.mark.several_processes
@pytest.mark.parametrize("path", [by_name(path) for path in NOTEBOOKS])
def test_a_notebook_runs_to_its_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="notebooks need hf-sparse[notebooks]")
    import nbformat

    # this interpreter, whatever kernel a user has under the name that the notebook gives
    kernel = tmp_path / "jupyter" / "kernels" / "this_one" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "this one", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    where = tmp_path / "work"
    where.mkdir()
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, kernel_name="this_one", timeout=600, resources={"metadata": {"path": str(where)}}
    )
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    # what a notebook writes goes to a temporary folder, not beside it
    assert list(where.iterdir()) == []


def test_there_are_three_notebooks() -> None:
    assert [path.stem[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_holds_what_a_run_left(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["source"] for cell in code if cell["outputs"] or cell["execution_count"]] == []
    assert [cell["source"] for cell in cells(path, "markdown") if cell.get("attachments")] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_last_cell_checks_something(path: Path) -> None:
    last = ast.parse("".join(cells(path, "code")[-1]["source"]))
    assert any(isinstance(node, ast.Assert) for node in ast.walk(last))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_lines_of_code_and_text_are_no_longer_than_128(path: Path) -> None:
    sources = ["".join(cell["source"]) for kind in ("code", "markdown") for cell in cells(path, kind)]
    lines = [line for source in sources for line in source.splitlines()]
    assert lines
    assert [line for line in lines if len(line) > 128] == []
