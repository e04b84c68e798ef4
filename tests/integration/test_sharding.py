"""FSDP2: the weights of a sparse model spread over two processes on the CPU.

Plain ``fully_shard``, not accelerate's plugin: that one makes nothing of a CPU but DistributedDataParallel.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

import hf_sparse
from tests.ranks.sharding import STEPS, train
from tests.support.checkpoints import write_checkpoint
from tests.support.models import tiny_batch
from tests.support.ranks import run_on_two

pytestmark = pytest.mark.usefixtures("one_thread")
PATTERNS = {
    # weights of its own on each layer, and buffers that follow the tokens
    "longformer": hf_sparse.pattern("longformer", window=8, global_tokens=(0,)),
    "routing": hf_sparse.pattern("routing", num_clusters=4, decay=0.5) | hf_sparse.pattern("band", radius=4),
}


@pytest.mark.several_processes
def test_a_sharded_model_learns_as_a_whole_one_and_is_saved_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "ForMaskedLM")
    for name, pattern in PATTERNS.items():
        (tmp_path / name).mkdir()
        hf_sparse.convert(tmp_path / "dense", tmp_path / name / "sparse", pattern, max_length=128)
    run_on_two("tests.ranks.sharding", str(tmp_path), *PATTERNS)
    batch = tiny_batch(40, rows=4)
    for name in PATTERNS:
        said = torch.load(tmp_path / name / "said.pt")
        assert said["spread"]
        assert all(said["same"]), name
        whole = AutoModelForMaskedLM.from_pretrained(tmp_path / name / "sparse").train()
        losses = train(whole, batch)
        assert len(losses) == STEPS
        assert losses[-1] < 0.9 * losses[0]
        torch.testing.assert_close(said["losses"], losses, rtol=1e-5, atol=0)
        trained = AutoModelForMaskedLM.from_pretrained(tmp_path / name / "trained").eval()
        assert trained.config.architectures == ["SparseBertForMaskedLM"]
        weights = trained.state_dict()
        for key, wanted in whole.state_dict().items():
            # the biases of keys stay 0 but for rounding: they add the same to all scores of a query
            size = 1.0 if key.endswith("key.bias") else wanted.norm()
            assert (weights[key] - wanted).norm() <= 1e-5 * size, key
        with torch.no_grad():
            torch.testing.assert_close(trained(**batch).logits, said["logits"], rtol=1e-5, atol=1e-5)
