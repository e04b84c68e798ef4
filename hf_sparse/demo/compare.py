"""Scores of retrieval, and intervals of their differences."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from torch import Tensor, tensor

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A difference with its 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


def ranks(documents: Tensor, queries: Tensor, answers: Sequence[int]) -> Tensor:
    """Return the rank of each query's answer, 1 being the best; a tie counts against it.

    Args:
        documents: float ``[N, D]``, normalised.
        queries: float ``[Q, D]``, normalised.
        answers: index of the right document for each query.
    """
    scores = queries @ documents.T
    right = scores.gather(1, tensor(answers)[:, None])
    return (scores >= right).sum(1)


def recall_at_1(rank: Tensor) -> float:
    """Return the share of queries whose answer came first."""
    return float((rank == 1).double().mean())


def mean_reciprocal_rank(rank: Tensor) -> float:
    """Return the mean of 1 / rank."""
    return float((1 / rank.double()).mean())


def paired_interval(ours: Tensor, theirs: Tensor, topics: Sequence[int]) -> Interval:
    """Return the difference of recall@1 with its paired bootstrap 95 % interval.

    Whole topics are drawn with all their queries, both models on the same ones: passages of one topic are not
    independent, so drawing queries one by one would give an interval that is too narrow.

    Args:
        ours: int64 ``[Q]``, ranks under the one model.
        theirs: int64 ``[Q]``, ranks under the other.
        topics: the topic of each query.
    """
    gain = (ours == 1).double().numpy() - (theirs == 1).double().numpy()
    groups = [numpy.flatnonzero(numpy.asarray(topics) == topic) for topic in sorted(set(topics))]
    sums = numpy.array([gain[group].sum() for group in groups])
    sizes = numpy.array([len(group) for group in groups])
    drawn = numpy.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = numpy.percentile(means, [2.5, 97.5])
    return Interval(float(gain.mean()), float(low), float(high))
