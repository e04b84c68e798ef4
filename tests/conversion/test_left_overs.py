"""What stood there before, what a machine says of itself, and what one file alone knows."""

import fcntl
import importlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForSeq2SeqLM

import hf_sparse
from hf_sparse.conversion import hub
from hf_sparse.conversion.companions import is_foreign
from hf_sparse.conversion.convert import convert
from hf_sparse.errors import ConversionError, UnfinishedConversionError
from hf_sparse.integration import pushing
from hf_sparse.integration.kept import noting_kept
from tests.conftest import Command
from tests.support.checkpoints import tree, write_checkpoint
from tests.support.in_tree import write_in_tree
from tests.support.models import tiny_batch, tiny_model
from tests.support.zoo import tiny_of_type

BAND = hf_sparse.pattern("band", radius=8)
# the package has a function of that name
export = importlib.import_module("hf_sparse.conversion.export")


class Stopped(Exception):
    """What a conversion is broken off by."""


def stop(_: Path) -> str:
    raise Stopped


def read(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(path.read_text())
    return held


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_record_that_was_left_does_not_vouch_for_another_folder(bert: Path, tmp_path: Path, overwrite: bool) -> None:
    made = tmp_path / "sparse"
    with pytest.raises(Stopped):
        convert(bert, made, BAND, verify=False, judge=stop)
    assert (tmp_path / "sparse.partial" / "job.json").is_file()
    # trained meanwhile
    shutil.rmtree(made)
    made.mkdir()
    save_file({"weight": torch.ones(3)}, made / "model.safetensors")
    if not overwrite:
        before = tree(made)
        with pytest.raises(ConversionError, match="exists and is not empty"):
            convert(bert, made, BAND, verify=False)
        assert tree(made) == before
        return
    report = convert(bert, made, BAND, verify=False, overwrite=True)
    assert len(report.checksums) > 3
    assert "model.safetensors" not in report.checksums
    assert read(made / "config.json")["model_type"] == "sparse_bert"


def test_a_record_that_was_left_vouches_for_what_was_made(bert: Path, tmp_path: Path) -> None:
    made = tmp_path / "sparse"
    with pytest.raises(Stopped):
        convert(bert, made, BAND, verify=False, judge=stop)
    before = tree(made)
    convert(bert, made, BAND, verify=False)
    assert tree(made) == before
    assert not (tmp_path / "sparse.partial").exists()


def test_a_conversion_that_runs_is_no_left_over(bert: Path, tmp_path: Path) -> None:
    made = tmp_path / "sparse"
    with pytest.raises(Stopped):
        convert(bert, made, BAND, verify=False, judge=stop)
    handle = os.open(tmp_path / "sparse.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ConversionError, match="another conversion is writing"):
        convert(bert, made, hf_sparse.pattern("band", radius=4), verify=False)
    os.close(handle)
    with pytest.raises(ConversionError, match="was left by a conversion with other arguments"):
        convert(bert, made, hf_sparse.pattern("band", radius=4), verify=False)


def test_places_that_cannot_be_taken_are_refused_before_anything_is_written(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "x.partial"
    shutil.copytree(bert, source)
    with pytest.raises(ConversionError, match=r"has the name that a conversion to .* writes to meanwhile"):
        convert(source, tmp_path / "x", BAND)
    empty = tmp_path / "empty"
    empty.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(empty)
        with pytest.raises(ConversionError, match="is the current folder, which would be replaced; choose one in it"):
            convert(bert, ".", BAND)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == empty)
    with pytest.raises(ConversionError, match=r"is a disk of its own, .* choose a folder in it"):
        convert(bert, empty, BAND)
    assert not any(empty.iterdir())


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A sparse BERT that can be a Longformer."""
    write_checkpoint(tmp_path / "dense", "Bert", "ForMaskedLM", positions=100)
    pattern = hf_sparse.pattern("longformer", window=16)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=200, verify=False)
    return tmp_path / "sparse"


def test_an_export_replaces_nothing_that_it_was_not_told_to(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, aside = tmp_path / "made", tmp_path / "made.replaced"
    aside.mkdir()
    (aside / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"made\.replaced is in the way; remove it"):
        hf_sparse.export(sparse, made, "longformer", verify=False)
    assert tree(aside) == {"mine.txt": b"mine"}
    shutil.rmtree(aside)
    files_of = export.files_of

    def filled(root: Path) -> Any:
        made.mkdir(exist_ok=True)
        (made / "theirs.txt").write_text("theirs")
        return files_of(root)

    with monkeypatch.context() as patch:
        patch.setattr(export, "files_of", filled)
        with pytest.raises(UnfinishedConversionError, match="was filled by someone else meanwhile"):
            hf_sparse.export(sparse, made, "longformer", verify=False)
    assert tree(made) == {"theirs.txt": b"theirs"}

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "rename", lambda old, new: rename(old, new) if Path(old) != tmp_path / "made.partial" else stopped()
        )
        with pytest.raises(KeyboardInterrupt):
            hf_sparse.export(sparse, made, "longformer", verify=False, overwrite=True)
    assert tree(made) == {"theirs.txt": b"theirs"}
    hf_sparse.export(sparse, made, "longformer", verify=False, overwrite=True)
    assert "theirs.txt" not in tree(made)
    assert not aside.exists()


def test_an_export_says_in_one_line_what_it_leaves_out_and_what_cannot_be_written(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
        with pytest.raises(UnfinishedConversionError, match="could not be written, and nothing was left at"):
            hf_sparse.export(sparse, tmp_path / "made", "longformer", verify=False)
    (sparse / "adapter_config.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"holds an adapter .* which an export would leave out"):
        hf_sparse.export(sparse, tmp_path / "made", "longformer", verify=False)
    assert not (tmp_path / "made").exists()


def test_a_config_says_nothing_of_the_machine_and_all_of_generation(tmp_path: Path) -> None:
    source = tmp_path / "led"
    write_in_tree(source, "LED", "ForConditionalGeneration")
    held = read(source / "config.json")
    settings = {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2}
    (source / "config.json").write_text(json.dumps({**held, **settings, "_name_or_path": "/opt/ada/led"}))
    (source / "generation_config.json").unlink(missing_ok=True)
    hf_sparse.convert(source, tmp_path / "sparse", verify=False)
    made = read(tmp_path / "sparse" / "config.json")
    assert "_name_or_path" not in made
    assert str(tmp_path) not in json.dumps(made)
    assert {name: made[name] for name in settings} == settings
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse")
    assert (model.generation_config.num_beams, model.generation_config.length_penalty) == (3, 0.5)
    hf_sparse.export(tmp_path / "sparse", tmp_path / "back", "led", verify=False)
    back = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "back")
    assert (back.generation_config.num_beams, back.generation_config.no_repeat_ngram_size) == (3, 2)


def test_a_tokenizer_says_nothing_of_the_machine(bert: Path, tmp_path: Path) -> None:
    path = bert / "tokenizer_config.json"
    path.write_text(json.dumps({**read(path), "name_or_path": "/opt/ada/x", "special_tokens_map_file": "/opt/ada/y"}))
    hf_sparse.convert(bert, tmp_path / "sparse", BAND, verify=False)
    assert "/opt/ada" not in (tmp_path / "sparse" / "tokenizer_config.json").read_text()


def test_a_second_copy_of_the_dense_weights_stays_behind(bert: Path, tmp_path: Path) -> None:
    for folder in ("original", "metal"):
        assert is_foreign(PurePosixPath(folder, "model.bin"), PurePosixPath())
        (bert / folder).mkdir()
        (bert / folder / "consolidated.00.pth").write_bytes(b"x")
        assert f"{folder}/*" in hub._UNWANTED
    report = hf_sparse.convert(bert, tmp_path / "sparse", BAND, verify=False)
    assert {"original/", "metal/"} <= set(report.files_left_behind)


def test_the_limit_of_documents_is_raised_wherever_it_stands(bert: Path, tmp_path: Path) -> None:
    name = "config_sentence_transformers.json"
    (bert / name).write_text(json.dumps({"document_length": 90, "query_length": 32}))
    hf_sparse.convert(bert, tmp_path / "sparse", BAND, max_length=300, verify=False)
    assert read(tmp_path / "sparse" / name) == {"document_length": 300, "query_length": 32}


def test_a_cache_that_may_lack_files_is_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def list_repo_files(self, *_: Any, **__: Any) -> list[str]:
            raise ConnectionError

    def unknown(*_: Any, **__: Any) -> None:
        raise CachedRepoTreeNotFoundError("no tree")

    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(bert))
    monkeypatch.setattr(hub, "HfApi", Away)
    monkeypatch.setattr(hub, "get_cached_repo_tree", unknown)
    with pytest.raises(ConversionError, match=r"the cache may hold ada/tiny in part, .* `hf download ada/tiny`"):
        hub.download("ada/tiny", revision=None, token=None)


def test_a_readme_may_begin_with_a_mark(bert: Path, tmp_path: Path) -> None:
    (bert / "README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: mit\n---\n# Bert\n")
    hf_sparse.convert(bert, tmp_path / "sparse", BAND, verify=False)
    assert (tmp_path / "sparse" / "README.md").read_text().startswith("---\n")
    assert "\nlicense: mit\n" in (tmp_path / "sparse" / "README.md").read_text()


def test_a_folder_that_is_gone_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_sparse.sparsify_(tiny_model("Bert"), BAND).save_pretrained(tmp_path / "run")
    model = transformers.AutoModel.from_pretrained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    cards = []
    monkeypatch.setattr(pushing, "readme_of", lambda *_, **__: None)
    monkeypatch.setattr(
        pushing, "push_folder", lambda folder, *_, **__: cards.append((folder / "README.md").read_text())
    )
    model.push_to_hub("ada/x")
    assert "base_model" not in cards[0]
    assert str(tmp_path) not in cards[0]


def test_a_layer_that_is_called_several_times_is_measured_each_time() -> None:
    """ALBERT with two layers of one module, beside the same model called layer by layer."""
    model, name = tiny_of_type("albert"), "0"
    batch = tiny_batch(40, padding=0)
    with noting_kept(model, {name: [BAND, None]}) as kept, torch.no_grad():
        for _ in range(2):
            model(**batch)
            assert kept.calls == {name: 2}
        both = kept.shares[name]
        model.config.num_hidden_layers = 1
        model(**batch)
    first = kept.shares[name]
    assert kept.calls == {name: 1}
    assert (both[0] - first[0]).abs().max() > 1e-4
    assert torch.equal(both[1], torch.ones_like(both[1]))


def test_lines_end_where_json_lines_end(bert: Path, tmp_path: Path, hf_sparse_command: Command) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        json.dumps({"text": "the river\u2028reads a page of the long word every stone " * 4}, ensure_ascii=False) + "\n"
    )
    given = ("inspect", str(bert), "--texts", str(texts), "-p", "band radius=8", "--length", "24")
    code, _, err = hf_sparse_command(*given, "--html", str(tmp_path))
    assert code == 2
    assert "is a folder; name a file in it" in err
    code, out, err = hf_sparse_command(*given)
    assert code == 0, err
    assert "band" in out
