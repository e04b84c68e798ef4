"""The table of plans: what counts as a win, what is measured, and on which texts."""

import json
from pathlib import Path

import datasets
import pytest
import torch

import hf_sparse
from hf_sparse.conversion import layer_plan
from hf_sparse.conversion.fidelity import inspect_fidelity
from hf_sparse.conversion.reading import open_reading
from hf_sparse.demo import plans
from tests.support.checkpoints import write_checkpoint, write_tokenizer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "fidelity.md").read_text()


def row(name: str, *scores: float) -> plans.Row:
    """Return a row of texts whose three scores are equal."""
    return plans.Row(name, 0.1, torch.tensor(scores, dtype=torch.float64)[:, None].expand(-1, 3))


def test_a_difference_inside_its_interval_is_a_tie() -> None:
    assert plans.verdict(torch.tensor([0.1, 0.2, 0.3]))[1] == "tie"
    # the mean of 0.2 with a half of 4.303 times 0.1 over the root of 3
    assert plans.verdict(torch.tensor([0.1, 0.2, 0.3]))[0] == "+0.2000 ± 0.2484"
    assert plans.verdict(torch.tensor([0.2, 0.2, 0.21]))[1] == "win"
    assert plans.verdict(torch.tensor([-0.2, -0.2, -0.21]))[1] == "loss"
    assert plans.verdict(torch.zeros(3))[1] == "tie"


def test_the_table_and_its_count_say_wins_ties_and_losses() -> None:
    rows = [row("**auto**", 0.5, 0.6), row("a | b", 0.4, 0.5), row("c", 0.5, 0.6), row("d", 0.6, 0.7)]
    lines = list(plans.table(rows))
    assert len(lines) == 2 + len(rows)
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert ["win" in line for line in lines[2:]] == [False, True, False, False]
    assert next(plans.tally([rows, rows])) == "- kept: of 6 comparisons auto wins 2, ties 2 and loses 2."


def test_what_is_measured_is_what_the_report_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_plan, "LEVELS", (0.5, 1.0))
    write_checkpoint(tmp_path / "bert", "Bert", "Model")
    write_tokenizer(tmp_path / "bert", "Bert")
    (tmp_path / "text.txt").write_text("every long page of the river reads a stone word " * 60)
    reading = open_reading(tmp_path / "bert", tmp_path / "text.txt", length=64)
    band, told = hf_sparse.pattern("band", radius=4), []
    plan = plans.plan_on(reading, reading.load_dense()[0], reading.pieces[::2], 0.2)
    rows = plans.measured(reading, reading.load_dense()[0], [plan, band], reading.pieces[1::2], told.append)
    report = inspect_fidelity(tmp_path / "bert", [plan, band], tmp_path / "text.txt", length=64, max_length=128)
    assert told == [1] * report.pieces
    for found, one in zip(rows, report.patterns, strict=True):
        kept, cosine, _ = found.scores.mean(0).tolist()
        assert kept == pytest.approx(one.mean_kept, rel=1e-6)
        assert cosine == pytest.approx(one.cosine, rel=1e-6)
        assert found.density == one.density


def test_texts_of_both_sets_come_in_turn(tmp_path: Path) -> None:
    for name in plans.SETS:
        (tmp_path / name).mkdir()
        held = datasets.Dataset.from_dict({"text": [f"{name} {at}" for at in range(3)]})
        held.to_parquet(str(tmp_path / name / "train.parquet"))
    plans.write_texts(tmp_path, "train", 2, tmp_path / "texts.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert texts == ["cuad 0", "qmsum 0", "cuad 1", "qmsum 1"]


def test_a_folder_without_the_sets_is_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plans.main(["--data", str(tmp_path)])
    assert caught.value.code == 2
    assert "--data names the folder that holds cuad and qmsum" in capsys.readouterr().err


def test_the_page_compares_every_system_at_each_density() -> None:
    part = PAGE.partition(plans.START)[2].partition(plans.END)[0]
    for density in plans.DENSITIES:
        section = part.partition(f"### Density {density:g}\n")[2].partition("###")[0]
        names = [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")][2:]
        assert names[0] == "**auto**", "run python -m hf_sparse.demo.plans and commit the page"
        layer = layer_plan.Layer("", 0, 12, False, None)
        sized = [layer_plan.sized(name, density, layer, plans.LENGTH) for name in layer_plan.systems(plans.LENGTH)]
        want = [layer_plan.pattern_name(one).replace("|", "\\|") for one in sized if one is not None]
        assert names[1:] == want
