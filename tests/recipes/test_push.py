"""A finished run goes to the Hub, over HTTP to the loopback, and comes back by its id."""

import json
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

import yaml

from tests.support.checkpoints import tree, write_checkpoint, write_tokenizer
from tests.support.hub_server import WATCH_ADDRESSES, serving

TOKEN = "hf_aSecretOfAda0123456789abcdefghij"
PROGRAM = f"""{WATCH_ADDRESSES}
import json, sys
import torch
import hf_sparse
from hf_sparse.errors import PushError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from tests.support.models import tiny_batch

room, said = sys.argv[1], {{}}
pattern = hf_sparse.pattern("longformer", window=8)
hf_sparse.convert(f"{{room}}/dense", f"{{room}}/sparse", pattern, max_length=256, verify=False)

def train(**options):
    settings = dict(max_steps=2, save_steps=1, batch_size=4, seeds=[3, 4], use_cpu=True, push_to_hub="ada/reader")
    arguments = RecipeArguments(f"{{room}}/sparse", f"{{room}}/data", f"{{room}}/run", **settings, **options)
    try:
        return [run["seconds"] for run in finetune("classify", arguments)["runs"]]
    except PushError as error:
        return str(error)

def logits(place):
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(place)(**tiny_batch()).logits

said["failed"] = train()
said["seconds"] = [json.load(open(f"{{room}}/run/seed-{{seed}}/run.json"))["seconds"] for seed in (3, 4)]
said["again"] = train(resume=True)
said["equal"] = torch.equal(logits("ada/reader"), logits(f"{{room}}/run/seed-3"))
said["tokenizer"] = AutoTokenizer.from_pretrained("ada/reader").model_max_length
said["elsewhere"] = elsewhere
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.several_processes
def test_a_finished_run_is_pushed_and_loads_by_its_id(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "ForMaskedLM")
    write_tokenizer(tmp_path / "dense", "Bert")
    (tmp_path / "dense/README.md").write_text("---\nlicense: mit\nbase_model: ada/dense\n---\n# Dense\n")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"the {word} reads", "label": word}) for word in ("river", "stone") * 4]
    for split in ("train", "validation", "test"):
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(lines))
    with serving(token=TOKEN) as hub:
        hub.refusals = {"/api/models/ada/reader/commit/": [500]}
        ran = hub.run(PROGRAM, tmp_path / "home", str(tmp_path))
        files = hub.models["ada/reader"].files
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["failed"].startswith("ada/reader could not be pushed to http://127.0.0.1")
    assert "status 500; try again later; the model is in" in said["failed"]
    assert said["failed"].endswith("run/seed-3, and the same command with --resume pushes it")
    # nothing was trained again
    assert said["again"] == said["seconds"]
    assert said["equal"] is True
    assert said["tokenizer"] == 256
    assert said["elsewhere"] == []
    wanted = {"README.md", "config.json", "model.safetensors", "sparse_attention.png"}
    assert set(files) == {*wanted, "tokenizer.json", "tokenizer_config.json"}
    _, front, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "mit",
        "base_model": "ada/dense",
        "library_name": "hf_sparse",
        "tags": ["sparse-attention", "longformer"],
    }
    assert "This `SparseBertForSequenceClassification` is a `bert` model with sparse attention" in text
    assert "It was fine-tuned by `hf-sparse recipe classify` in 2 steps (seed 3). On the test split: " in text
    assert 'AutoModel.from_pretrained("ada/reader")' in text
    for held in [ran.stdout.encode(), ran.stderr.encode(), *files.values(), *tree(tmp_path).values()]:
        assert TOKEN.encode() not in held
    # nothing that is published names a folder of this machine
    assert not [name for name, held in files.items() if str(tmp_path).encode() in held]
