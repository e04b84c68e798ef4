"""Attention in float64 with a softmax spelled out row by row: the oracle of outputs and, through autograd, gradients."""

import torch
from torch import Tensor


def attend_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    multiplier: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend, one query at a time.

    Args:
        query: float ``[B, H, T, D]``; computed in float64.
        key: float ``[B, G, S, D]``.
        value: float ``[B, G, S, Dv]``.
        mask: bool ``[B, H, T, S]``; True where the query reads the key.
        scale: factor of the scores; ``D ** -0.5`` if None.
        multiplier: float ``[B, H, T, S]``, what a drawn dropout multiplies probabilities with.
        bias: float ``[B, H, T, S]``, added to the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the bias.
        sinks: float ``[H]``, one more score of each head, whose value is 0.

    Returns:
        Output ``[B, H, T, Dv]`` and logsumexp ``[B, H, T]``; a query that reads nothing gets 0 and -inf.
    """
    q, k, v = query.double(), key.double(), value.double()
    batch, heads, tokens, width = q.shape
    group = heads // k.shape[1]
    q = q * (width**-0.5 if scale is None else scale)
    nothing, never = v.new_zeros(v.shape[3]), v.new_full((), float("-inf"))
    allowed = mask.tolist()
    outputs, sums = [], []
    for b in range(batch):
        for h in range(heads):
            queries, keys, values = q[b, h].unbind(), k[b, h // group], v[b, h // group]
            for t in range(tokens):
                read = torch.tensor([s for s, is_read in enumerate(allowed[b][h][t]) if is_read], dtype=torch.int64)
                if not len(read) and sinks is None:
                    outputs.append(nothing)
                    sums.append(never)
                    continue
                scores = keys[read] @ queries[t]
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                if bias is not None:
                    scores = scores + bias[b, h, t, read]
                column = scores if sinks is None else torch.cat([scores, sinks[h].double()[None]])
                lse = column.logsumexp(0)
                weights = (scores - lse).exp()
                if multiplier is not None:
                    weights = weights * multiplier[b, h, t, read]
                outputs.append(weights @ values[read])
                sums.append(lse)
    out = torch.stack(outputs).view(batch, heads, tokens, -1)
    return out, torch.stack(sums).view(batch, heads, tokens)


def random_tensors(
    *, batch: int = 1, heads: int = 4, key_heads: int | None = None, tokens: int, width: int = 4, value_width: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value in float64, the same ones for the same sizes."""
    key_heads = key_heads or heads
    generator = torch.Generator().manual_seed(1000 * tokens + 10 * width + heads)
    shapes = (
        (batch, heads, tokens, width),
        (batch, key_heads, tokens, width),
        (batch, key_heads, tokens, value_width or width),
    )
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    # scores with a spread of about 2: far from a uniform softmax, far from a one-hot one
    return 2 * query, key, value
