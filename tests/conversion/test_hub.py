"""A model on the Hub, served by the loopback."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import tree, write_checkpoint, write_tokenizer
from tests.support.hub_server import COMMIT, serving

# one process does all: the client reads its settings when it is imported
_PROGRAM = """
import json, sys
import hf_sparse
from huggingface_hub import constants
from hf_sparse import ConversionError

room, said = sys.argv[1], {}
band = hf_sparse.pattern("band", radius=8)

def attempt(name, source, **options):
    try:
        said[name] = hf_sparse.convert(source, f"{room}/{name}", band, verify=False, **options).to_dict()
    except ConversionError as error:
        said[name] = str(error)

attempt("plain", "ada/tiny", max_length=300)
attempt("commit", "ada/tiny", revision="COMMIT")
attempt("no_such_model", "ada/none")
attempt("no_such_revision", "ada/tiny", revision="v9")
attempt("pickles", "ada/pickles")
attempt("asked_for", "ada/pickles", allow_pickle=True)
constants.HF_HUB_OFFLINE = True
attempt("from_the_cache", "ada/tiny")
attempt("not_in_the_cache", "ada/other")
print(json.dumps(said))
""".replace("COMMIT", COMMIT)


@pytest.mark.several_processes
def test_a_model_on_the_hub_converts_as_a_folder_does(tmp_path: Path) -> None:
    tiny, pickles, room = tmp_path / "tiny", tmp_path / "pickles", tmp_path / "room"
    room.mkdir()
    model = write_checkpoint(tiny, "Roberta", "ForMaskedLM", max_shard_size="40KB")
    write_tokenizer(tiny, "Roberta")
    for name in ("onnx/model.onnx", "pytorch_model.bin", "2_Dense/pytorch_model.bin", "README.md"):
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_text("x")
    pickles.mkdir()
    (pickles / "config.json").write_text((tiny / "config.json").read_text())
    torch.save(model.state_dict(), pickles / "pytorch_model.bin")
    with serving({"ada/tiny": tiny, "ada/pickles": pickles}) as hub:
        ran = hub.run(_PROGRAM, tmp_path / "home", str(room))
    said = json.loads(ran.stdout)
    assert said["plain"]["source"] == f"ada/tiny@{COMMIT}"
    assert said["plain"]["max_length"] == 300
    assert said["plain"]["files_left_behind"] == ["onnx/model.onnx", "pytorch_model.bin"]
    made = tree(room / "plain")
    assert made["2_Dense/pytorch_model.bin"] == b"x"
    assert b"base_model: ada/tiny\n" in made["README.md"]
    assert f"of `ada/tiny@{COMMIT}`".encode() in made["README.md"]
    assert tree(room / "commit").keys() == made.keys()
    assert tree(room / "from_the_cache") == tree(room / "commit")
    assert "gives no model of that id (status 404); check the spelling, or pass a token" in said["no_such_model"]
    assert "gives no model of that id at revision 'v9' (status 404)" in said["no_such_revision"]
    assert "ada/pickles@" in said["pickles"]
    assert "has its weights only as pytorch_model.bin, which conversion does not read" in said["pickles"]
    assert "or pass allow_pickle=True" in said["pickles"]
    held = load_file(room / "asked_for/model.safetensors")
    # those that are tied are written once
    wanted = {name: weight for name, weight in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], weight) for name, weight in wanted.items())
    assert "HF_HUB_OFFLINE forbids asking the Hub" in said["not_in_the_cache"]
    assert sorted(path.name for path in room.iterdir()) == ["asked_for", "commit", "from_the_cache", "plain"]
    assert not [path for path in hub.asked if path.endswith(".onnx")]
    assert not [path for path in hub.asked if re.fullmatch(r"/ada/tiny/resolve/[^/]+/pytorch_model.bin", path)]
