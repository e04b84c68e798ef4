"""The oracles are independent of what they judge."""

import ast
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def imported_packages(text: str) -> set[str]:
    """Return the top-level packages that a module imports, by any form of import statement."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            # importlib.import_module("hf_sparse...")
            names |= {node.value.split(".")[0]} if node.value.startswith("hf_sparse") else set()
    return names


def test_no_oracle_imports_hf_sparse() -> None:
    files = sorted(SUPPORT.rglob("*.py"))
    assert len(files) >= 4
    assert [path.name for path in files if "hf_sparse" in imported_packages(path.read_text())] == []


def test_an_oracle_that_imports_hf_sparse_is_found() -> None:
    for text in ("import hf_sparse.plan", "from hf_sparse import plan", "f('hf_sparse.plan')"):
        assert "hf_sparse" in imported_packages(text)
