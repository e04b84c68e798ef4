"""The benchmark times what it says, in turns, and writes it down; nothing here looks at how long anything took."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse.benchmarks import attention, memory, report, timing
from hf_sparse.benchmarks.models import FREE_ROBERTA, OURS_BIGBIRD, OURS_LONGFORMER, Models
from hf_sparse.benchmarks.run import LENGTHS, memory_rows, run

TINY = {"lengths": (64, 128), "seconds": 0.0}
SMALL_PATTERNS = {
    "band, radius 3": hf_sparse.pattern("band", radius=3),
    "bigbird, block 8": hf_sparse.pattern("bigbird", block_size=8),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return what a tiny run of attention gave, and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "patterns_at", lambda n: SMALL_PATTERNS)
        patch.setattr(attention, "HEADS", 2)
        return run(out=folder, mode="quick", device="cpu", only=("attention",), settings=TINY), folder


def test_cells_take_turns_and_the_median_is_kept() -> None:
    turns: list[str] = []
    cells = [timing.Cell(name, "forward", lambda name=name: turns.append(name), {"n": 1}) for name in "ab"]
    rows = timing.time_cells(
        cells,
        least=3,
        most=5,
        seconds=0.0,
        device="cpu",
        is_warm=lambda cell: cell.name == "b",
        tell=lambda text: None,
    )
    assert turns == ["a", *"ab" * 3]
    assert [row["rounds"] for row in rows] == [3, 3]
    assert all(row["fastest"] <= row["seconds"] for row in rows)
    longer = timing.time_cells(
        cells, least=1, most=4, seconds=60, device="cpu", is_warm=lambda cell: True, tell=lambda text: None
    )
    assert longer[0]["rounds"] == 4


def test_every_row_is_timed_forward_and_back_with_dropout_and_without(result: tuple[dict[str, Any], Path]) -> None:
    rows = [row for row in result[0]["rows"] if row["section"] == "attention"]
    timed = {(row["name"], row["n"], row["what"], row["dropout"]) for row in rows}
    for name in ("dense SDPA", *SMALL_PATTERNS):
        for n in (64, 128):
            both = "forward+backward"
            assert {(name, n, "forward", 0.0), (name, n, both, 0.0), (name, n, both, 0.1)} <= timed
    assert all(row["seconds"] > 0 and row["rounds"] >= 3 for row in rows)


def test_a_full_run_has_dropout_in_the_forward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "patterns_at", lambda n: SMALL_PATTERNS)
    cells = [cell for cell in attention.cells_at(64, "cpu", "full") if cell.name in SMALL_PATTERNS]
    timed = {(cell.name, cell.what, cell.facts["dropout"]) for cell in cells}
    assert timed == {
        (name, what, p) for name in SMALL_PATTERNS for what in ("forward", "forward+backward") for p in (0.0, 0.1)
    }


def test_the_density_counts_each_edge_once(result: tuple[dict[str, Any], Path]) -> None:
    for row in result[0]["rows"]:
        if "density" in row and row["name"] in SMALL_PATTERNS:
            mask = SMALL_PATTERNS[row["name"]].mask(row["n"], heads=2)
            assert row["density"] == pytest.approx(mask.float().mean().item())


def test_planning_is_timed_at_every_length(result: tuple[dict[str, Any], Path]) -> None:
    plans = [row for row in result[0]["rows"] if row["section"] == "plan"]
    assert {row["n"] for row in plans} == {64, 128}
    assert all(row["seconds"] > 0 for row in plans)
    assert "### Planning" in (result[1] / "README.md").read_text()


def test_numbers_stand_beside_what_they_were_measured_on(result: tuple[dict[str, Any], Path]) -> None:
    written, folder = result
    assert json.loads((folder / "results" / "cpu-quick-attention.json").read_text()) == written
    machine = written["machine"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["versions"]["torch"] == torch.__version__
    assert {"device", "cores", "commit", "date", "python"} <= set(machine)
    text = (folder / "README.md").read_text()
    assert f"commit {machine['commit']}" in text
    assert "`hf-sparse bench --mode quick --device cpu --only attention`" in text
    assert "## CUDA\n\nNot run yet." in text
    assert (folder / "cpu.png").stat().st_size > 10_000


def cell(name: str, n: int, seconds: float, **facts: Any) -> dict[str, Any]:
    return {
        "section": "attention",
        "name": name,
        "n": n,
        "what": "forward",
        "dropout": 0.0,
        "seconds": seconds,
        **facts,
    }


def test_a_cell_says_how_much_faster_and_how_efficient() -> None:
    rows = [
        cell("dense SDPA", 4096, 2.0),
        cell("ours", 4096, 0.5, density=0.125),
        cell("ours", 65536, 8.0, density=0.01),
        cell("peer", 4096, 4.0),
    ]
    machine = {"device": "x", "cores": 2, "threads": 2, "system": "s", "python": "3", "versions": {}, "commit": "c"}
    machine |= {"date": "d"}
    text = "\n".join(report.tables({"machine": machine, "command": "b", "rows": rows, "memory": []}))
    assert "| dense SDPA | 2.00 s | not run |" in text
    assert "| ours | 4.00x (0.50) | 8.00 s |" in text
    assert "| peer | 0.50x | not run |" in text
    assert "| ours | 1.00 | not run |" in text  # 16 times the tokens in 16 times the time
    assert "| peer | " not in text.partition("Cost against length")[2].partition("###")[0]


def test_the_slope_is_the_power() -> None:
    assert report.slope([(n, 3.0 * n**1.5) for n in (4096, 16384, 65536)]) == pytest.approx(1.5)


def test_the_fullest_run_is_the_one_shown(result: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for mode, only in (("full", " --only attention"), ("quick", ""), ("full", "")):
        command = f"run of {mode}{only}"
        held = {**result[0], "mode": mode, "command": command}
        (tmp_path / "results" / f"{command}.json").write_text(json.dumps(held))
        report.write_readme(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert [line for line in text.splitlines() if "run of" in line] == [
            line for line in text.splitlines() if f"`{command}`" in line
        ]
        assert f"`{command}`" in text


@pytest.mark.parametrize(("device", "mode"), LENGTHS)
def test_every_row_can_be_built_at_every_length(device: str, mode: str) -> None:
    lengths = LENGTHS[device, mode]
    names = list(attention.patterns_at(lengths[0]))
    for n in lengths:
        patterns = attention.patterns_at(n)
        assert list(patterns) == names
        assert all(attention.positions_of(pattern, n) >= n for pattern in patterns.values())
    measured = {name for name, _ in memory_rows(lengths, mode)}
    assert measured == {"dense SDPA", *(names if mode == "full" else names[:2])}


@pytest.mark.several_processes
def test_memory_is_what_a_call_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 16384
    tensors = memory.bytes_of_tensors(n, "cpu")
    assert tensors == 8 * 12 * n * 64 * 4
    peak = memory.peak_memory("longformer, window 512 + CLS", n, "cpu")
    # all eight tensors are there at the end; the bound is half as much again
    assert 0.95 * tensors <= peak <= 1.5 * tensors


@pytest.mark.slow
def test_the_models_compared_do_the_same() -> None:
    models = Models(1536, "cpu")
    for name, off in models.differences().items():
        assert off <= 1e-4, name
    assert set(models.differences()) == {OURS_LONGFORMER, OURS_BIGBIRD}
    with torch.no_grad():
        free = models.models[FREE_ROBERTA]
        one = models.outputs(FREE_ROBERTA)
        models.ids[0, 5] = 4
        other = models.outputs(FREE_ROBERTA)
    assert free.config._attn_implementation == "no_attention"
    # without attention a token changes itself alone
    assert (one != other).any(-1)[0].nonzero().flatten().tolist() == [5]
    # its projections have all the work that they have with attention
    models.outputs(FREE_ROBERTA).sum().backward()
    layer = free.encoder.layer[0].attention.self
    assert all(bool(part.weight.grad.abs().max() > 0) for part in (layer.query, layer.key, layer.value))
