"""What patterns keep of a dense model's attention equals a float64 softmax under a mask drawn by loops."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import hf_sparse
from hf_sparse.integration.kept import noting_kept, unkept_reason
from hf_sparse.patterns import Pattern
from tests.support import rules
from tests.support.decoders import tiny_decoder, tiny_prompts
from tests.support.models import tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, tuple[Pattern, rules.Rule]] = {
    "band": (hf_sparse.pattern("band", radius=3), rules.band(3)),
    "dilated": (hf_sparse.pattern("dilated", radius=2, dilation=3), rules.dilated(2, 3)),
    "longformer": (
        hf_sparse.pattern("longformer", window=4, global_tokens=(0, 5), global_projections=False),
        rules.longformer(4, (0, 5)),
    ),
    "block_local": (hf_sparse.pattern("block_local", block_size=5), rules.block_local(5)),
    "strided": (hf_sparse.pattern("strided", stride=4), rules.strided(4)),
}


def say(model: PreTrainedModel, **batch: Any) -> Any:
    if model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        return model(**batch, use_cache=False) if model.can_generate() else model(**batch)


def attentions_of(model: PreTrainedModel, **batch: Any) -> dict[str, Tensor]:
    """Return the weights of each self-attention layer, float64 ``[B, H, T, T]``, as transformers' eager attention has them."""
    model.set_attn_implementation("eager")
    said = say(model, **batch, output_attentions=True)
    model.set_attn_implementation("sdpa")
    if model.config.is_encoder_decoder:
        held = {"encoder": said.encoder_attentions, "decoder": said.decoder_attentions}
        return {f"{stack}.{at}": layer for stack, layers in held.items() for at, layer in enumerate(layers)}
    return {str(at): layer for at, layer in enumerate(said.attentions)}


def kept_by_loops(weights: Tensor, padding: Tensor, rule: rules.Rule, *, is_causal: bool) -> Tensor:
    """Return the kept share of each head, float64 ``[H]``, mean over real queries; positions count from the first real one."""
    heads = weights.shape[1]
    total = torch.zeros(heads, dtype=torch.float64)
    for row, real in zip(weights, padding != 0, strict=True):
        held = row[:, real][:, :, real].double()
        total += (held * rules.draw(rule, held.shape[1], is_causal=is_causal)).sum((1, 2))
    return total / int(padding.sum())


def assert_shares(got: Tensor, want: Tensor, *, keys: int, dtype: torch.dtype) -> None:
    """Allow what sums of so many weights of a dtype may be off by rounding."""
    assert (got - want).abs().max() <= 8 * keys * torch.finfo(dtype).eps


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "GPT2", "Llama", "Bart"])
def test_kept_shares_equal_a_softmax_under_a_mask_drawn_by_loops(family: str, side: str) -> None:
    is_encoder = family in ("Bert", "Roberta")
    # Llama takes its softmax in float32 whatever it is in; its two heads of keys serve four
    dtype = torch.float32 if family == "Llama" else torch.float64
    model = (tiny_model(family) if is_encoder else tiny_decoder(family)).to(dtype)
    batch = tiny_batch(30, padding=7, side=side) if is_encoder else tiny_prompts(side=side)
    want = attentions_of(model, **batch)
    patterns = {layer: [pattern for pattern, _ in CASES.values()] for layer in want}
    with noting_kept(model, patterns) as kept:
        say(model, **batch)
    assert kept.shares.keys() == want.keys()
    for layer, weights in want.items():
        is_causal = not is_encoder and not layer.startswith("encoder")
        for share, (_, rule) in zip(kept.shares[layer], CASES.values(), strict=True):
            oracle = kept_by_loops(weights, batch["attention_mask"], rule, is_causal=is_causal)
            assert_shares(share, oracle, keys=weights.shape[3], dtype=dtype)
            assert 0 < share.min() < 0.99
    heads = 4
    assert set(kept.shapes.values()) == {(heads, 2 if family == "Llama" else heads, 8)}


def test_a_sliding_window_of_the_model_s_own_is_what_dense_means() -> None:
    model = tiny_decoder("Mistral", sliding_window=6)
    batch = tiny_prompts(side="right")
    with noting_kept(
        model, dict.fromkeys("01", (hf_sparse.pattern("band", radius=5), hf_sparse.pattern("band", radius=2)))
    ) as kept:
        say(model, **batch)
    for layer, weights in attentions_of(model, **batch).items():
        oracle = kept_by_loops(weights, batch["attention_mask"], rules.band(2), is_causal=True)
        assert_shares(kept.shares[layer][0], torch.ones(4), keys=21, dtype=torch.float32)
        assert_shares(kept.shares[layer][1], oracle, keys=21, dtype=torch.float32)


@pytest.mark.parametrize("key", ["routing", "reformer", "sinkhorn", "sac"])
def test_of_what_looks_at_content_the_chosen_pairs_count(key: str) -> None:
    fields = {
        "routing": {"num_clusters": 3},
        "reformer": {"num_hashes": 1, "num_buckets": 4, "chunk_length": 4},
        "sinkhorn": {"block_size": 5, "hard": True},
        "sac": {"block_size": 5, "edges_per_token": 10, "radius": 1},
    }
    pattern = hf_sparse.pattern(key, **fields[key])
    model = hf_sparse.sparsify_(tiny_model("Bert"), pattern).double()
    batch = tiny_batch(30, rows=1, padding=0)
    weights = attentions_of(model, **batch)
    with noting_kept(model, dict.fromkeys("01", (pattern,))) as kept:
        hidden = say(model, **batch, output_hidden_states=True).hidden_states
    for layer, own in enumerate(module for module in model.modules() if hasattr(module, "_sparse")):
        query, key_, _ = (
            projection(hidden[layer]).unflatten(-1, (4, -1)).transpose(1, 2)
            for projection in (own.query, own.key, own.value)
        )
        state = getattr(own, "sparse_state", None)
        held = {} if state is None else {"state": state, "hidden_states": hidden[layer]}
        identity = torch.eye(30, dtype=torch.float64).expand(1, 4, -1, -1)
        with torch.no_grad():
            chosen = hf_sparse.sparse_attention(query, key_, identity, pattern, layer=layer, **held) > 0
        oracle = (weights[str(layer)] * chosen).sum(-1).mean((0, 2))
        assert_shares(kept.shares[str(layer)][0], oracle, keys=30, dtype=torch.float64)
        assert chosen.double().mean() < 0.9


def test_columns_of_the_identity_may_come_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = hf_sparse.pattern("routing", num_clusters=3)
    model = hf_sparse.sparsify_(tiny_model("Bert"), pattern).double()
    batch = tiny_batch(30)
    with noting_kept(model, dict.fromkeys("01", (pattern,))) as whole:
        say(model, **batch)
    monkeypatch.setattr("hf_sparse.integration.kept._COLUMNS", 7)
    with noting_kept(model, dict.fromkeys("01", (pattern,))) as parts:
        say(model, **batch)
    for layer in "01":
        assert_shares(parts.shares[layer], whole.shares[layer], keys=30, dtype=torch.float64)


def test_the_model_says_what_it_says_dense_and_is_left_as_it_was() -> None:
    model, batch = tiny_model("Bert").double(), tiny_batch(30)
    before = say(model, **batch).last_hidden_state
    with noting_kept(model, dict.fromkeys("01", (hf_sparse.pattern("band", radius=0),))):
        during = say(model, **batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert (during - before)[real].abs().max() <= 1e-12
    assert torch.equal(say(model, **batch).last_hidden_state, before)
    assert model.config._attn_implementation == "sdpa"
    assert "hf_sparse:kept" not in AttentionInterface._global_mapping


def test_a_head_that_reads_less_is_seen() -> None:
    band = hf_sparse.pattern("band", radius=6)
    broken = hf_sparse.by_head({(0, 1, 3): band, 2: hf_sparse.pattern("band", radius=0)})
    model = tiny_model("Bert")
    with noting_kept(model, dict.fromkeys("01", (band, broken, None))) as kept:
        say(model, **tiny_batch(30))
    for shares in kept.shares.values():
        assert torch.equal(shares[0, [0, 1, 3]], shares[1, [0, 1, 3]])
        assert shares[1, 2] < 0.5 * shares[0, 2]
        assert torch.equal(shares[2], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (hf_sparse.pattern("star"), "'star' reads nodes"),
        (hf_sparse.pattern("bp_transformer", spans="pooled"), "'bp_transformer' reads nodes"),
        (hf_sparse.pattern("band") | hf_sparse.pattern("etc"), "'etc' reads nodes"),
        (hf_sparse.pattern("sinkhorn"), "'sinkhorn' mixes blocks"),
    ],
    ids=["star", "pooled", "union", "sinkhorn"],
)
def test_where_no_share_can_be_told_the_reason_is(pattern: Pattern, says: str) -> None:
    reason = unkept_reason(pattern)
    assert reason is not None
    assert says in reason
    model = tiny_model("Bert")
    with noting_kept(model, dict.fromkeys("01", (pattern,))) as kept:
        say(model, **tiny_batch(10))
    assert all(shares.isnan().all() for shares in kept.shares.values())


def test_what_has_a_share_has_no_reason() -> None:
    assert all(unkept_reason(pattern) is None for pattern, _ in CASES.values())
    assert unkept_reason(None) is None
