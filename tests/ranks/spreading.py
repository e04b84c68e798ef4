"""Read sequences of which two ranks have a half each, and compare with one that has them whole.

``torchrun -m tests.ranks.spreading FILE``: FILE gets, as JSON, for each case how far outputs and gradients are off, and what
calls were refused with.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import pattern
from hf_sparse.integration.layers import self_attention_modules
from hf_sparse.recipes.sequence_parallel import spread_sequences, stretch_of

RANKS, ROWS, TOKENS = 2, 2, 24
BAND = pattern("band", radius=3)
# heads of queries, heads of keys and values, pattern
CASES: dict[str, tuple[int, int, hf_sparse.Pattern]] = {
    "band": (4, 2, BAND),
    "all heads share one key": (4, 1, BAND),
    "keys of their own": (4, 4, BAND),
    "global tokens of the pattern": (4, 2, BAND | pattern("global", positions=(0, 13))),
    "another dilation by head": (
        4,
        2,
        pattern("longformer", window=8, dilation=(1, 1, 2, 3), global_projections=False),
    ),
    "another pattern by head": (4, 2, hf_sparse.by_head({range(3): BAND, 3: pattern("strided", stride=5)})),
    "random blocks by head": (4, 2, pattern("random", block_size=4, num_random_blocks=2, seed=1)),
    "bigbird": (4, 2, pattern("bigbird", block_size=2, num_random_blocks=1)),
    "fixed and separate": (4, 2, pattern("sparse_transformer", stride=4, heads="separate", kind="strided")),
    "pooled spans": (4, 2, pattern("bp_transformer", nodes_per_level=2, spans="pooled")),
    "routing": (4, 2, pattern("routing", num_clusters=3, decay=0.5) | BAND),
    "reformer": (4, 2, pattern("reformer", num_hashes=2, chunk_length=4) | BAND),
    "clusters by head": (
        4,
        2,
        hf_sparse.by_head({range(1): BAND, range(1, 4): pattern("routing", num_clusters=3) | BAND}),
    ),
}


def tiny_llama(heads: int, groups: int, own: hf_sparse.Pattern) -> PreTrainedModel:
    """Return a sparse Llama of two layers in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return hf_sparse.sparsify_(LlamaForCausalLM(config).double(), own)


def whole_batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def learn(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits and the sum of losses over the tokens of the whole batch, after two passes of which the last counts."""
    for _ in range(2):
        model.zero_grad()
        said = model(**batch, use_cache=False, num_items_in_batch=ROWS * (TOKENS - 1))
        said.loss.backward()
    return said.logits.detach(), said.loss.detach()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def compare(heads: int, groups: int, own: hf_sparse.Pattern, rank: int) -> dict[str, float]:
    """Return by how much the halves are off, of the largest number there is."""
    batch = whole_batch()
    one, model = (tiny_llama(heads, groups, own).train() for _ in range(2))
    # alone: what follows the tokens must not hear of other ranks
    torch.distributed.is_initialized, held = (lambda: False), torch.distributed.is_initialized  # type: ignore[assignment]
    logits, loss = learn(one, batch)
    torch.distributed.is_initialized = held
    with spread_sequences(model, ranks=RANKS, batch_size=ROWS):
        half, own_loss = learn(model, stretch_of(batch, rank=rank, ranks=RANKS))
    torch.distributed.all_reduce(own_loss)
    size = TOKENS // RANKS
    found = {"output": off(half, logits[:, rank * size : (rank + 1) * size]), "loss": off(own_loss, loss)}
    wanted, given = gradients(one), gradients(model)
    assert wanted.keys() == given.keys()
    for gradient in given.values():
        torch.distributed.all_reduce(gradient)
    found["gradients"] = max(off(given[name], wanted[name]) for name in wanted)
    buffers = [
        off(a, b)
        for (*_, mine), (*_, alone) in zip(self_attention_modules(model), self_attention_modules(one), strict=True)
        if hasattr(mine, "sparse_state")
        for a, b in zip(mine.sparse_state.buffers(), alone.sparse_state.buffers(), strict=True)
    ]
    found["buffers"] = max(buffers, default=0.0)
    # the model is as it was: alone, it says what the other one says
    model.load_state_dict(one.state_dict())
    with torch.no_grad():
        found["afterwards"] = off(model.eval()(**batch).logits, one.eval()(**batch).logits)
    return found


def refusals(rank: int) -> dict[str, str]:
    """Return what calls were refused with that cannot be spread."""
    half = stretch_of(whole_batch(), rank=rank, ranks=RANKS)
    mask = torch.ones_like(half["input_ids"])
    padded = mask.clone()
    padded[:, -1] = 0
    calls: dict[str, dict[str, Any]] = {
        "padding": {"attention_mask": padded},
        "global marks": {"global_attention_mask": mask},
        "documents": {"document_ids": mask},
        "packing": {"position_ids": half["position_ids"] % 5},
        "another stretch": {"position_ids": half["position_ids"] + 1},
    }
    model, found = tiny_llama(4, 2, BAND | pattern("global")), {}
    with spread_sequences(model, ranks=RANKS, batch_size=ROWS):
        model(**half, attention_mask=mask)
        for name, given in calls.items():
            try:
                model(**{**half, **given})
            except ValueError as error:
                found[name] = str(error)
    return found


def main() -> None:
    """Compare every case."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    off_by = {name: compare(*case, rank) for name, case in CASES.items()}
    # the worst of all ranks
    for found in off_by.values():
        for key, value in found.items():
            worst = torch.tensor(value, dtype=torch.float64)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
            found[key] = float(worst)
    said = {"off": off_by, "refused": refusals(rank)}
    if rank == RANKS - 1:
        Path(sys.argv[1]).write_text(json.dumps(said))
    torch.distributed.barrier()
    sys.stdout.flush()
    # taking down the group now and then never ends: gloo's thread and this one wait for each other
    os._exit(0)


if __name__ == "__main__":
    main()
