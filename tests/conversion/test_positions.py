"""Ways to longer texts: tables that repeat, are stretched or continued, and rotary positions that follow the text."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding

import hf_sparse
from hf_sparse.conversion import Count
from tests.support.checkpoints import write_checkpoint
from tests.support.decoders import tiny_decoder, tiny_prompts
from tests.support.rounding import assert_within_rounding
from tests.support.zoo import tiny_of_type

BAND = hf_sparse.pattern("band", radius=4)
TABLE = "roberta.embeddings.position_embeddings.weight"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def stretched_by_hand(table: Tensor, rows: int, offset: int) -> Tensor:
    """Return a table between whose first and last learned rows the others lie in line, row by row, in float64."""
    learned = table[offset:].double()
    made = []
    for row in range(rows - offset):
        place = row * (len(learned) - 1) / (rows - offset - 1)
        low = min(int(place), len(learned) - 2)
        made.append(learned[low] + (place - low) * (learned[low + 1] - learned[low]))
    return torch.cat([table[:offset].double(), torch.stack(made)])


def test_an_interpolated_table_keeps_its_ends_and_lies_in_line_between(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Roberta", "ForMaskedLM")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=301, positions="interpolate")
    assert report.wide_open_difference is not None
    before, after = weights(tmp_path / "dense")[TABLE], weights(tmp_path / "sparse")[TABLE]
    assert report.tiled == Count(1, 303 * 32)
    assert "; positions interpolated: 9,696 in 1 tensor; " in str(report)
    assert torch.equal(after[[0, 1, 2, -1]], before[[0, 1, 2, -1]])
    wanted = stretched_by_hand(before, 303, 2)
    # a place in the table is a float32 of up to 128, and so is the product with it
    assert (after - wanted).abs().max() <= 4 * 128 * torch.finfo(torch.float32).eps * before.abs().max()
    assert json.loads((tmp_path / "sparse/config.json").read_text())["sparse_positions"] == "interpolate"


def test_a_sparse_config_interpolates_as_it_loads(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Roberta", "ForMaskedLM")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=301, positions="interpolate")
    config = hf_sparse.sparse_config(tmp_path / "dense", BAND, max_length=301, positions="interpolate")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", config=config)
    assert torch.equal(loaded.get_parameter(TABLE), weights(tmp_path / "sparse")[TABLE])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_interpolated_in_float32_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path / "dense", "Roberta", "ForMaskedLM", dtype=dtype)
    for name, folder in (("half", "half"), ("full", "full")):
        if name == "full":
            table = {key: value.float() for key, value in weights(tmp_path / "dense").items()}
            model = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
            model.load_state_dict(table, strict=False)
            model.save_pretrained(tmp_path / "dense_full")
        source = tmp_path / ("dense" if name == "half" else "dense_full")
        hf_sparse.convert(source, tmp_path / folder, BAND, max_length=301, positions="interpolate", verify=False)
    half, full = weights(tmp_path / "half")[TABLE], weights(tmp_path / "full")[TABLE]
    assert half.dtype == dtype
    assert torch.equal(half, full.to(dtype))


def test_tile_is_what_is_done_where_nothing_is_said(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Roberta", "ForMaskedLM")
    for name, asks in (("said", {"positions": "tile"}), ("unsaid", {})):
        hf_sparse.convert(tmp_path / "dense", tmp_path / name, BAND, max_length=301, verify=False, **asks)  # type: ignore[arg-type]
    assert torch.equal(weights(tmp_path / "said")[TABLE], weights(tmp_path / "unsaid")[TABLE])
    assert "sparse_positions" not in json.loads((tmp_path / "said/config.json").read_text())


@pytest.mark.parametrize(
    ("model_type", "embedding"),
    [("pegasus", PegasusSinusoidalPositionalEmbedding), ("marian", MarianSinusoidalPositionalEmbedding)],
)
def test_a_table_of_sines_goes_on(tmp_path: Path, model_type: str, embedding: type[torch.nn.Embedding]) -> None:
    tiny_of_type(model_type).save_pretrained(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=301)
    assert report.wide_open_difference is not None
    made = hf_sparse.integration.auto.sparse_model_class(type(tiny_of_type(model_type))).from_pretrained(
        tmp_path / "sparse"
    )
    wanted = embedding(301, 32).create_weight()
    for stack in ("encoder", "decoder"):
        table = made.get_parameter(f"model.{stack}.embed_positions.weight")
        # sines of arguments up to 301 in float64, rounded to float32
        assert (table - wanted).abs().max() <= 2 * torch.finfo(torch.float32).eps


def test_dynamic_rotary_positions_leave_short_texts_as_they_were(tmp_path: Path) -> None:
    dense = tiny_decoder("Llama")
    dense.save_pretrained(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=160, positions="dynamic")
    assert (report.max_length_before, report.max_length) == (64, 160)
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert config["max_position_embeddings"] == 64
    assert config["rope_parameters"] == {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 10000.0}
    opened = hf_sparse.sparse_config(
        tmp_path / "dense", hf_sparse.pattern("band", radius=200), max_length=160, positions="dynamic"
    )
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", config=opened).eval()
    twin = tiny_decoder("Llama", rope_parameters=dict(config["rope_parameters"]))
    twin.load_state_dict(dense.state_dict())
    # the longer text last: it moves the base
    for tokens, is_as_before in ((60, True), (150, False)):
        batch = tiny_prompts(tokens, side="right")
        real = batch["attention_mask"] != 0
        with torch.no_grad():
            got, plain, before = (model(**batch).logits[real] for model in (sparse, twin, dense))
            exact = twin.double()(**batch).logits[real]
        twin.float()
        assert_within_rounding(got, exact, plain)
        assert torch.equal(plain, before) == is_as_before


@pytest.mark.parametrize(("model_type", "says"), [("pegasus", "continues its table of sines"), ("t5", "has no end")])
def test_where_there_is_nothing_to_choose_that_is_said(tmp_path: Path, model_type: str, says: str) -> None:
    tiny_of_type(model_type).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"has nothing to choose: .*{says}; leave it out"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=300, positions="tile")


def test_a_way_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    tiny_of_type("phi3", sliding_window=None).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="positions='yarn' does not fit phi3"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=160, positions="yarn")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=160, positions="ntk")
