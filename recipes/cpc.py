"""Contrastive predictive coding: the loss that ETC's pre-training adds to masked language modelling."""

import math
from typing import Any

import torch
from torch import Tensor

from hf_sparse.integration.nodes import keep_nodes
from hf_sparse.segments import find_segments


def cpc_loss(
    model: Any,
    input_ids: Tensor,
    segment_ids: Tensor,
    *,
    mask_token_id: int,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    fraction: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return how badly the nodes of masked segments tell which segment they stand for.

    Some segments are masked, all their tokens. Behind the last layer the node of each is compared with the node that each of
    the segments gets when read alone: the loss is the cross-entropy of finding its own among all that were masked in the
    batch, by scaled inner products. Add it to the loss of masked language modelling; the paper weighs them 0.2 to 0.8.

    Args:
        model: a sparse model whose pattern is ETC with ``segments="given"``, on its own or in a combination.
        input_ids: int64 ``[B, T]``.
        segment_ids: int64 ``[B, T]``, as the model takes them; ``hf_sparse.sentence_ids`` makes them.
        mask_token_id: what takes the place of masked tokens.
        attention_mask: ``[B, T]``, nonzero = a real token; None where all are.
        document_ids: int ``[B, T]`` of packed rows; None where each row is one document.
        fraction: of the batch's segments that are masked, above 0 and at most 1; at least 2 are.
        generator: of the choice; None is the global one.

    Returns:
        float, a scalar.

    Raises:
        ValueError: if the model's nodes stand for no given segments, shapes do not fit, the fraction or the id is out of range,
            or the batch has fewer than two segments.

    Source: Ainslie et al. 2020, arXiv:2004.08483, section 2.5, after van den Oord et al. 2018, arXiv:1807.03748. How states are
    compared is not published; scaled inner products are ours.
    """
    nodes = getattr(model.base_model, "sparse_nodes", None)
    if nodes is None or not nodes.pattern.takes_segments:
        raise ValueError(
            "the loss needs a model whose nodes stand for segments: hf_sparse.pattern('etc', segments='given')"
        )
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    for name, held in (
        ("segment_ids", segment_ids),
        ("attention_mask", attention_mask),
        ("document_ids", document_ids),
    ):
        if held is not None and (not isinstance(held, Tensor) or held.shape != input_ids.shape):
            raise ValueError(
                f"{name} must have the shape of input_ids, {list(input_ids.shape)}, got {list(getattr(held, 'shape', []))}"
            )
    words = model.config.vocab_size
    if not isinstance(mask_token_id, int) or not 0 <= mask_token_id < words:
        raise ValueError(
            f"mask_token_id must be from 0 to {words - 1}, got {mask_token_id!r}; see tokenizer.mask_token_id"
        )
    rows = find_segments(
        *input_ids.shape,
        key_padding_mask=None if attention_mask is None else attention_mask != 0,
        document_ids=document_ids,
        segment_ids=segment_ids,
        most_nodes=nodes.pattern.num_nodes(input_ids.shape[1]),
    )
    places = [
        (s.row, s.first_node + node, s.start + a, s.start + b)
        for s in rows
        for node, (a, b) in enumerate(s.spans or ())
    ]
    if len(places) < 2:
        raise ValueError(f"the loss compares segments with one another, and the batch has {len(places)}")
    count = max(2, round(fraction * len(places)))
    chosen = [places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()]
    masked = input_ids.clone()
    for row, _, start, stop in chosen:
        masked[row, start:stop] = mask_token_id
    alone = torch.nn.utils.rnn.pad_sequence(
        [input_ids[row, start:stop] for row, _, start, stop in chosen], batch_first=True, padding_value=mask_token_id
    )
    lengths = torch.tensor([stop - start for *_, start, stop in chosen], device=input_ids.device)
    is_real = torch.arange(alone.shape[1], device=input_ids.device) < lengths[:, None]
    with keep_nodes(model) as kept:
        documents = {} if document_ids is None else {"document_ids": document_ids}
        model.base_model(input_ids=masked, attention_mask=attention_mask, segment_ids=segment_ids, **documents)
        model.base_model(input_ids=alone, attention_mask=is_real.long(), segment_ids=torch.zeros_like(alone))
    row, node = torch.tensor([[row, node] for row, node, *_ in chosen], device=input_ids.device).unbind(1)
    said, meant = kept[0][row, node].float(), kept[1][:, 0].float()
    target = torch.arange(count, device=said.device)
    return torch.nn.functional.cross_entropy(said @ meant.t() / math.sqrt(said.shape[1]), target)
