"""Checkpoints that read images, converted: weights, positions, the image processor. All are tiny random ones."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from typer.testing import CliRunner

import hf_sparse
from hf_sparse.cli import app
from hf_sparse.conversion import Count
from hf_sparse.integration.auto import sparse_model_class
from tests.support.checkpoints import edit_json, tree, write_image_processor
from tests.support.models import VISION_FAMILIES, tiny_images, tiny_vision_model
from tests.support.rounding import assert_within_rounding

MARKED = hf_sparse.pattern("band", radius=2) | hf_sparse.pattern("global", positions=(0,))
LONGFORMER = hf_sparse.pattern("longformer", window=8)
CLASSIFIER = "ForImageClassification"
ROWS = {"DeiT": 2}
CASES = [(family, head) for family in VISION_FAMILIES for head in ("Model", CLASSIFIER)]
CASES += [("DeiT", "ForImageClassificationWithTeacher"), ("ViT", "ForMaskedImageModeling"), ("Dinov2", "Backbone")]


def write_vision(folder: Path, family: str = "ViT", head: str = CLASSIFIER, **fields: Any) -> Any:
    """Save a tiny random model and an image processor, and return the model."""
    saving = {name: fields.pop(name) for name in ("save_original_format", "max_shard_size") if name in fields}
    model = tiny_vision_model(family, head, **fields)
    model.save_pretrained(folder, **saving)
    write_image_processor(folder)
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds."""
    held: dict[str, Any] = json.loads(path.read_text())
    return held


def own_table(model: Any, size: int) -> Tensor:
    """Return the positions that a dense model makes by itself for square images."""
    (embeddings,) = (module for module in model.modules() if hasattr(module, "interpolate_pos_encoding"))
    rows = 2 if type(model).__name__.startswith("DeiT") else 1
    with torch.no_grad():
        return embeddings.interpolate_pos_encoding(torch.zeros(1, rows + (size // 4) ** 2, 32), size, size)


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_every_number_is_carried_or_interpolated_as_the_model_itself_would(
    tmp_path: Path, family: str, head: str, is_older: bool
) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    dense = write_vision(source, family, head, save_original_format=is_older)
    report = hf_sparse.convert(source, made, MARKED, image_size=28)
    before, after = weights(source), weights(made)
    assert after.keys() == before.keys()
    (table,) = [name for name in before if name.endswith("embeddings.position_embeddings")]
    assert torch.equal(after[table], own_table(dense, 28))
    assert all(torch.equal(after[name], before[name]) for name in before if name != table)
    assert report.tiled == Count(1, (49 + ROWS.get(family, 1)) * 32)
    assert report.moved.tensors == len(before) - 1
    assert (report.image_size_before, report.image_size) == ((16, 16), (28, 28))
    assert report.max_length - report.max_length_before == 49 - 16


@pytest.mark.parametrize(("family", "head"), CASES)
def test_wide_open_at_the_larger_size_it_says_what_the_dense_model_says(tmp_path: Path, family: str, head: str) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    dense = write_vision(source, family, head)
    report = hf_sparse.convert(source, made, MARKED, image_size=24)
    assert report.wide_open_difference is not None
    config = AutoConfig.from_pretrained(made)
    opened = MARKED.wide_open(report.max_length).to_dict()
    config.sparse_attention = {**config.sparse_attention, "pattern": opened}
    sparse = sparse_model_class(type(dense)).from_pretrained(made, config=config).eval()
    asks = "interpolate_pos_encoding" in inspect.signature(dense.forward).parameters
    options = {"output_hidden_states": True, **({"interpolate_pos_encoding": True} if asks else {})}
    images = tiny_images(24)
    with torch.no_grad():
        got = sparse(images, output_hidden_states=True).hidden_states[-1]
        plain = dense(images, **options).hidden_states[-1]
        oracle = dense.double()(images.double(), **options).hidden_states[-1]
    assert got.shape[1] == report.max_length
    assert_within_rounding(got, oracle, plain)


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize(("family", "head"), [case for case in CASES if case[0] != "Beit"])
def test_weights_of_a_pattern_are_copies_under_the_names_of_the_checkpoint(
    tmp_path: Path, family: str, head: str, is_older: bool
) -> None:
    dense = write_vision(tmp_path / "dense", family, head, save_original_format=is_older)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER)
    made, found = sparse_model_class(type(dense)).from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(found.values())
    # two layers, three projections, a weight and a bias each
    assert report.added.tensors == 12
    held = made.state_dict()
    copies = [name for name in held if ".sparse_state." in name]
    assert len(copies) == 12
    for name in copies:
        older = name.replace(".sparse_state", "")
        own = older.replace(".query.", ".q_proj.").replace(".key.", ".k_proj.").replace(".value.", ".v_proj.")
        assert torch.equal(held[name], held[own if own in held else older]), name
    made.save_pretrained(tmp_path / "once")
    assert weights(tmp_path / "once").keys() == weights(tmp_path / "sparse").keys()


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_what_was_loaded_is_saved_and_loaded_with_equal_outputs_and_files(tmp_path: Path, family: str) -> None:
    write_vision(tmp_path / "dense", family)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24, verify=False)
    said = []
    for first, second in (("sparse", "once"), ("once", "twice")):
        model = AutoModelForImageClassification.from_pretrained(tmp_path / first).eval()
        assert type(model).__name__ == f"Sparse{family}{CLASSIFIER}"
        model.save_pretrained(tmp_path / second)
        with torch.no_grad():
            said.append(model(tiny_images(24)).logits)
    assert torch.equal(*said)
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")
    assert weights(tmp_path / "once").keys() == weights(tmp_path / "sparse").keys()
    assert read(tmp_path / "once/config.json")["image_size"] == 24


def test_a_sparse_config_and_a_conversion_give_the_same_model(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=(16, 24), verify=False)
    config = hf_sparse.sparse_config(tmp_path / "dense", MARKED, image_size=(16, 24))
    loaded = AutoModel.from_pretrained(tmp_path / "dense", config=config)
    converted = AutoModel.from_pretrained(tmp_path / "sparse")
    assert loaded.config.image_size == converted.config.image_size == [16, 24]
    pooled = {name for name in loaded.state_dict() if name.startswith("pooler.")}
    for name, weight in loaded.state_dict().items():
        assert name in pooled or torch.equal(weight, converted.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["ViT", "Dinov2WithRegisters"])
def test_half_precision_is_interpolated_in_float32_and_rounded_once(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    dense = tiny_vision_model(family).to(dtype)
    dense.save_pretrained(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24, verify=False)
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "sparse")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    (table,) = [name for name in before if name.endswith("embeddings.position_embeddings")]
    assert torch.equal(after[table], own_table(dense.float(), 24).to(dtype))
    assert all(torch.equal(after[name], before[name]) for name in before if name != table)


def test_a_type_that_cannot_be_interpolated_is_refused(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    held = weights(tmp_path / "dense")
    table = "vit.embeddings.position_embeddings"
    save_file({**held, table: held[table].to(torch.float8_e5m2)}, tmp_path / "dense/model.safetensors")
    with pytest.raises(hf_sparse.ConversionError, match=r"position_embeddings has type F8_E5M2, which cannot be"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24)
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("family", ["Dinov2", "Dinov2WithRegisters"])
def test_a_weight_that_is_stored_whole_and_loaded_in_parts_is_carried(tmp_path: Path, family: str) -> None:
    write_vision(tmp_path / "dense", family, use_swiglu_ffn=True)
    assert any(name.endswith("weights_in.weight") for name in weights(tmp_path / "dense"))
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24)
    assert report.wide_open_difference is not None
    _, found = AutoModelForImageClassification.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(found.values())


def test_a_model_without_positions_has_none_to_interpolate(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense", "Beit", use_absolute_position_embeddings=False)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24)
    assert (report.tiled, report.image_size) == (Count(), (24, 24))
    assert report.wide_open_difference is not None


def test_shards_stay_shards(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense", max_shard_size="20KB")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER, image_size=24)
    files = sorted(path.name for path in (tmp_path / "dense").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(path.name for path in (tmp_path / "sparse").glob("*.safetensors")) == files
    index = read(tmp_path / "sparse/model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(tmp_path / "sparse").values())
    assert index["weight_map"].keys() == weights(tmp_path / "sparse").keys()


@pytest.mark.parametrize(
    ("held", "image_size", "want"),
    [
        ({"size": {"height": 16, "width": 16}}, 24, {"size": {"height": 24, "width": 24}}),
        ({"size": {"height": 16, "width": 16}}, (16, 24), {"size": {"height": 16, "width": 24}}),
        # what is cropped comes out of an image that is larger by as much as before
        (
            {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
            24,
            {"size": {"height": 30, "width": 30}, "crop_size": {"height": 24, "width": 24}},
        ),
        (
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
            (16, 24),
            {"size": {"shortest_edge": 30}, "crop_size": {"height": 16, "width": 24}},
        ),
        # a crop that is never made does not count
        (
            {"size": {"height": 16, "width": 16}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": False},
            24,
            {"size": {"height": 24, "width": 24}, "crop_size": {"height": 24, "width": 24}},
        ),
        # the numbers of older files
        ({"size": 16}, 24, {"size": 24}),
        ({"size": 16}, (16, 24), {"size": {"height": 16, "width": 24}}),
        ({"size": 20, "crop_size": 16}, 24, {"size": 30, "crop_size": 24}),
        # an image processor for another size than the model's
        ({"size": {"shortest_edge": 10}, "crop_size": 8}, 24, {"size": {"shortest_edge": 30}, "crop_size": 24}),
    ],
)
def test_the_size_of_images_is_raised(
    tmp_path: Path, held: dict[str, Any], image_size: Any, want: dict[str, Any]
) -> None:
    write_vision(tmp_path / "dense")
    write_image_processor(tmp_path / "dense", **held)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=image_size, verify=False)
    before, after = (read(tmp_path / name / "preprocessor_config.json") for name in ("dense", "sparse"))
    assert after == {**before, **want}
    assert report.files_raised == ("preprocessor_config.json",)


def test_without_a_size_nothing_is_interpolated_and_the_image_processor_stays(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED)
    before, after = tree(tmp_path / "dense"), tree(tmp_path / "sparse")
    assert (report.tiled, report.files_raised, report.image_size) == (Count(), (), (16, 16))
    assert after["preprocessor_config.json"] == before["preprocessor_config.json"]
    assert weights(tmp_path / "dense").keys() == weights(tmp_path / "sparse").keys()


def test_the_image_processor_loads_where_nothing_names_its_class(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    write_image_processor(tmp_path / "dense", image_processor_type=None)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, verify=False)
    want, got = (AutoImageProcessor.from_pretrained(tmp_path / name) for name in ("dense", "sparse"))
    assert type(got) is type(want)
    assert got.to_dict() == want.to_dict()


def test_a_pipeline_classifies_an_image_at_the_larger_size(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense", "DeiT")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=(16, 28), verify=False)
    classify = pipeline("image-classification", model=str(tmp_path / "sparse"), device="cpu")
    assert type(classify.model).__name__ == "SparseDeiTForImageClassification"
    seen: list[Any] = []
    classify.model.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["pixel_values"]), with_kwargs=True)
    said = classify(Image.new("RGB", (50, 40), (200, 30, 90)))
    assert [tuple(pixels.shape) for pixels in seen] == [(1, 3, 16, 28)]
    assert sum(label["score"] for label in said) == pytest.approx(1, abs=1e-5)


def test_the_report_and_the_readme_speak_of_images(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24)
    before, after = "images of 16 x 16 pixels (17 tokens)", "images of 24 x 24 pixels (37 tokens)"
    assert f"reads {after} where it read {before}" in str(report)
    assert f"It reads {after}, where the dense one reads {before}." in (tmp_path / "sparse/README.md").read_text()
    assert report.wide_open_note.endswith("on 2 images of 37 tokens, float32")
    assert json.loads(json.dumps(report.to_dict()))["image_size"] == [24, 24]


def test_images_too_large_for_the_dense_source_are_not_compared(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=272)
    assert report.wide_open_difference is None
    assert report.wide_open_note == "not compared: 4,625 tokens an image are too many for the dense source"


def test_positions_other_than_the_source_s_own_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_vision(tmp_path / "dense")
    wrong = "hf_sparse.integration.positions.interpolate_positions"
    monkeypatch.setattr(wrong, lambda table, before, after: table.new_ones(1, 37, 32))
    with pytest.raises(hf_sparse.ConversionError, match="differs from its source by"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, image_size=24)
    assert not (tmp_path / "sparse").exists()


def test_a_projection_without_a_bias_gives_one_of_zeros(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense", "Beit")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER)
    assert report.wide_open_difference is not None
    held = weights(tmp_path / "sparse")
    made = {name for name in held if ".sparse_state.key.bias" in name}
    assert len(made) == 2
    assert not any(held[name].any() for name in made)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_length": 300}, ValueError, "vit reads images: give image_size, in pixels, and leave max_length out"),
        ({"max_length": 300, "image_size": 24}, ValueError, "vit reads images: give image_size"),
        ({"image_size": 12}, ValueError, "image_size 12 x 12 is smaller than the 16 x 16 pixels"),
    ],
)
def test_a_wrong_limit_is_refused(tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    write_vision(tmp_path / "dense")
    with pytest.raises(error, match=says):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED, **options)
    assert not (tmp_path / "sparse").exists()


def test_an_image_size_for_text_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bert reads text: give max_length, in tokens, and leave image_size out"):
        hf_sparse.convert(bert, tmp_path / "sparse", MARKED, image_size=64)


def test_a_bias_of_relative_positions_is_refused(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense", "Beit", use_relative_position_bias=True)
    with pytest.raises(hf_sparse.UnsupportedModelError, match="beit with use_relative_position_bias=True cannot"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED)
    assert not (tmp_path / "sparse").exists()


def test_weights_that_do_not_fit_the_image_size_of_the_config_are_refused(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    edit_json(tmp_path / "dense/config.json", image_size=20)
    with pytest.raises(
        hf_sparse.ConversionError, match=r"has shape \[1, 17, 32\], but by config.json it has \[1, 26, 32"
    ):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", MARKED)


def test_the_command_takes_a_size(tmp_path: Path) -> None:
    write_vision(tmp_path / "dense")
    call = ["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--pattern", "band", "--json"]
    done = CliRunner().invoke(app, [*call, "--image-size", "16x24"], catch_exceptions=False)
    assert json.loads(done.stdout)["image_size"] == [16, 24]
    done = CliRunner().invoke(app, [*call, "--overwrite", "--image-size", "24"], catch_exceptions=False)
    assert json.loads(done.stdout)["image_size"] == [24, 24]
    with pytest.raises(ValueError, match="takes pixels or HEIGHTxWIDTH, as in 384 or 384x512; got 'big'"):
        CliRunner().invoke(app, [*call, "--image-size", "big"], catch_exceptions=False)
