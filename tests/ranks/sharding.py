"""Train sparse checkpoints with their weights spread over two ranks by FSDP2, as ``torchrun`` starts it.

``torchrun -m tests.ranks.sharding FOLDER NAME...``: FOLDER/NAME/sparse is a checkpoint. FOLDER/NAME/trained gets what was
trained, saved whole, and FOLDER/NAME/said.pt what it said.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForMaskedLM, PreTrainedModel

import hf_sparse  # noqa: F401  registers the sparse classes
from hf_sparse.integration.layers import self_attention_modules
from tests.support.models import tiny_batch

STEPS = 6


def train(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[float]:
    """Learn by plain gradient descent to tell each token itself; the mean loss of all ranks, step by step."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    labels = batch["input_ids"].clone()
    # as many on each rank, whatever the padding
    labels[:, 30:] = -100
    for _ in range(STEPS):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def mean_of_ranks(values: list[float]) -> list[float]:
    summed = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(summed)
    return (summed / torch.distributed.get_world_size()).tolist()


def same_on_all(tensor: Tensor) -> bool:
    held = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(held, tensor)
    return all(torch.equal(one, tensor) for one in held)


def shard(folder: Path, rank: int, mesh: Any) -> None:
    """Train one checkpoint, each rank on two rows of four, and save it."""
    batch = tiny_batch(40, rows=4)
    own = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
    model = AutoModelForMaskedLM.from_pretrained(folder / "sparse")
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    said: dict[str, Any] = {"spread": all(isinstance(weight, DTensor) for weight in model.parameters())}
    model.train()
    said["losses"] = mean_of_ranks(train(model, own))
    states = [module.sparse_state for *_, module in self_attention_modules(model)]
    said["same"] = [same_on_all(buffer) for state in states for buffer in state.buffers()]
    model.eval()
    with torch.no_grad():
        said["logits"] = model(**batch).logits
    held = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank:
        return
    model.save_pretrained(folder / "trained", state_dict=held)
    torch.save(said, folder / "said.pt")


def main() -> None:
    """Shard each checkpoint that is named."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name in sys.argv[2:]:
        shard(Path(sys.argv[1]) / name, rank, mesh)
    torch.distributed.barrier()
    sys.stdout.flush()
    # taking down the group now and then never ends: gloo's thread and this one wait for each other
    os._exit(0)


if __name__ == "__main__":
    main()
