"""Contrastive predictive coding: the loss equals its definition, and training on it teaches the nodes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.recipes.cpc import cpc_loss
from tests.support.models import tiny_model

MASK = 4
ETC = hf_sparse.pattern("etc", radius=2, num_global=8, segments="given", max_relative_distance=0)


def batch_of(rows: int = 4, sentences: int = 6, words: int = 4) -> tuple[Tensor, Tensor]:
    """Return texts whose sentences all speak of the text's own topic."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.arange(rows)[:, None] * 12 + 10
    ids = topic + torch.randint(0, 12, (rows, sentences * words), generator=generator)
    return ids.clamp(max=63), (torch.arange(sentences * words) // words).expand(rows, -1)


def test_the_loss_is_the_cross_entropy_of_finding_the_own_segment() -> None:
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), ETC).eval()
    ids, segments = batch_of()
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0  # the fifth segment of the second row is cut, its sixth is gone
    loss = cpc_loss(
        model, ids, segments, mask_token_id=MASK, attention_mask=mask, fraction=0.3,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    real = [(r, s) for r in range(4) for s in range(6) if (r, s) != (1, 5)]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(3))[: round(0.3 * len(real))]
    chosen = [real[i] for i in order.tolist()]
    masked = ids.clone()
    for row, segment in chosen:
        masked[row, 4 * segment : min(4 * segment + 4, 18 if row == 1 else 99)] = MASK
    said, meant = [], []
    with torch.no_grad(), hf_sparse.keep_nodes(model) as kept:
        model(input_ids=masked, attention_mask=mask, segment_ids=segments)
        for row, segment in chosen:
            own = ids[row : row + 1, 4 * segment : 4 * segment + 4][:, : int(mask[row, 4 * segment :][:4].sum())]
            model(input_ids=own, segment_ids=torch.zeros_like(own))
            said.append(kept[0][row, segment])
            meant.append(kept[-1][0, 0])
    scores = torch.stack(said) @ torch.stack(meant).t() / 32**0.5
    wanted = torch.stack([scores[i].logsumexp(0) - scores[i, i] for i in range(len(chosen))]).mean()
    assert len(chosen) == 7
    assert torch.allclose(loss.detach(), wanted, atol=1e-5)


def test_packed_documents_have_segments_of_their_own() -> None:
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), ETC).eval()
    ids, _ = batch_of(rows=2, sentences=2)
    # one segment a document, all under the same number
    segments, documents = torch.zeros_like(ids), (torch.arange(8) // 4).expand(2, -1)
    held = {"mask_token_id": MASK, "fraction": 1.0}
    packed = cpc_loss(model, ids, segments, document_ids=documents, generator=torch.Generator().manual_seed(0), **held)
    apart = [ids[row : row + 1, at : at + 4] for row in range(2) for at in (0, 4)]
    with torch.no_grad(), hf_sparse.keep_nodes(model) as kept:
        for own in apart:
            model(input_ids=torch.full_like(own, MASK), segment_ids=torch.zeros_like(own))
    # masked documents of one length say the same wherever they stand, but for their positions
    assert torch.allclose(kept[0][0, 0], kept[2][0, 0])
    assert packed.isfinite()
    assert packed.item() != cpc_loss(model, ids, segments, generator=torch.Generator().manual_seed(0), **held).item()


def test_training_on_it_tells_masked_segments_apart() -> None:
    torch.manual_seed(0)
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), ETC).train()
    ids, segments = batch_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = cpc_loss(model, ids, segments, mask_token_id=MASK, fraction=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.8 * sum(losses[:10]) / 10
    assert model.sparse_nodes.weight.grad.any()


def test_what_it_cannot_work_with_is_said() -> None:
    ids, segments = batch_of()
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), ETC)
    with pytest.raises(ValueError, match="needs a model whose nodes stand for segments"):
        cpc_loss(tiny_model("Bert"), ids, segments, mask_token_id=MASK)
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1, got 0"):
        cpc_loss(model, ids, segments, mask_token_id=MASK, fraction=0)
    for bad in (None, -1, 64):
        with pytest.raises(ValueError, match="mask_token_id must be from 0 to 63"):
            cpc_loss(model, ids, segments, mask_token_id=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"segment_ids must have the shape of input_ids, \[4, 24\], got \[3, 24\]"):
        cpc_loss(model, ids, segments[:3], mask_token_id=MASK)
    with pytest.raises(ValueError, match="attention_mask must have the shape of input_ids"):
        cpc_loss(model, ids, segments, mask_token_id=MASK, attention_mask=segments[:, 1:])
    with pytest.raises(ValueError, match="compares segments with one another, and the batch has 1"):
        cpc_loss(model, ids[:1], torch.zeros_like(ids[:1]), mask_token_id=MASK)
