"""Models that read images: their grid, larger images, saving, and what is refused. All checkpoints are tiny random ones."""

import filecmp
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
)

import hf_sparse
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.vision import vision_grid
from hf_sparse.patterns import Pattern
from tests.support.models import (
    VISION_FAMILIES,
    tiny_config,
    tiny_images,
    tiny_vision_config,
    tiny_vision_model,
)
from tests.support.rounding import assert_within_rounding

BAND = hf_sparse.pattern("band", radius=2)
MARKED = BAND | hf_sparse.pattern("global", positions=(0,))
# every token reads every token
WIDE = hf_sparse.pattern("band", radius=99)
BIGBIRD = hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=1)
UNNAMED = BAND | hf_sparse.pattern("global", positions=())
PREFIX = {"ViT": 1, "DeiT": 2, "Dinov2": 1, "Dinov2WithRegisters": 5, "Beit": 1}
HEADS = [(family, head) for family in VISION_FAMILIES for head in ("Model", "ForImageClassification")]
HEADS += [("DeiT", "ForImageClassificationWithTeacher"), ("ViT", "ForMaskedImageModeling")]


def first(model: PreTrainedModel, images: Tensor, **asks: Any) -> Tensor:
    """Return the first of a model's outputs."""
    with torch.no_grad():
        return model(images, **asks).to_tuple()[0]


def interpolating(model: PreTrainedModel) -> dict[str, bool]:
    """Return what asks a dense model to read images of another size."""
    known = inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}


def own_table(model: PreTrainedModel, height: int, width: int) -> Tensor:
    """Return the positions that a dense model makes by itself for images of a size."""
    (embeddings,) = (module for module in model.modules() if hasattr(module, "interpolate_pos_encoding"))
    rows = 2 if type(model).__name__.startswith("DeiT") else 1
    tokens = torch.zeros(1, rows + (height // 4) * (width // 4), 32)
    with torch.no_grad():
        return embeddings.interpolate_pos_encoding(tokens, height, width)


def table_of(model: PreTrainedModel) -> Tensor:
    (table,) = (weight for name, weight in model.state_dict().items() if name.endswith("position_embeddings"))
    return table


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_grid_is_that_of_the_tokens_of_an_image(family: str) -> None:
    config = hf_sparse.sparse_config(tiny_vision_config(family), BAND, image_size=24)
    assert vision_grid(tiny_vision_config(family)) == (PREFIX[family], 4, 4)
    assert vision_grid(config) == (PREFIX[family], 6, 6)
    assert vision_grid(config, (8, 20)) == (PREFIX[family], 2, 5)
    tokens = first(tiny_vision_model(family), tiny_images(16)).shape[1]
    assert tokens == PREFIX[family] + 4 * 4


def test_the_grid_of_an_image_that_is_not_square_has_its_height_first() -> None:
    assert vision_grid(tiny_vision_config("ViT", image_size=[8, 20])) == (1, 2, 5)
    assert vision_grid(tiny_vision_config("ViT", image_size=(24, 24), patch_size=[8, 4])) == (1, 3, 6)
    assert vision_grid(tiny_vision_config("Dinov2WithRegisters", num_register_tokens=2)) == (3, 4, 4)


def test_a_model_of_text_has_no_grid() -> None:
    with pytest.raises(
        hf_sparse.UnsupportedModelError,
        match="'bert' has no known grid of patches; known: beit, clip",
    ):
        vision_grid(tiny_config("Bert"))


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_a_larger_image_wide_open_says_what_the_dense_model_says_of_it(family: str, head: str, tmp_path: Path) -> None:
    dense, images = tiny_vision_model(family, head), tiny_images(28)
    dense.save_pretrained(tmp_path)
    config = hf_sparse.sparse_config(tmp_path, WIDE, image_size=28)
    sparse = sparse_model_class(type(dense)).from_pretrained(tmp_path, config=config).eval()
    asks = interpolating(dense)
    plain = first(dense, images, **asks)
    assert_within_rounding(first(sparse, images), first(dense.double(), images.double(), **asks), plain)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_positions_are_those_the_dense_model_makes_itself_and_prefix_rows_stay(family: str, tmp_path: Path) -> None:
    dense = tiny_vision_model(family)
    dense.save_pretrained(tmp_path)
    config = hf_sparse.sparse_config(tmp_path, BAND, image_size=28)
    made = AutoModel.from_pretrained(tmp_path, config=config)
    rows = 2 if family == "DeiT" else 1
    assert table_of(made).shape == (1, rows + 49, 32)
    assert torch.equal(table_of(made), own_table(dense, 28, 28))
    assert torch.equal(table_of(made)[:, :rows], table_of(dense)[:, :rows])
    assert made.config.image_size == 28


@pytest.mark.parametrize("family", ["ViT", "DeiT"])
def test_an_image_that_is_not_square_is_read_as_the_dense_model_reads_it(family: str, tmp_path: Path) -> None:
    dense, images = tiny_vision_model(family, "ForImageClassification"), tiny_images(16, 28)
    dense.save_pretrained(tmp_path / "dense")
    config = hf_sparse.sparse_config(tmp_path / "dense", WIDE, image_size=(16, 28))
    made = AutoModelForImageClassification.from_pretrained(tmp_path / "dense", config=config)
    assert torch.equal(table_of(made), own_table(dense, 16, 28))
    made.save_pretrained(tmp_path / "sparse")
    sparse = AutoModelForImageClassification.from_pretrained(tmp_path / "sparse").eval()
    plain = first(dense, images, interpolate_pos_encoding=True)
    oracle = first(dense.double(), images.double(), interpolate_pos_encoding=True)
    assert_within_rounding(first(sparse, images), oracle, plain)


@pytest.mark.parametrize("pattern", [MARKED, BIGBIRD], ids=lambda p: p.key)
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_tokens_read_along_the_pattern(family: str, pattern: Pattern, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny_images(16)
    masks = torch.stack([pattern.mask(16 + PREFIX[family], heads=4, layer=layer) for layer in range(2)])
    at: list[int] = []

    def masked(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
        mask = masks[len(at) % 2]
        at.append(0)
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=kwargs["scaling"])
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "masked", masked)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "masked", lambda **_: None)
    dense = tiny_vision_model(family)
    dense.set_attn_implementation("masked")
    plain, unmasked = first(dense, images), first(tiny_vision_model(family), images)
    got = first(hf_sparse.sparsify_(tiny_vision_model(family), pattern), images)
    assert_within_rounding(got, first(dense.double(), images.double()), plain)
    assert len(at) == 4
    assert (got - unmasked).abs().max() > 0.01


@pytest.mark.parametrize("way", ["sparsify_", "sparse_config"])
@pytest.mark.parametrize(("family", "head"), HEADS)
def test_two_rounds_of_save_and_load_give_equal_outputs_and_equal_files(
    family: str, head: str, way: str, tmp_path: Path
) -> None:
    dense, size = tiny_vision_model(family, head), 16 if way == "sparsify_" else 24
    cls = sparse_model_class(type(dense))
    if way == "sparsify_":
        model = hf_sparse.sparsify_(dense, MARKED)
    else:
        dense.save_pretrained(tmp_path / "dense")
        config = hf_sparse.sparse_config(tmp_path / "dense", MARKED, image_size=24)
        model = cls.from_pretrained(tmp_path / "dense", config=config).eval()
    said = first(model, tiny_images(size))
    model.save_pretrained(tmp_path / "one")
    again, found = cls.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(first(again.eval(), tiny_images(size)), said)
    again.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "one" / name, tmp_path / "two" / name, shallow=False), name


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_weights_are_found_under_the_names_of_today_and_under_older_ones(
    family: str, is_older: bool, tmp_path: Path
) -> None:
    dense = tiny_vision_model(family)
    dense.save_pretrained(tmp_path, save_original_format=is_older)
    config = hf_sparse.sparse_config(tmp_path, BAND)
    made, found = AutoModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(found.values())
    assert all(torch.equal(weight, dense.state_dict()[name]) for name, weight in made.state_dict().items())


def test_of_two_classes_for_one_head_the_checkpoint_chooses(tmp_path: Path) -> None:
    for head in ("ForImageClassification", "ForImageClassificationWithTeacher"):
        hf_sparse.sparsify_(tiny_vision_model("DeiT", head), BAND).save_pretrained(tmp_path / head)
        made = AutoModelForImageClassification.from_pretrained(tmp_path / head)
        assert type(made).__name__ == f"SparseDeiT{head}"


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_classification_marks_cls_and_a_bare_model_nothing(family: str) -> None:
    images, tokens = tiny_images(16), 16 + PREFIX[family]
    nothing = torch.zeros(2, tokens, dtype=torch.int64)
    cls = nothing.index_fill(1, torch.tensor(0), 1)
    for head, want in (("ForImageClassification", cls), ("Model", nothing)):
        model = hf_sparse.sparsify_(tiny_vision_model(family, head), UNNAMED)
        said = {name: first(model, images, global_attention_mask=m) for name, m in (("cls", cls), ("no", nothing))}
        assert (said["cls"] - said["no"]).abs().max() > 1e-3
        assert torch.equal(first(model, images), first(model, images, global_attention_mask=want))


def test_a_head_of_two_classifiers_marks_the_tokens_that_both_read() -> None:
    model, images = hf_sparse.sparsify_(tiny_vision_model("DeiT", "ForImageClassificationWithTeacher"), UNNAMED), 16
    both = torch.zeros(2, 18, dtype=torch.int64)
    both[:, :2] = 1
    want = first(model, tiny_images(images), global_attention_mask=both)
    assert torch.equal(first(model, tiny_images(images)), want)
    both[:, 1] = 0
    assert not torch.equal(first(model, tiny_images(images), global_attention_mask=both), want)


def test_a_head_marks_cls_of_images_larger_than_its_config_names() -> None:
    model = hf_sparse.sparsify_(tiny_vision_model("Dinov2", "ForImageClassification"), UNNAMED)
    marks = torch.zeros(2, 1 + 3 * 7, dtype=torch.int64).index_fill(1, torch.tensor(0), 1)
    images = tiny_images(12, 28)
    assert torch.equal(first(model, images), first(model, images, global_attention_mask=marks))


def test_a_layer_that_would_lose_the_global_tokens_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = type(tiny_vision_model("ViT").layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, hidden_states, attention_mask=None: forward(self, hidden_states))
    model = hf_sparse.sparsify_(tiny_vision_model("ViT", "ForImageClassification"), UNNAMED)
    with pytest.raises(
        ValueError, match=r"ViTLayer of transformers .* passes it on to no attention; name the global tokens"
    ):
        first(model, tiny_images(16), global_attention_mask=torch.ones(2, 17))
    first(hf_sparse.sparsify_(tiny_vision_model("ViT"), MARKED), tiny_images(16))


@pytest.mark.parametrize(
    ("family", "fields", "options", "error", "says"),
    [
        ("ViT", {}, {"max_length": 99}, ValueError, "vit reads images: give image_size, in pixels"),
        ("ViT", {}, {"image_size": 12}, ValueError, "image_size 12 x 12 is smaller than the 16 x 16 pixels"),
        ("ViT", {}, {"image_size": (32, 12)}, ValueError, "image_size 32 x 12 is smaller than the 16 x 16 pixels"),
        ("ViT", {}, {"image_size": 18}, ValueError, "must be a multiple of the patches of 4 x 4 pixels"),
        ("ViT", {}, {"image_size": "24"}, TypeError, r"must be pixels, a whole number or \(height, width\); got '24'"),
        ("ViT", {}, {"image_size": (24, 24, 3)}, TypeError, "must be pixels"),
        ("ViT", {}, {"image_size": True}, TypeError, "must be pixels"),
        ("ViT", {"image_size": [8, 16]}, {"image_size": 16}, ValueError, "this checkpoint's is 2 x 4 patches"),
        ("Dinov2", {}, {"image_size": (16, 24)}, ValueError, "must be square: dinov2 takes its positions"),
        ("Beit", {}, {"image_size": (16, 24)}, ValueError, "must be square: beit takes its positions"),
    ],
)
def test_a_size_that_cannot_be_read_is_refused(
    family: str, fields: dict[str, Any], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        hf_sparse.sparse_config(tiny_vision_config(family, **fields), BAND, **options)


def test_an_image_size_for_text_is_refused() -> None:
    with pytest.raises(ValueError, match="bert reads text: give max_length, in tokens"):
        hf_sparse.sparse_config(tiny_config("Bert"), BAND, image_size=64)


def test_a_size_that_is_not_whole_patches_may_stay() -> None:
    config = tiny_vision_config("ViT", image_size=18)
    assert hf_sparse.sparse_config(config, BAND, image_size=18).image_size == 18
    assert vision_grid(config) == (1, 4, 4)


def test_a_block_is_checked_against_the_tokens_of_the_larger_image() -> None:
    large = hf_sparse.pattern("block_local", block_size=40)
    with pytest.raises(ValueError, match="block_size 40"):
        hf_sparse.sparse_config(tiny_vision_config("ViT"), large, image_size=24)
    hf_sparse.sparse_config(tiny_vision_config("ViT"), large, image_size=28)


@pytest.mark.parametrize("field", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_a_bias_of_relative_positions_is_refused(field: str) -> None:
    says = f"beit with {field}=True cannot be made sparse: it adds a bias for every pair of tokens"
    with pytest.raises(hf_sparse.UnsupportedModelError, match=says):
        hf_sparse.sparse_config(tiny_vision_config("Beit", **{field: True}), BAND)
    model = tiny_vision_model("Beit", **{field: True})
    with pytest.raises(hf_sparse.UnsupportedModelError, match=says):
        hf_sparse.sparsify_(model, BAND)
    assert type(model) is transformers.BeitModel


def test_a_segmentation_head_reads_its_layers_by_number() -> None:
    fields = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
    model = tiny_vision_model("Beit", "ForSemanticSegmentation", **fields)
    plain, images = first(model, tiny_images(16)), tiny_images(16)
    oracle = first(tiny_vision_model("Beit", "ForSemanticSegmentation", **fields).double(), images.double())
    assert_within_rounding(first(hf_sparse.sparsify_(model, WIDE), images), oracle, plain)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_order_of_blocks_is_refused_where_patches_lie_row_by_row(family: str) -> None:
    pattern = hf_sparse.pattern("image_2d", query_block=(2, 2), flange=(1, 1), order="block")
    with pytest.raises(ValueError, match="but the patches of this model lie row by row"):
        hf_sparse.sparsify_(tiny_vision_model(family), pattern)
