"""Who reads whom where the content decides, and what comes out: the definitions in float64, one row, one head, by loops.

Reformer, Routing Transformer, Sinkhorn attention and the sampled edges of SAC. A row is one sequence without padding; a
head has ``query`` and ``key`` float64 ``[N, D]`` and ``value`` float64 ``[N, Dv]``. Tables are ``[N, N]``, query by key.
Outputs, logsumexps and expectations can be differentiated; who reads whom cannot.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# the places of a cluster's queries and of its keys, both in the order of the row
Cluster = tuple[list[int], list[int]]


def reformer_shared(buckets: Tensor, chunk: int, *, is_causal: bool, counting: str, across_rounds: bool) -> Tensor:
    """Count how often tokens sorted by bucket read each other: their own chunk and the one before; never themselves.

    Args:
        buckets: int64 ``[rounds, N]``; equal numbers in different rounds mean nothing to each other.
        chunk: tokens of a chunk in sorted order; the last chunk of a round may be shorter.
        is_causal: keys stand no later in the row than the query.
        counting: "set" counts a pair once, "multiset" once for each round and chunk (own or before) that holds the key.
        across_rounds: the first chunk of a round reads the last one of the round before, round 0 that of the last round;
            N must then be a multiple of ``chunk``. A chunk that is the only one of all rounds has none before it.

    Returns:
        int64 ``[N, N]``.

    Source: Kitaev et al. 2020, arXiv:2001.04451, section 2; ``across_rounds`` with "multiset" is Transformers' count.
    """
    assert counting in ("set", "multiset"), counting
    n = buckets.shape[1]
    assert not across_rounds or n % chunk == 0, (n, chunk)
    rounds = [_cut(_places_by(numbers), chunk) for numbers in buckets.tolist()]
    counts = torch.zeros(n, n, dtype=torch.int64)
    for r, chunks in enumerate(rounds):
        for c, own in enumerate(chunks):
            before: list[int] = []
            if c > 0:
                before = chunks[c - 1]
            elif across_rounds and len(rounds) * len(chunks) > 1:
                before = rounds[r - 1][-1]
            for q in own:
                for k in before + own:
                    if k != q and (k < q or not is_causal):
                        counts[q, k] += 1
    return counts.clamp(max=1) if counting == "set" else counts


def attend_counts(
    query: Tensor, key: Tensor, value: Tensor, counts: Tensor, scale: float, *, self_is_last_resort: bool
) -> tuple[Tensor, Tensor]:
    """Attend with one softmax a query, in which a key counted c times weighs c times as much.

    Args:
        query: float64 ``[N, D]``.
        key: float64 ``[N, D]``, as it enters the scores: Reformer's unit keys are made by the caller.
        value: float64 ``[N, Dv]``.
        counts: int64 or bool ``[N, N]``; ``log(count)`` is added to the score, 0 is not read.
        scale: factor of the scores, not of ``log(count)``.
        self_is_last_resort: a query without any key reads itself once, with its own score.

    Returns:
        Output ``[N, Dv]`` and logsumexp ``[N]``; a query that reads nothing gets 0 and -inf.
    """
    outputs, sums = [], []
    for q, row in enumerate(counts.tolist()):
        read = {k: int(count) for k, count in enumerate(row) if count > 0}
        if not read and self_is_last_resort:
            read = {q: 1}
        biases = [query.new_tensor(float(count)).log() for count in read.values()]
        scores = [scale * (query[q] @ key[k]) + bias for k, bias in zip(read, biases, strict=True)]
        out, lse = _softmax(scores, [value[k] for k in read], value)
        outputs.append(out)
        sums.append(lse)
    return torch.stack(outputs), torch.stack(sums)


def lsh_buckets(vectors: Tensor, rotations: Tensor) -> Tensor:
    """Hash vectors by the largest entry of ``[xR; -xR]``; the first of equal ones wins.

    Args:
        vectors: float64 ``[N, D]``.
        rotations: float64 ``[rounds, D, B / 2]`` for B buckets.

    Returns:
        int64 ``[rounds, N]``, numbers from 0 to B - 1 in every round.

    Source: Andoni et al. 2015, arXiv:1509.02897; Kitaev et al. 2020, arXiv:2001.04451, section 2.
    """
    rows = []
    for rotation in rotations:
        row = []
        for vector in vectors:
            turned = (vector @ rotation).tolist()
            sides = turned + [-entry for entry in turned]
            row.append(sides.index(max(sides)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64)


def reformer_asymmetric(query: Tensor, key: Tensor, directions: Tensor, chunk: int, *, is_causal: bool) -> Tensor:
    """Say who reads whom when queries and keys are sorted apart by a projection and cut into clusters of equal size.

    Sorting is ascending, equal projections by place; the last cluster may be shorter. A pair of several rounds counts
    once, and a token may read itself.

    Args:
        query: float64 ``[N, D]``.
        key: float64 ``[N, D]``.
        directions: float64 ``[rounds, D + 2]``, what the lengthened queries and keys are projected on.
        chunk: queries, and keys, of a cluster.
        is_causal: keys stand no later in the row than the query.

    Returns:
        bool ``[N, N]``.

    Source: Daras et al. 2020, arXiv:2010.05315, section 3; their random shift leaves the order as it is.
    """
    n = len(query)
    query_squares = [(vector @ vector).item() for vector in query]
    key_squares = [(vector @ vector).item() for vector in key]
    sphere = max(query_squares) + max(key_squares)
    table = torch.zeros(n, n, dtype=torch.bool)
    for direction in directions:
        body, query_extra, key_extra = direction[:-2], direction[-1].item(), direction[-2].item()
        query_sides = [(query[i] @ body).item() + (sphere - query_squares[i]) ** 0.5 * query_extra for i in range(n)]
        key_sides = [(key[i] @ body).item() + (sphere - key_squares[i]) ** 0.5 * key_extra for i in range(n)]
        clusters = zip(_cut(_places_by(query_sides), chunk), _cut(_places_by(key_sides), chunk), strict=True)
        for queries, keys in clusters:
            _let_read(table, queries, keys, is_causal)
    return table


def routing_balanced(
    query: Tensor, key: Tensor, centroids: Tensor, window: int, *, is_causal: bool
) -> tuple[list[Cluster], Tensor]:
    """Say which tokens each cluster takes, and who reads whom: queries read the keys of the clusters that took them.

    A cluster takes the ``window`` queries and, apart from them, the ``window`` keys of the largest cosine with its
    centroid; the earlier token of equal ones; all tokens where there are fewer. Lengths play no part.

    Args:
        query: float64 ``[N, D]``.
        key: float64 ``[N, D]``.
        centroids: float64 ``[C, D]``.
        window: queries, and keys, of a cluster.
        is_causal: keys stand no later in the row than the query; who is taken does not depend on it.

    Returns:
        ``C`` pairs of query places and key places, ascending, and bool ``[N, N]``.

    Source: Roy et al. 2020, arXiv:2003.05997, section 4; causal by place, not by rank in the cluster.
    """
    clusters: list[Cluster] = []
    table = torch.zeros(len(query), len(key), dtype=torch.bool)
    for centroid in centroids:
        queries = sorted(_places_by([-_cosine(vector, centroid) for vector in query])[:window])
        keys = sorted(_places_by([-_cosine(vector, centroid) for vector in key])[:window])
        clusters.append((queries, keys))
        _let_read(table, queries, keys, is_causal)
    return clusters, table


def routing_mean(
    query: Tensor, key: Tensor, value: Tensor, centroids: Tensor, window: int, scale: float, *, is_causal: bool
) -> Tensor:
    """Attend in every cluster of ``routing_balanced`` by itself; the mean over the clusters in which a query reads.

    Args:
        query: float64 ``[N, D]``, scored as it is: only the choice of clusters looks at directions alone.
        key: float64 ``[N, D]``, scored as it is.
        value: float64 ``[N, Dv]``.
        centroids: float64 ``[C, D]``.
        window: queries, and keys, of a cluster.
        scale: factor of the scores.
        is_causal: keys stand no later in the row than the query.

    Returns:
        float64 ``[N, Dv]``; 0 for a query that no cluster took or that reads no key in those that did.
    """
    clusters, _ = routing_balanced(query, key, centroids, window, is_causal=is_causal)
    outputs = []
    for q in range(len(query)):
        parts = []
        for queries, keys in clusters:
            read = [k for k in keys if k <= q or not is_causal]
            if q in queries and read:
                out, _ = _softmax([scale * (query[q] @ key[k]) for k in read], [value[k] for k in read], value)
                parts.append(out)
        outputs.append(sum(parts, torch.zeros_like(value[0])) / max(len(parts), 1))
    return torch.stack(outputs)


def routing_nearest(query: Tensor, key: Tensor, centroids: Tensor, *, is_causal: bool) -> Tensor:
    """Say who reads whom when queries read the keys of the same nearest centroid, by cosine, the first of equal ones.

    Args:
        query: float64 ``[N, D]``.
        key: float64 ``[N, D]``.
        centroids: float64 ``[C, D]``.
        is_causal: keys stand no later in the row than the query.

    Returns:
        bool ``[N, N]``.
    """

    def nearest(vector: Tensor) -> int:
        cosines = [_cosine(vector, centroid) for centroid in centroids]
        return cosines.index(max(cosines))

    homes = [nearest(vector) for vector in key]
    table = torch.zeros(len(query), len(key), dtype=torch.bool)
    for q, vector in enumerate(query):
        home = nearest(vector)
        _let_read(table, [q], [k for k, other in enumerate(homes) if other == home], is_causal)
    return table


def sinkhorn_log(scores: Tensor, iterations: int, *, is_causal: bool) -> Tensor:
    """Balance block scores: rounds of making rows, then columns, sum to one; causal: each row alone, over its past.

    Args:
        scores: float64 ``[NB, NB]``, rows of query blocks, divided by the temperature.
        iterations: rounds; 0 leaves ``exp(scores)``. Plays no part if causal.
        is_causal: a row chooses among strictly earlier blocks; the first row is all zero.

    Returns:
        float64 ``[NB, NB]``.

    Source: Tay et al. 2020, arXiv:2002.11296, sections 3 and 4; causal balancing by rows only, so that nothing leaks.
    """
    if is_causal:
        past = [row[:i].softmax(0) for i, row in enumerate(scores)]
        return torch.stack([torch.cat([weights, scores.new_zeros(len(scores) - len(weights))]) for weights in past])
    logs = scores
    for _ in range(iterations):
        logs = torch.stack([row - row.logsumexp(0) for row in logs])
        logs = torch.stack([column - column.logsumexp(0) for column in logs.T]).T
    return logs.exp()


def sinkhorn_attention(
    query: Tensor, key: Tensor, value: Tensor, mixing: Tensor, block: int, scale: float, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend with one softmax over a mixed block and the query's own block.

    Offset t of the mixed block of query block i holds the sum of ``mixing[i, j] * key[j, t]`` over the blocks j that have
    a token at t; there is none if all those weights are 0. Nothing makes up for tokens that the last block lacks.

    Args:
        query: float64 ``[N, D]``.
        key: float64 ``[N, D]``.
        value: float64 ``[N, Dv]``, mixed like the keys.
        mixing: float64 ``[NB, NB]``, rows of query blocks, not negative; ``NB`` blocks hold N tokens.
        block: tokens of a block; the last may be shorter.
        scale: factor of the scores.
        is_causal: keys of the own block stand no later than the query; ``mixing`` is taken as it is given.

    Returns:
        Output ``[N, Dv]`` and logsumexp ``[N]``.

    Source: Tay et al. 2020, arXiv:2002.11296, sections 3 and 4; their two blocks share one softmax here.
    """
    n = len(query)
    blocks = _cut(list(range(n)), block)
    assert mixing.shape == (len(blocks), len(blocks)), (mixing.shape, len(blocks))
    outputs, sums = [], []
    for i, own in enumerate(blocks):
        keys, values = [], []
        for t in range(block):
            sources = [j for j in range(len(blocks)) if t < len(blocks[j])]
            if any(mixing[i, j].item() > 0 for j in sources):
                keys.append(sum((mixing[i, j] * key[blocks[j][t]] for j in sources), torch.zeros_like(key[0])))
                values.append(sum((mixing[i, j] * value[blocks[j][t]] for j in sources), torch.zeros_like(value[0])))
        for q in own:
            near = [k for k in own if k <= q or not is_causal]
            scores = [scale * (query[q] @ vector) for vector in [*keys, *[key[k] for k in near]]]
            out, lse = _softmax(scores, [*values, *[value[k] for k in near]], value)
            outputs.append(out)
            sums.append(lse)
    return torch.stack(outputs), torch.stack(sums)


def sinkhorn_hard(assignment: Sequence[Sequence[int]], n: int, block: int, *, is_causal: bool) -> Tensor:
    """Say who reads whom when a query reads its own block and the blocks assigned to it, each key once.

    Args:
        assignment: key blocks of each query block; may be empty, may repeat.
        n: tokens.
        block: tokens of a block; the last may be shorter.
        is_causal: keys stand no later in the row than the query.

    Returns:
        bool ``[n, n]``.
    """
    blocks = _cut(list(range(n)), block)
    assert len(assignment) == len(blocks), (len(assignment), len(blocks))
    table = torch.zeros(n, n, dtype=torch.bool)
    for i, own in enumerate(blocks):
        for j in [i, *assignment[i]]:
            _let_read(table, own, blocks[j], is_causal)
    return table


def sortcut(order: Sequence[int], n: int, block: int, cut: int) -> Tensor:
    """Say who reads whom when all queries read the first ``cut`` blocks of an order, and nothing else.

    Returns:
        bool ``[n, n]``, all rows alike.

    Source: Tay et al. 2020, arXiv:2002.11296, sections 3 and 4, SortCut; its sort taken as a permutation.
    """
    blocks = _cut(list(range(n)), block)
    table = torch.zeros(n, n, dtype=torch.bool)
    for j in list(order)[:cut]:
        _let_read(table, list(range(n)), blocks[j], False)
    return table


def enumerate_choices(
    logits_of: Callable[[tuple[int, ...]], Tensor], reward_of: Callable[[tuple[int, ...]], float], steps: int
) -> Tensor:
    """Return the expected reward of picks drawn one after the other, by trying every sequence.

    Args:
        logits_of: the picks so far -> float64 ``[choices]``, logits of the next pick; -inf is never picked.
            Independent picks of logits ``[steps, choices]``: ``lambda picks: logits[len(picks)]``.
        reward_of: all ``steps`` picks, in order -> the reward; a constant to the gradient.
        steps: picks of a sequence.

    Returns:
        float64 scalar; its gradient is the one that REINFORCE estimates.
    """

    def expected(picks: tuple[int, ...]) -> Tensor | float:
        if len(picks) == steps:
            return reward_of(picks)
        logits = logits_of(picks)
        chances = logits.softmax(0)
        allowed = [i for i, logit in enumerate(logits.tolist()) if logit > float("-inf")]
        return torch.stack([chances[i] * expected((*picks, i)) for i in allowed]).sum()

    return torch.as_tensor(expected(()), dtype=torch.float64)


def _softmax(scores: list[Tensor], values: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return output ``[Dv]`` and logsumexp of one query; 0, in the form of a row of ``like``, and -inf without scores."""
    if not scores:
        return torch.zeros_like(like[0]), like.new_full((), float("-inf"))
    lse = torch.stack(scores).logsumexp(0)
    weighted = [(score - lse).exp() * vector for score, vector in zip(scores, values, strict=True)]
    return torch.stack(weighted).sum(0), lse


def _places_by(numbers: list[float]) -> list[int]:
    """Return the places of numbers in ascending order, equal ones as they come."""
    return sorted(range(len(numbers)), key=lambda i: (numbers[i], i))


def _cut(places: list[int], size: int) -> list[list[int]]:
    """Cut a list into pieces of ``size``; the last may be shorter."""
    return [places[start : start + size] for start in range(0, len(places), size)]


def _cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of two vectors ``[D]``; 0 if one of them is 0."""
    product = (one @ other).item()
    lengths = (one @ one).item() ** 0.5 * (other @ other).item() ** 0.5
    return product / lengths if lengths else 0.0


def _let_read(table: Tensor, queries: list[int], keys: list[int], is_causal: bool) -> None:
    """Set ``table`` True where one of the queries may read one of the keys."""
    for q in queries:
        for k in keys:
            if k <= q or not is_causal:
                table[q, k] = True
