"""Exact match and F1 of words, as SQuAD counts them: the best of the references of each question."""

import re
import string
from collections import Counter

import datasets
import evaluate


class QuestionAnswering(evaluate.Metric):
    """Predictions are strings, references lists of strings, none for a question without an answer.

    "exact_match" and "f1" are from 0 to 1. Case, punctuation, articles and the width of spaces do not count.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1, and 2018, arXiv:1806.03822; there in percent.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        exact = f1 = 0.0
        for said, answers in zip(predictions, references, strict=True):
            words = _words(said)
            wanted = [_words(answer) for answer in answers] or [[]]
            exact += max(words == other for other in wanted)
            f1 += max(_f1(words, other) for other in wanted)
        return {"exact_match": exact / len(references), "f1": f1 / len(references)}


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _f1(one: list[str], other: list[str]) -> float:
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))
