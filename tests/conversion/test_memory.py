"""What a conversion holds in memory: writing streams, and the comparison says what it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from tests.support.checkpoints import write_checkpoint

PROGRAM = """
import json, sys
import torch
import hf_sparse

def held(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

def grown(act):
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = held("VmRSS")
    made = act()
    return held("VmHWM") - before, made

torch.set_num_threads(1)
room, limit = sys.argv[1], int(sys.argv[2])
band = hf_sparse.pattern("band", radius=64)
# all that is imported on the way
hf_sparse.convert(f"{room}/tiny", f"{room}/warm", band)
settings = {"max_length": 64, "overwrite": True}
writing, _ = grown(lambda: hf_sparse.convert(f"{room}/large", f"{room}/made", band, verify=False, **settings))
comparing, report = grown(lambda: hf_sparse.convert(f"{room}/large", f"{room}/made", band, **settings))
control, _ = grown(lambda: len(bytearray(b"x") * 2 * limit))
said = {"writing": writing, "comparing": comparing, "reported": report.wide_open_bytes, "control": control}
print(json.dumps(said))
"""


@pytest.mark.several_processes
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says, and forgets, the most memory that a process held")
def test_writing_holds_less_than_two_shards_and_the_comparison_says_what_it_holds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", "Bert", "ForMaskedLM")
    # 64 MB of embeddings, and two layers of 50 MB
    config = BertConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path / "large", max_shard_size="64MB")
    shards = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) >= 3
    limit = 2 * max(shards)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(limit)], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["control"] > limit
    assert said["writing"] < limit
    # measured from outside, over writing and comparing; what writing holds may be used again
    assert said["comparing"] > limit
    assert abs(said["comparing"] - said["reported"]) <= said["writing"]
