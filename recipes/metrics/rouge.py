"""ROUGE: words, pairs of words and longest common sequences that a summary shares with its reference."""

import datasets
import evaluate
from rouge_score import rouge_scorer

_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """Predictions and references are strings, for "rougeLsum" with a line for each sentence.

    Each is the mean F-measure, from 0 to 1, with words stemmed. Words are of Latin letters and digits: texts in other scripts
    score 0.

    Source: Lin 2004, https://aclanthology.org/W04-1013, as the package rouge-score computes it.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scorer = rouge_scorer.RougeScorer(list(_KINDS), use_stemmer=True)
        scores = [scorer.score(other, one) for one, other in zip(predictions, references, strict=True)]
        return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in _KINDS}
