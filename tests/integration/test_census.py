"""``hf-sparse support``: every row of the census is proved by a tiny random model of the type."""

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from typer.testing import CliRunner

from hf_sparse.cli import app
from hf_sparse.integration.census import REFUSED, WORKS, Row, census
from hf_sparse.integration.families import FAMILIES
from tests.census import WORDS, examine

ROWS = census()
# one of each kind, the others where slow tests run too
SAMPLE = (
    "albert",
    "pegasus",
    "cohere",
    "t5",
    "biogpt",
    "clip_vision_model",
    "mpnet",
    "clip",
    "hubert",
    "mamba",
    "bamba",
    "led",
)
BY_NAME = [
    pytest.param(row, id=row.model_type, marks=() if row.model_type in SAMPLE else pytest.mark.slow) for row in ROWS
]


@pytest.mark.parametrize("row", BY_NAME)
@pytest.mark.filterwarnings("ignore")
def test_a_row_says_what_a_tiny_model_does(row: Row, tmp_path: Path) -> None:
    status, reason = examine(row.model_type, tmp_path)
    assert status == row.status
    if status != "not tried":
        assert row.reason == WORDS.get(reason, reason)


def test_the_table_names_every_type_once_and_none_that_transformers_has_not() -> None:
    named = [name for table in (WORKS, REFUSED) for names in table.values() for name in names.split()]
    assert len(named) == len(set(named))
    assert set(named) <= set(MODEL_MAPPING_NAMES)
    assert [row.model_type for row in ROWS] == sorted(MODEL_MAPPING_NAMES)


def test_what_has_a_row_of_its_own_works() -> None:
    works = {row.model_type for row in ROWS if row.status == "works"}
    assert set(FAMILIES) <= works


def test_the_command_prints_the_table_and_json() -> None:
    done = CliRunner().invoke(app, ["support", "--json"])
    assert done.exit_code == 0, done.output
    held = json.loads(done.output)
    assert held[0] == {"model_type": ROWS[0].model_type, "status": ROWS[0].status, "reason": ROWS[0].reason}
    assert len(held) == len(ROWS)
    drawn = CliRunner().invoke(app, ["support"]).output
    assert "t5" in drawn
    assert f"{sum(row.status == 'works' for row in ROWS)} works, " in drawn.splitlines()[-1]
