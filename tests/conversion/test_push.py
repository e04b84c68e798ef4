"""Converted models go to the Hub, over HTTP to the loopback, by the unchanged client, and come back by their id."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load

from tests.support.checkpoints import tree, write_checkpoint, write_tokenizer
from tests.support.hub_server import WATCH_ADDRESSES, Hub, serving

TOKEN, WRONG = "hf_aSecretOfAda0123456789abcdefghij", "hf_notHersZyxwvutsrq9876543210zyxwv"
CARD = """---
license: apache-2.0
library_name: sentence-transformers
tags:
- tiny
model-index:
- name: tiny
  results: []
---

# Tiny
"""
# one process and its child do all: the client reads its settings when it is imported; the parent has not imported hf_sparse
PROGRAM = f"""{WATCH_ADDRESSES}
import json, logging, os, sys, traceback
logging.basicConfig(level=logging.DEBUG)
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
from tests.support.models import tiny_batch

room, wrong, said = sys.argv[1], sys.argv[2], {{}}

def logits(place, **options):
    with torch.no_grad():
        return AutoModelForMaskedLM.from_pretrained(place, **options)(**tiny_batch()).logits

child = os.fork()
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        logits("ada/one")
    except ValueError as error:
        said["without code"] = str(error)
    said["imported before"] = "hf_sparse" in sys.modules
    model = AutoModelForMaskedLM.from_pretrained("ada/with-code", trust_remote_code=True)
    said["imported after"] = "hf_sparse" in sys.modules
    said["class"] = type(model).__name__
    model.save_pretrained(f"{{room}}/saved")
    said["equal"] = torch.equal(logits(f"{{room}}/saved", trust_remote_code=True), logits(f"{{room}}/with-code"))
    said["elsewhere"] = elsewhere
    print(json.dumps(said))
    os._exit(sys.stdout.flush() or 0)

import hf_sparse
from hf_sparse import cli, console
longformer = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))

def attempt(name, act):
    try:
        said[name] = act()
    except Exception as error:
        said[name] = f"{{type(error).__name__}}: {{error}}"
        said[name + " in full"] = repr(error) + traceback.format_exc()

def convert(to, **options):
    settings = {{"max_length": 300, "push_to": f"ada/{{to}}", "verify": False, **options}}
    return hf_sparse.convert(f"{{room}}/dense", f"{{room}}/{{to}}", longformer, **settings).to_dict()

def command(*arguments):
    try:
        console.run(cli.app, "hf-sparse", ["convert", f"{{room}}/dense", *arguments])
    except SystemExit as stop:
        return stop.code

attempt("one", lambda: convert("one"))
attempt("by its id", lambda: torch.equal(logits("ada/one"), logits(f"{{room}}/one")))
attempt("tokenizer", lambda: AutoTokenizer.from_pretrained("ada/one").model_max_length)
attempt("with code", lambda: convert("with-code", remote_code=True, private=True))
model = AutoModelForMaskedLM.from_pretrained(f"{{room}}/one")
attempt("in shards", lambda: model.push_to_hub("ada/own", max_shard_size="60KB", tags="mine").oid)
attempt("whole", lambda: model.push_to_hub("ada/own", commit_message="Again").oid)
attempt("own by its id", lambda: torch.equal(logits("ada/own"), logits(f"{{room}}/one")))
attempt("while saved", lambda: model.save_pretrained(f"{{room}}/kept", push_to_hub=True, repo_id="ada/kept"))
attempt("no account", lambda: convert("never", token=wrong))
attempt("no account of a model", lambda: model.push_to_hub("ada/never", token=wrong).oid)
attempt("no such source", lambda: hf_sparse.convert("ada/none", f"{{room}}/none", longformer, token=wrong))
attempt("server is down", lambda: convert("later"))
attempt("pushed again", lambda: convert("later"))
arguments = [f"{{room}}/others", "-p", "band", "--no-verify", "--push-to"]
attempt("of others", lambda: command(*arguments, "bob/others"))
attempt("her own", lambda: command(*arguments, "ada/others", "--private"))
judged = ["-p", "band", "--set", "radius=4", "--texts", f"{{room}}/texts.txt", "--no-verify", "--push-to", "ada/judged"]
attempt("judged", lambda: command(f"{{room}}/judged", *judged))
said["elsewhere"] = elsewhere
print(json.dumps(said))
"""


@dataclasses.dataclass
class Pushed:
    """What the program said and left.

    Attributes:
        said: by attempt.
        loaded: what a process said that had not imported hf_sparse.
        room: the folder with the dense model and what was converted.
        hub: the server.
        home: where the client keeps what it fetched.
        output: stdout and stderr.
    """

    said: dict[str, Any]
    loaded: dict[str, Any]
    room: Path
    hub: Hub
    home: Path
    output: str


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process pushed to a Hub that stands until the last test has run."""
    room, home = tmp_path_factory.mktemp("room"), tmp_path_factory.mktemp("home")
    write_checkpoint(room / "dense", "Bert", "ForMaskedLM")
    write_tokenizer(room / "dense", "Bert")
    (room / "dense/README.md").write_text(CARD)
    (room / "texts.txt").write_text("every long river of the page reads a stone word " * 60)
    with serving(token=TOKEN) as hub:
        hub.refusals = {"/api/models/ada/later/commit/": [500]}
        ran = hub.run(PROGRAM, home, str(room), WRONG)
        said, loaded = map(json.loads, ran.stdout.splitlines()[-2:])
        yield Pushed(said, loaded, room, hub, home, ran.stdout + ran.stderr)


@pytest.mark.several_processes
def test_what_is_pushed_is_the_destination(pushed: Pushed) -> None:
    made = pushed.hub.models["ada/one"]
    assert made.files == tree(pushed.room / "one")
    assert pushed.said["one"]["pushed_to"] == f"{pushed.hub.address}/ada/one/commit/{made.commit}"
    assert not made.is_private
    assert pushed.hub.models["ada/with-code"].is_private
    assert set(pushed.hub.objects) >= {
        pushed.said["one"]["checksums"][file] for file in ("model.safetensors", "sparse_attention.png")
    }


@pytest.mark.several_processes
def test_with_texts_its_card_says_how_near_it_stays(pushed: Pushed) -> None:
    assert pushed.said["judged"] == 0, pushed.output
    card = pushed.hub.models["ada/judged"].files["README.md"].decode()
    assert "| pattern | density | kept |" in card
    assert "| band(radius=4) | " in card
    assert "](sparse_attention.png)" in card
    assert card == (pushed.room / "judged/README.md").read_text()


@pytest.mark.several_processes
def test_it_loads_by_its_id(pushed: Pushed) -> None:
    assert pushed.said["by its id"] is True
    assert pushed.said["own by its id"] is True
    assert pushed.said["tokenizer"] == 300


@pytest.mark.several_processes
def test_nothing_but_this_hub_was_asked(pushed: Pushed) -> None:
    assert pushed.said["elsewhere"] == []
    assert pushed.loaded["elsewhere"] == []


@pytest.mark.several_processes
def test_the_card_says_what_it_is(pushed: Pushed) -> None:
    files = pushed.hub.models["ada/one"].files
    _, front, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "hf_sparse",
        "tags": ["tiny", "sparse-attention", "longformer", "sentence-transformers"],
    }
    assert "# Tiny" in text
    assert "It reads up to 300 tokens, where the dense one reads 128." in text
    assert f"Of all pairs of tokens at that length it reads {pushed.said['one']['density']:.2%}." in text
    assert "](sparse_attention.png)" in text
    assert files["sparse_attention.png"].startswith(b"\x89PNG")
    assert "import hf_sparse" in text
    assert 'AutoModel.from_pretrained("ada/one")' in text
    assert "trust_remote_code" not in text
    assert "trust_remote_code=True" in pushed.hub.models["ada/with-code"].files["README.md"].decode()


@pytest.mark.several_processes
def test_a_model_is_pushed_with_its_card_and_without_earlier_weights(pushed: Pushed) -> None:
    files = pushed.hub.models["ada/own"].files
    assert pushed.said["in shards"] != pushed.said["whole"]
    # shards of the first push would be loaded in the place of the second
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "sparse_attention.png"]
    text = files["README.md"].decode()
    assert text.count("## Sparse attention") == 1
    assert "license: apache-2.0" in text
    assert "- mine" in text
    assert 'AutoModel.from_pretrained("ada/own")' in text
    held = load(files["model.safetensors"])
    want = load((pushed.room / "one/model.safetensors").read_bytes())
    assert held.keys() <= want.keys()
    assert all(torch.equal(tensor, want[name]) for name, tensor in held.items())


@pytest.mark.several_processes
def test_a_model_that_is_pushed_while_it_is_saved_has_the_same_card(pushed: Pushed) -> None:
    assert pushed.said["while saved"] is None
    files = pushed.hub.models["ada/kept"].files
    assert 'AutoModel.from_pretrained("ada/kept")' in files.pop("README.md").decode()
    assert files.pop("sparse_attention.png")
    assert files == tree(pushed.room / "kept")


@pytest.mark.several_processes
def test_a_push_that_fails_leaves_the_destination_and_can_be_repeated(pushed: Pushed) -> None:
    said = pushed.said["server is down"]
    assert said.startswith("PushError: ada/later could not be pushed to http://127.0.0.1")
    assert "it answers with status 500; try again later" in said
    assert "/later is whole, and the same call pushes it without converting again" in said
    assert pushed.hub.models["ada/later"].files == tree(pushed.room / "later")
    again = pushed.said["pushed again"]
    assert again["files_resumed"] == ["model.safetensors"]
    assert again["pushed_to"].endswith(pushed.hub.models["ada/later"].commit)
    assert not (pushed.room / "later.partial").exists()


@pytest.mark.several_processes
def test_a_token_that_is_not_taken_is_found_first(pushed: Pushed) -> None:
    says = "it takes no token from here, or not this one (status 401); log in with `hf auth login`, or set HF_TOKEN"
    assert pushed.said["no account"] == f"PushError: nothing can be pushed to {pushed.hub.address}: {says}"
    assert pushed.said["no account of a model"].endswith(says)
    assert "gives no model of that id (status 404)" in pushed.said["no such source"]
    assert not (pushed.room / "never").exists()
    assert not (pushed.room / "never.partial").exists()


@pytest.mark.several_processes
def test_the_command_says_in_a_line_what_to_do_and_goes_on_under_another_name(pushed: Pushed) -> None:
    assert pushed.said["of others"] == 1
    (line,) = [line for line in pushed.output.splitlines() if line.startswith("hf-sparse: ")]
    assert "bob/others could not be pushed to" in line
    assert "the token may not do this (status 403); take one that may write, and a place of your own" in line
    assert pushed.said["her own"] in (0, None)
    made = pushed.hub.models["ada/others"]
    assert made.is_private
    assert made.files == tree(pushed.room / "others")
    assert 'from_pretrained("ada/others")' in made.files["README.md"].decode()


@pytest.mark.several_processes
def test_tokens_are_nowhere_to_be_read(pushed: Pushed) -> None:
    assert "signature=secret" not in json.dumps(pushed.said)
    # the server repeats what it was given: only a client that leaves its words out passes
    held = [pushed.output.encode(), json.dumps(pushed.said).encode(), *pushed.hub.asked]
    held += [*tree(pushed.room).values(), *tree(pushed.home).values(), *pushed.hub.objects.values()]
    held += [text for model in pushed.hub.models.values() for text in model.files.values()]
    for text in held:
        raw = text if isinstance(text, bytes) else text.encode()
        assert TOKEN.encode() not in raw
        assert WRONG.encode() not in raw


@pytest.mark.several_processes
def test_code_that_comes_along_loads_it_where_nobody_imported_hf_sparse(pushed: Pushed) -> None:
    said = pushed.loaded
    assert "model type `sparse_bert`" in said["without code"]
    assert (said["imported before"], said["imported after"]) == (False, True)
    assert said["class"] == "SparseBertForMaskedLM"
    assert said["equal"] is True
    code = (pushed.room / "with-code/register_hf_sparse.py").read_text()
    assert (pushed.room / "saved/register_hf_sparse.py").read_text() == code
