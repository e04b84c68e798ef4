"""Every family, converted: which numbers move, and that what comes out is the model that went in."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import hf_sparse
from hf_sparse.conversion import ConversionReport, Count
from hf_sparse.patterns import PATTERNS, Pattern
from tests.support.checkpoints import MODEL_TYPES, edit_json, tree, write_checkpoint, write_tokenizer
from tests.support.models import tiny_batch
from tests.support.rounding import assert_within_rounding

LONGFORMER = hf_sparse.pattern("longformer", window=8)
LENGTH = 301
# family, head, and the rows of its table that come before position 0
CASES = [
    ("Bert", "ForMaskedLM", 0),
    ("Bert", "Model", 0),
    ("Roberta", "ForMaskedLM", 2),
    ("Roberta", "ForSequenceClassification", 2),
    ("XLMRoberta", "Model", 2),
    ("Camembert", "ForSequenceClassification", 2),
    ("DistilBert", "ForMaskedLM", 0),
    ("Electra", "ForSequenceClassification", 0),
]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, as safetensors' own reader has it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def tiled_by_hand(table: Tensor, rows: int, offset: int) -> Tensor:
    """Return a longer table of positions, row by row."""
    learned = table.shape[0] - offset
    return torch.stack(
        [table[row] if row < offset else table[offset + (row - offset) % learned] for row in range(rows)]
    )


def wide_open_like(folder: Path, tokens: int) -> Any:
    """Return the config of a checkpoint with its pattern wide open."""
    config = AutoConfig.from_pretrained(folder)
    opened = hf_sparse.pattern_from_dict(config.sparse_attention["pattern"]).wide_open(tokens)
    config.sparse_attention = {**config.sparse_attention, "pattern": opened.to_dict()}
    return config


@pytest.mark.parametrize(("family", "head", "offset"), CASES)
def test_every_number_is_carried_tiled_or_a_copy(tmp_path: Path, family: str, head: str, offset: int) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, family, head)
    report = hf_sparse.convert(source, made, LONGFORMER, max_length=LENGTH)
    before, after = tensors(source), tensors(made)
    added = {name for name in after if ".sparse_state." in name}
    assert set(after) - added == set(before)
    (table,) = [name for name in before if name.endswith("embeddings.position_embeddings.weight")]
    assert torch.equal(after[table], tiled_by_hand(before[table], LENGTH + offset, offset))
    for name in set(before) - {table}:
        assert torch.equal(after[name], before[name]), name
    # two layers, three projections, a weight and a bias each
    assert len(added) == 12
    for name in added:
        stem, _, part = name.partition(".sparse_state.")
        own = part.replace("query", "q_lin").replace("key", "k_lin").replace("value", "v_lin")
        origin = f"{stem}.{own if family == 'DistilBert' else part}"
        assert torch.equal(after[name], before[origin]), name
    assert report.tiled == Count(1, after[table].numel())
    assert report.added == Count(12, sum(after[name].numel() for name in added))
    assert report.moved == Count(len(before) - 1, sum(before[name].numel() for name in set(before) - {table}))
    assert (report.dropped, report.max_length_before, report.max_length) == (Count(), 128 - offset, LENGTH)


@pytest.mark.parametrize(("family", "head", "offset"), CASES)
def test_wide_open_the_converted_model_says_what_its_source_says(
    tmp_path: Path, family: str, head: str, offset: int
) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    dense = write_checkpoint(source, family, head)
    report = hf_sparse.convert(source, made, LONGFORMER, max_length=LENGTH)
    assert report.wide_open_difference is not None
    batch = tiny_batch()
    sparse_class = type(dense).__name__
    sparse = getattr(hf_sparse.integration.auto, f"Sparse{sparse_class}").from_pretrained(
        made, config=wide_open_like(made, 128)
    )
    with torch.no_grad():
        plain = dense(**batch, output_hidden_states=True)
        oracle = dense.double()(**batch, output_hidden_states=True)
        actual = sparse.eval()(**batch, output_hidden_states=True)
    real = batch["attention_mask"] != 0
    got, exact, rounded = (said.hidden_states[-1][real] for said in (actual, oracle, plain))
    assert_within_rounding(got, exact, rounded)
    # what the head says, of real tokens where it says something of tokens
    got, exact, rounded = (said[0][real] if said[0].dim() == 3 else said[0] for said in (actual, oracle, plain))
    assert_within_rounding(got, exact, rounded)
    assert type(sparse).__name__ == f"Sparse{sparse_class}"


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_the_auto_classes_load_a_converted_checkpoint(tmp_path: Path, family: str) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, family, "ForMaskedLM")
    write_tokenizer(source, family)
    hf_sparse.convert(source, made, LONGFORMER, max_length=LENGTH, verify=False)
    text = "the river reads " * 40
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(source))
    batch = tokenizer(text, return_tensors="pt", truncation=True)
    assert batch["input_ids"].shape[1] > 120
    for auto, head in ((AutoModel, "Model"), (AutoModelForMaskedLM, "ForMaskedLM")):
        model = auto.from_pretrained(made).eval()
        assert type(model).__name__ == f"Sparse{family}{head}"
        assert model.config.model_type == f"sparse_{MODEL_TYPES[family].replace('-', '_')}"
        with torch.no_grad():
            out = model(**batch)[0]
        assert out.shape[:2] == batch["input_ids"].shape
        assert out.isfinite().all()
    classifier, found = AutoModelForSequenceClassification.from_pretrained(made, output_loading_info=True)
    assert type(classifier).__name__ == f"Sparse{family}ForSequenceClassification"
    assert not [name for name in found["missing_keys"] if "classifier" not in name and "pooler" not in name]
    said = pipeline("fill-mask", model=str(made))("the <mask> reads")
    assert len(said) == 5


def test_saving_what_was_loaded_and_loading_that_gives_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    write_checkpoint(source, "Roberta", "ForMaskedLM")
    hf_sparse.convert(source, tmp_path / "sparse", LONGFORMER, max_length=LENGTH, verify=False)
    AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse").save_pretrained(tmp_path / "once")
    AutoModelForMaskedLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")
    converted, saved = tensors(tmp_path / "sparse"), tensors(tmp_path / "once")
    assert converted.keys() == saved.keys()
    assert all(torch.equal(converted[name], saved[name]) for name in converted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_carried_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, "Roberta", "Model", dtype=dtype)
    hf_sparse.convert(source, made, LONGFORMER, max_length=LENGTH, verify=False)
    before, after = tensors(source), tensors(made)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    table = "embeddings.position_embeddings.weight"
    assert torch.equal(after[table].view(torch.int16), tiled_by_hand(before[table], LENGTH + 2, 2).view(torch.int16))
    assert AutoModel.from_pretrained(made).dtype == dtype


def test_shards_stay_shards_and_their_index_names_what_is_there(tmp_path: Path) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, "Roberta", "ForMaskedLM", max_shard_size="20KB")
    hf_sparse.convert(source, made, LONGFORMER, max_length=LENGTH, verify=False)
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(path.name for path in made.glob("*.safetensors")) == files
    index = json.loads((made / "model.safetensors.index.json").read_text())
    place: dict[str, str] = {}
    for file in files:
        with safe_open(made / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            place |= dict.fromkeys(shard.keys(), file)
    held = tensors(made)
    assert index["weight_map"] == place
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in held.values())
    # a copy lies beside what it was copied from
    assert all(file == place[name.replace("sparse_state.", "")] for name, file in place.items())
    loaded, found = AutoModelForMaskedLM.from_pretrained(made, output_loading_info=True)
    assert not any(found.values())
    assert loaded.config.max_position_embeddings == LENGTH + 2


def test_old_buffers_are_dropped_and_names_without_the_prefix_stay_so(tmp_path: Path) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, "Bert", "Model")
    # with the names that the first checkpoints of BERT have
    held = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors(source).items()
    }
    held["embeddings.position_ids"] = torch.arange(128)[None]
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    # the weights of a bare model under the name of a class with a head
    edit_json(source / "config.json", architectures=["BertForSequenceClassification"])
    report = hf_sparse.convert(source, made, LONGFORMER, max_length=LENGTH)
    assert report.dropped == Count(1, 128)
    assert "embeddings.position_ids" not in tensors(made)
    assert "encoder.layer.1.attention.self.sparse_state.value.bias" in tensors(made)
    assert report.wide_open_note.startswith("last_hidden_state on")
    _, found = AutoModel.from_pretrained(made, output_loading_info=True)
    assert not any(found.values())


def test_layers_keep_their_own_patterns_and_only_those_that_project_gain_weights(tmp_path: Path) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, "Bert", "ForMaskedLM")
    bigbird = hf_sparse.pattern("bigbird", block_size=16)
    report = hf_sparse.convert(source, made, bigbird, max_length=256, layers={1: LONGFORMER})
    added = {name.partition(".sparse_state.")[0] for name in tensors(made) if ".sparse_state." in name}
    assert added == {"bert.encoder.layer.1.attention.self"}
    assert report.layers == {"1": LONGFORMER.to_dict()}
    shares = bigbird.density(256, heads=4, layer=0) + LONGFORMER.density(256, heads=4)
    assert report.density == pytest.approx(shares / 2, rel=1e-12)
    dense = hf_sparse.convert(source, tmp_path / "half", LONGFORMER, layers={"0": "dense"}, verify=False)
    assert dense.density == pytest.approx((1 + LONGFORMER.density(128)) / 2, rel=1e-12)
    assert AutoModel.from_pretrained(tmp_path / "half").encoder.layer[0].attention.self._sparse.pattern is None


def test_without_a_length_nothing_is_tiled_and_no_limit_moves(bert: Path, tmp_path: Path) -> None:
    report = hf_sparse.convert(bert, tmp_path / "sparse", hf_sparse.pattern("band", radius=4))
    assert (report.tiled, report.added, report.max_length) == (Count(), Count(), 128)
    assert tensors(tmp_path / "sparse").keys() == tensors(bert).keys()
    assert (tmp_path / "sparse/tokenizer.json").read_bytes() == (bert / "tokenizer.json").read_bytes()


def test_a_pattern_that_cannot_be_wide_open_is_said_to_be_not_comparable(bert: Path, tmp_path: Path) -> None:
    def closed(self: object, length: int) -> None:
        raise ValueError("no setting opens it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_sparse.PATTERNS["band"], "wide_open", closed)
        report = hf_sparse.convert(bert, tmp_path / "sparse", hf_sparse.pattern("band", radius=4))
    assert report.wide_open_difference is None
    assert report.wide_open_note == "not comparable: no setting opens it"


def test_the_report_says_the_same_as_values_as_a_table_and_as_text(bert: Path, tmp_path: Path) -> None:
    report = hf_sparse.convert(bert, tmp_path / "sparse", LONGFORMER, max_length=LENGTH)
    assert isinstance(report, ConversionReport)
    held = json.loads(json.dumps(report.to_dict()))
    assert held["pattern"] == LONGFORMER.to_dict()
    assert held["tiled"] == {"tensors": 1, "numbers": 32 * LENGTH}
    assert held["files_left_behind"] == []
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table())
    drawn = console.export_text()
    for text in (drawn, str(report)):
        assert "sparse_bert" in text
        assert f"{32 * LENGTH:,} in 1 tensor" in text
    assert "\n" not in str(report)


def test_progress_is_told_of_every_byte(bert: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    hf_sparse.convert(bert, tmp_path / "sparse", LONGFORMER, verify=False, progress=lambda *seen: told.append(seen))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {told[-1][0]}
    assert told[-1][0] >= sum(path.stat().st_size for path in (tmp_path / "sparse").glob("*.safetensors"))


# those whose defaults do not fit a short text, and those whose nodes the source has not
UNLIKE = ("block_local", "random", "bigbird", "axial", "image_2d", "star", "etc", "lsg")


@pytest.mark.parametrize(
    "pattern",
    [
        *(cls() for key, cls in sorted(PATTERNS.items()) if key not in UNLIKE),
        hf_sparse.pattern("axial", width=8),
        hf_sparse.pattern("image_2d", width=8),
        hf_sparse.pattern("sparse_transformer", stride=8, summary=2, heads="interleaved"),
        hf_sparse.pattern("block_local", block_size=16),
        hf_sparse.pattern("random", block_size=16),
        hf_sparse.pattern("bigbird", block_size=16),
        hf_sparse.pattern("band") | hf_sparse.pattern("global"),
        hf_sparse.by_head({range(0, 2): hf_sparse.pattern("global"), range(2, 4): LONGFORMER}),
        hf_sparse.by_head({range(0, 2): hf_sparse.pattern("band"), range(2, 4): hf_sparse.pattern("global")}),
    ],
    ids=lambda p: p.key,
)
def test_every_pattern_converts_and_agrees_wide_open(pattern: Pattern, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "ForMaskedLM")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=LENGTH)
    assert report.wide_open_difference is not None
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")).__name__ == "SparseBertForMaskedLM"


@pytest.mark.parametrize(
    "pattern",
    [
        hf_sparse.pattern("star"),
        hf_sparse.pattern("etc", num_global=4),
        hf_sparse.pattern("bigbird", block_size=16, num_external_global=3),
    ],
    ids=lambda p: p.key,
)
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_patterns_with_nodes_convert_with_vectors_of_zeros(pattern: Pattern, head: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", head)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=LENGTH)
    assert report.wide_open_difference is None
    held = tensors(tmp_path / "sparse")
    (name,) = (name for name in held if "sparse_nodes" in name)
    added = {name for name in held if ".sparse_state." in name}
    assert len(added) == {"star": 2 * 8, "etc": 2 * 2, "bigbird": 0}[pattern.key]
    assert not any(held[name].any() for name in added if pattern.key == "etc" or ".output." in name)
    assert name == ("sparse_nodes.weight" if head == "Model" else "bert.sparse_nodes.weight")
    assert held[name].shape == (pattern.num_node_vectors, 32)
    assert not held[name].any()
    _, found = AutoModel.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any("sparse_nodes" in key for kind in ("missing_keys", "unexpected_keys") for key in found[kind])
