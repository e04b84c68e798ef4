"""Saving and loading: sparsity survives, files stay equal, and nothing falls back to dense in silence."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertModel

import hf_sparse
from hf_sparse.patterns import PATTERNS
from tests.support.models import FAMILIES, tiny_batch, tiny_config, tiny_model

LONGFORMER = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))


@pytest.mark.parametrize("key", sorted(PATTERNS))
def test_two_rounds_of_save_and_load_give_equal_logits_and_equal_files(key: str, tmp_path: Path) -> None:
    fields = {"width": 8} if key in ("axial", "image_2d") else {}
    model = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM"), PATTERNS[key](**fields))
    batch = tiny_batch()
    with torch.no_grad():
        logits = model(**batch).logits
    for first, second in ((None, "one"), ("one", "two")):
        held = model if first is None else AutoModelForMaskedLM.from_pretrained(tmp_path / first)
        with torch.no_grad():
            assert torch.equal(held.eval()(**batch).logits, logits)
        held.save_pretrained(tmp_path / second)
    for name in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "one" / name, tmp_path / "two" / name, shallow=False), name
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["model_type"] == "sparse_bert"
    assert config["architectures"] == ["SparseBertForMaskedLM"]
    assert config["sparse_attention"]["pattern"]["key"] == key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_loads_sparse_from_a_dense_checkpoint(family: str, tmp_path: Path) -> None:
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path)
    config = hf_sparse.sparse_config(tmp_path, LONGFORMER)
    for name in (
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    ):
        auto = getattr(__import__("transformers"), name)
        model = auto.from_pretrained(tmp_path, config=config)
        assert type(model).__name__.startswith(f"Sparse{family}")
        assert model.config._attn_implementation == "hf_sparse"
        weights = model.state_dict()
        copied = [key for key in weights if ".sparse_state." in key]
        assert len(copied) == 2 * 3 * 2
        for key in copied:
            kind = {"query": "q_lin", "key": "k_lin", "value": "v_lin"} if family == "DistilBert" else {}
            own = key.replace(".sparse_state", "")
            for ours, theirs in kind.items():
                own = own.replace(f".{ours}.", f".{theirs}.")
            assert torch.equal(weights[key], weights[own]), key


def test_global_projections_are_loaded_and_not_copied_again(tmp_path: Path) -> None:
    model = hf_sparse.sparsify_(tiny_model("Roberta", "ForMaskedLM"), LONGFORMER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sparse_state." in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path).state_dict()
        for key, value in model.state_dict().items():
            if ".sparse_state." in key:
                assert torch.equal(loaded[key], value), key


def test_a_sparse_checkpoint_under_sdpa_is_the_dense_model(tmp_path: Path) -> None:
    dense, batch = tiny_model("Bert", "ForMaskedLM"), tiny_batch()
    with torch.no_grad():
        want = dense(**batch).logits
    hf_sparse.sparsify_(dense, hf_sparse.pattern("band", radius=2)).save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        model = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation=name).eval()
        with torch.no_grad():
            got = model(**batch).logits
        if name == "sdpa":
            assert torch.equal(got, want)
        else:
            # two dense kernels: rounding apart
            assert (got - want)[batch["attention_mask"].bool()].abs().max() <= 1e-5 * want.abs().max()


def test_an_inner_model_saved_alone_stays_sparse(tmp_path: Path) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM"), LONGFORMER)
    model.bert.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "SparseBertModel"


def test_without_the_plugin_the_auto_classes_fail_loudly(tmp_path: Path) -> None:
    hf_sparse.sparsify_(tiny_model("Bert"), LONGFORMER).save_pretrained(tmp_path)
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "sparse_bert" in done.stderr


def test_a_config_without_an_entry_is_refused() -> None:
    model = tiny_model("Bert")
    model.set_attn_implementation("hf_sparse")
    with pytest.raises(ValueError, match="belongs to no sparse model"):
        model(**tiny_batch())


def test_an_entry_of_a_later_version_is_refused(tmp_path: Path) -> None:
    hf_sparse.sparsify_(tiny_model("Bert"), LONGFORMER).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["sparse_attention"]["version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"version 99.*pip install -U"):
        AutoModel.from_pretrained(tmp_path)


def test_an_unknown_pattern_in_a_config_is_refused(tmp_path: Path) -> None:
    hf_sparse.sparsify_(tiny_model("Bert"), LONGFORMER).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"longformer"', '"longfromer"'))
    with pytest.raises(ValueError, match="unknown pattern 'longfromer'; known: axial, band"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("family", "offset"), [("Bert", 0), ("Roberta", 2), ("DistilBert", 0)])
def test_a_sparse_config_lengthens_a_dense_checkpoint_as_it_loads(family: str, offset: int, tmp_path: Path) -> None:
    dense = tiny_model(family, positions=40 + offset)
    dense.save_pretrained(tmp_path)
    config = hf_sparse.sparse_config(tmp_path, LONGFORMER, max_length=100)
    model = AutoModel.from_pretrained(tmp_path, config=config).eval()
    (key,) = (key for key in model.state_dict() if key.endswith("position_embeddings.weight"))
    table, learned = model.state_dict()[key], dense.state_dict()[key]
    assert table.shape[0] == 100 + offset
    assert torch.equal(table[: 40 + offset], learned)
    assert torch.equal(table[40 + offset : 80 + offset], learned[offset:])
    assert torch.equal(table[80 + offset :], learned[offset : offset + 20])
    with torch.no_grad():
        out = model(**tiny_batch(100)).last_hidden_state
    assert out.shape[1] == 100
    model.save_pretrained(tmp_path / "long")
    again = AutoModel.from_pretrained(tmp_path / "long").eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny_batch(100)).last_hidden_state, out)


def test_a_sparse_config_refuses_a_shorter_length() -> None:
    with pytest.raises(ValueError, match="max_length 20 is shorter than the 126 tokens"):
        hf_sparse.sparse_config(tiny_config("Roberta"), LONGFORMER, max_length=20)


def test_the_auto_config_knows_sparse_types(tmp_path: Path) -> None:
    hf_sparse.sparse_config(tiny_config("XLMRoberta"), LONGFORMER).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "sparse_xlm_roberta"
    assert config.sparse_attention["pattern"] == LONGFORMER.to_dict()


def test_a_sparse_model_unpickles_in_a_fresh_process(tmp_path: Path) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM"), LONGFORMER)
    torch.save(model, tmp_path / "model.pt")
    code = (
        f"import torch, hf_sparse; print(type(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "SparseBertForMaskedLM", done.stderr


def test_a_model_that_shares_its_config_stays_dense() -> None:
    config = tiny_config("Bert")
    one, other = BertModel(config), BertModel(config).eval()
    batch = tiny_batch()
    with torch.no_grad():
        want = other(**batch).last_hidden_state
        hf_sparse.sparsify_(one, LONGFORMER)
        assert torch.equal(other(**batch).last_hidden_state, want)
        assert BertModel(config)(**batch).last_hidden_state.shape == want.shape
    assert one.config is one.encoder.layer[0].attention.self.config
    assert type(config).__name__ == "BertConfig"
