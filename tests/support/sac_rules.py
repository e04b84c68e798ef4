"""Which edges SAC's predictor picks: the definition in float64, source by source and pick by pick, by loops.

A row is one sequence without padding. Weights come by name, as a state dict holds them: ``enter``, ``lstm`` and ``pointer``
are layers, ``start`` is ``[2, H, p]`` (output and cell), ``distance_bias`` ``[H, 32]`` and ``distance_code`` ``[32, p]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def bucket(distance: int) -> int:
    """Return the bucket of a signed distance: 0 to 7 alone, then 8 buckets that end at 8 times half powers of two.

    Distances ahead have another 16 buckets of their own.
    """
    size = abs(distance)
    # 8 * 2 ** (steps / 2) <= size, squared
    steps = max((step for step in range(8) if 64 * 2**step <= size * size), default=0)
    return (16 if distance > 0 else 0) + (size if size < 8 else 8 + steps)


def nodes_of(hidden_states: Tensor, size: int, *, is_causal: bool, is_token: bool) -> tuple[Tensor, Tensor]:
    """Return what nodes ask and what they offer, both ``[n, hidden_size]``, of hidden states ``[N, hidden_size]``."""
    if is_token:
        return hidden_states, hidden_states
    starts = range(0, len(hidden_states), size)
    offered = torch.stack([mean(hidden_states[start : start + size]) for start in starts])
    asked = torch.stack([mean(hidden_states[: start + 1]) for start in starts]) if is_causal else offered
    return asked, offered


def mean(vectors: Tensor) -> Tensor:
    """Return the mean of vectors ``[X, D]``."""
    return sum(vectors[1:], vectors[0]) / len(vectors)


def logits(
    weights: Weights,
    asked: Tensor,
    offered: Tensor,
    head: int,
    source: int,
    picks: Sequence[int],
    *,
    is_causal: bool,
) -> Tensor:
    """Return the logits of a source's next pick.

    Args:
        weights: of the predictor.
        asked: float64 ``[n, hidden_size]``.
        offered: float64 ``[n, hidden_size]``.
        head: whose picks.
        source: the node that picks.
        picks: what it has picked before, in order.
        is_causal: nothing ahead of the source can be picked.

    Returns:
        float64 ``[n]``; -inf for what cannot be picked.

    Source: Li et al. 2020, arXiv:2003.09833, section 3, with all nodes connected.
    """

    def entered(node: int) -> Tensor:
        vector = asked[source] if node == source else offered[node]
        return weights["enter.weight"] @ vector + weights["enter.bias"]

    state = weights["start"][0, head], weights["start"][1, head]
    state = _lstm(weights, entered(source), state)
    for node in picks:
        state = _lstm(weights, entered(node) + weights["distance_code"][bucket(node - source)], state)
    pointer = weights["pointer.weight"] @ state[0] + weights["pointer.bias"]
    found = []
    for node in range(len(offered)):
        if node in picks or (is_causal and node > source):
            found.append(pointer.new_tensor(float("-inf")))
        else:
            bias = weights["distance_bias"][head, bucket(node - source)]
            found.append(pointer @ entered(node) / len(pointer) ** 0.5 + bias)
    return torch.stack(found)


def greedy(
    weights: Weights, asked: Tensor, offered: Tensor, head: int, source: int, steps: int, *, is_causal: bool
) -> list[int]:
    """Return the picks of the largest logits, fewer than ``steps`` where there are no more candidates."""
    picks: list[int] = []
    for _ in range(steps):
        scores = logits(weights, asked, offered, head, source, picks, is_causal=is_causal).tolist()
        if max(scores) == float("-inf"):
            break
        picks.append(scores.index(max(scores)))
    return picks


def log_probability(
    weights: Weights, asked: Tensor, offered: Tensor, head: int, source: int, picks: Sequence[int], *, is_causal: bool
) -> Tensor:
    """Return the logarithm of how likely a source makes these picks in this order."""
    total = asked.new_zeros(())
    for step, node in enumerate(picks):
        scores = logits(weights, asked, offered, head, source, picks[:step], is_causal=is_causal)
        total = total + scores[node] - scores[scores > float("-inf")].exp().sum().log()
    return total


def edges(picks: Sequence[Sequence[int]], n: int, size: int, radius: int, *, is_causal: bool) -> Tensor:
    """Say who reads whom when tokens read the nodes that their own picked, and tokens at most ``radius`` away.

    Args:
        picks: of each source.
        n: tokens.
        size: tokens of a node.
        radius: reach of the band.
        is_causal: keys stand no later than the query.

    Returns:
        bool ``[n, n]``.
    """
    table = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            is_edge = k // size in picks[q // size] or abs(q - k) <= radius
            table[q, k] = is_edge and (k <= q or not is_causal)
    return table


def _lstm(weights: Weights, vector: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return output and cell after a vector."""
    output, cell = state
    gates = weights["lstm.weight_ih"] @ vector + weights["lstm.bias_ih"]
    gates = gates + weights["lstm.weight_hh"] @ output + weights["lstm.bias_hh"]
    enters, keeps, new, leaves = gates.view(4, -1)
    cell = keeps.sigmoid() * cell + enters.sigmoid() * new.tanh()
    return leaves.sigmoid() * cell.tanh(), cell
