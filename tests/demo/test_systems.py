"""The table of all text systems: none is forgotten, the page has what is there now, and a band costs what it is said to."""

import re
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hf_sparse.demo import systems
from hf_sparse.demo.corpus import Corpus
from hf_sparse.demo.fidelity import HEAD, LENGTH, NODES_PER_LEVEL, Fidelity, equal_band, fidelity, verdict
from hf_sparse.patterns import PATTERNS, Pattern, pattern

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "patterns.md").read_text()
PART = PAGE.partition(systems.START)[2].partition(systems.END)[0]
TINY = Corpus(("a", "b", "c"), ((1,) * 9, (2,) * 9, (3,) * 70), ((2, (3, 3)),), ((0, (1, 1)), (0, (1, 1)), (1, (2, 2))))


def test_every_text_system_has_a_row() -> None:
    others = {"image_1d", "image_2d", "axial", "lsg"}
    assert set(systems.text_systems()) == set(PATTERNS) - others
    assert {systems.key_of(system) for system in systems.SYSTEMS} == set(PATTERNS) - others
    systems.check_complete()


def test_a_text_system_without_a_row_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PATTERNS, "fern", PATTERNS["band"])
    with pytest.raises(ValueError, match=r"add a line for fern to SYSTEMS in hf_sparse/demo/systems\.py"):
        systems.write_part(tmp_path / "patterns.md")


def test_the_page_names_the_same_systems_with_the_same_keys() -> None:
    rows = re.findall(r"^\| (`\w+\(.*?) \| [01]\.\d{3} \| [01]\.\d{3} \|", PART, re.MULTILINE)
    assert rows == [systems.cells(system) for system in systems.SYSTEMS], "run make systems and commit the page"
    assert re.findall(r"^\| (dense, .*?) \|", PART, re.MULTILINE) == [
        row.name for row in systems.dense_rows(Path(), Path())
    ]
    assert list(systems.page_rows(PART)) == [*systems.dense_cells(), *map(systems.cells, systems.SYSTEMS)]


def test_the_page_compares_spans_with_bands_of_the_same_keys() -> None:
    assert HEAD in PART, "run make systems and commit the page"
    rows = re.findall(r"^\| [\w-]+ \| (\d+) \| ([\d.]+) / ([\d.]+) \|", PART, re.MULTILINE)
    assert [int(slots) for slots, _, _ in rows] == [slots for slots in NODES_PER_LEVEL for _ in range(3)]
    for _, of_spans, of_band in rows:
        assert abs(float(of_spans) - float(of_band)) <= 1.1


@pytest.mark.parametrize("slots", NODES_PER_LEVEL)
def test_the_equal_band_reads_as_many_keys_within_one(slots: int) -> None:
    spans = pattern("bp_transformer", nodes_per_level=slots, spans="pooled")
    band = equal_band(spans, LENGTH)
    # drawn, where the band was found by counting the plan; spans are columns behind the tokens
    keys = [float(held.mask(LENGTH)[0, :LENGTH].sum()) / LENGTH for held in (spans, band)]
    assert abs(keys[0] - keys[1]) <= 1


def test_a_system_is_named_with_what_is_no_default() -> None:
    assert systems.named(pattern("star")) == "star()"
    assert systems.named(pattern("bp_transformer", nodes_per_level=16, spans="pooled")) == (
        "bp_transformer(nodes_per_level=16, spans='pooled')"
    )
    united = pattern("routing", num_clusters=2) | pattern("band", radius=1)
    assert systems.named(united) == "routing(num_clusters=2) | band(radius=1)"
    # a bar that ends no cell
    assert systems.cells(united).startswith(r"`routing(num_clusters=2) \| band(radius=1)` | ")
    assert systems.key_of(united) == "routing"


def test_fidelity_by_hand() -> None:
    words = torch.eye(2)
    dense = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).log1p()
    sparse = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).log1p() + torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    held = fidelity(dense, sparse, words)
    # four fifths and a fifth against two halves, and no difference at the second token
    want = 0.8 * torch.tensor(1.6).log() + 0.2 * torch.tensor(0.4).log()
    assert held.divergence == pytest.approx(float(want) / 2, rel=1e-6)
    assert held.tokens == pytest.approx((0.5**0.5 + 1) / 2, rel=1e-6)
    same = fidelity(dense, dense, words)
    assert (same.divergence, same.tokens, same.embedding) == pytest.approx((0.0, 1.0, 1.0))


def test_a_loss_is_told_as_a_loss() -> None:
    near, far = Fidelity(0.1, 0.9, 0.5), Fidelity(0.2, 0.8, 0.7)
    said = verdict([(near, far), (far, near), (far, near)])
    assert "in 1 of 3 rows by KL, in 1 of 3 by the cosine of tokens, and in 2 of 3 by the cosine of the mean" in said


@dataclass
class Stage:
    """What was converted and scored, where neither takes time."""

    converted: list[tuple[Pattern, int, str | None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    said: StringIO = field(default_factory=StringIO)

    def convert(
        self,
        _source: Path,
        _folder: Path,
        system: Pattern,
        *,
        max_length: int,
        calibrate: Path | None = None,
        **_: bool,
    ) -> None:
        self.converted.append((system, max_length, calibrate and calibrate.read_text()))

    def measure(self, _console: Console, _work_dir: Path, row: Any, split: str, documents: int) -> dict[str, Any]:
        assert (split, documents) == ("scored", 3)
        self.names.append(row.name)
        # longformer finds every topic, the others take the second for the first
        right = torch.eye(3)[[0, 0, 1]]
        queries = right if row.name.startswith("longformer") else right.flip(1).roll(-1, 1)
        return {"documents": torch.eye(3), "queries": queries, "seconds": 1.0}

    def scores(self, folder: Path, keys: tuple[str, ...] = ()) -> list[systems.Score]:
        return list(systems.measured(Console(file=self.said), folder, folder, TINY, keys))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr("hf_sparse.convert", made.convert)
    monkeypatch.setattr(systems, "measure", made.measure)
    monkeypatch.setattr(systems, "topics", {"a": "first", "b": "second", "c": "third"})
    return made


def test_every_system_is_converted_and_scored(tmp_path: Path, stage: Stage) -> None:
    scores = stage.scores(tmp_path)
    assert len(stage.said.getvalue().splitlines()) == len(systems.SYSTEMS) + 3
    # the topic that no passage comes from
    texts = ["third" if systems.key_of(system) == "routing" else None for system in systems.SYSTEMS]
    wanted = [(system, 128, text) for system, text in zip(systems.SYSTEMS, texts, strict=True)]
    assert stage.converted == [(systems.SYSTEMS[0], 128, None), *wanted]
    assert stage.names[3:] == [systems.named(system) for system in systems.SYSTEMS]
    lines = list(systems.retrieval_lines(systems.scored_rows(scores, TINY), TINY))
    rows = [line for line in lines if line.startswith(("| dense", "| `"))]
    assert len(rows) == len(systems.SYSTEMS) + 3
    assert rows[3] == f"| {systems.cells(systems.SYSTEMS[0])} | 1.000 | 1.000 |  |"
    assert re.search(r"\| 0\.\d{3} \| 0\.\d{3} \| \+\d\.\d{3} \[", rows[4])
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in rows)
    others = len(rows) - 1
    assert lines[-1].startswith(f"Of the {others} other rows {others} are worse than `longformer`")
    assert "`image_1d`, `image_2d`, `axial` are for images" in "\n".join(lines)
    assert "calibrated on the 1 topics" in "\n".join(lines)


def test_rows_that_are_named_are_scored_alone_and_take_their_place(tmp_path: Path, stage: Stage) -> None:
    whole = systems.scored_rows(stage.scores(tmp_path), TINY)
    page = "\n".join(systems.retrieval_lines(whole, TINY))
    assert systems.page_rows(page) == whole
    stage.names.clear()
    new = systems.scored_rows(stage.scores(tmp_path, ("routing", "star")), TINY)
    keys = ("longformer", "star", "routing")
    wanted = [system for system in systems.SYSTEMS if systems.key_of(system) in keys]
    assert stage.names == [systems.named(system) for system in wanted]
    routing = systems.cells(wanted[-1])
    changed = {**new, routing: "0.900 | 0.950 | -0.100 [-0.200, -0.050]"}
    made = systems.merged(changed, whole)
    assert list(made) == list(whole)
    assert {name for name in made if made[name] != whole[name]} == {routing}
    assert "and 1 are better" in list(systems.retrieval_lines(made, TINY))[-1]


def test_single_rows_are_refused_where_they_do_not_fit_the_page(tmp_path: Path, stage: Stage) -> None:
    whole = systems.scored_rows(stage.scores(tmp_path), TINY)
    ours, other = (systems.cells(system) for system in systems.SYSTEMS[:2])
    with pytest.raises(ValueError, match=r"longformer scored '1\.000.*' here and '0\.5.*score all with make systems"):
        systems.merged(whole, {**whole, ours: "0.500 | 0.500 | "})
    with pytest.raises(ValueError, match="neither scored nor on the page: `bigbird"):
        systems.merged({ours: whole[ours]}, {name: last for name, last in whole.items() if name != other})


def test_the_second_section_stays_where_single_rows_are_scored() -> None:
    held = ["first", *systems.fidelity_of(PART)]
    made = systems.put_between(f"{systems.START}{systems.END}", held)
    assert made.endswith(PART[PART.index(HEAD) :] + systems.END)


def test_an_unknown_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "patterns.md").write_text(f"{systems.START}\n{systems.END}\n")
    with pytest.raises(ValueError, match="no row for axial, fern; there are rows for band, dilated"):
        systems.write_part(tmp_path / "patterns.md", ["fern", "star", "axial"])


def test_what_others_wrote_stays() -> None:
    others = f"# Mine\n\n{systems.START}\nold\n{systems.END}\n\n## Results\n"
    made = systems.put_between(others, ["new"])
    assert made == f"# Mine\n\n{systems.START}\n\nnew\n\n{systems.END}\n\n## Results\n"
    assert systems.put_between(made, ["new"]) == made


def test_a_page_without_its_two_lines_is_refused() -> None:
    for text in ("", systems.START, systems.END, f"{systems.END}\n{systems.START}"):
        with pytest.raises(ValueError, match="must hold the two lines"):
            systems.put_between(text, [])
