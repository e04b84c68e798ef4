"""How early the right document comes when documents are sorted by their score for a query."""

import datasets
import evaluate


class Retrieval(evaluate.Metric):
    """Predictions are float64 ``[documents]``, the scores of a query; references the index of its document.

    "recall@1", "recall@5" and "recall@10" are the share of queries whose document is among the first so many, "mrr" the mean of
    one over its rank. A document of equal score counts as before the right one.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        ranks = []
        for scores, right in zip(predictions, references, strict=True):
            if not 0 <= right < len(scores):
                raise ValueError(f"a query's document is number {right}, but {len(scores)} documents were scored")
            # not (a < b), so that a score that is no number comes first and is seen
            ranks.append(sum(not score < scores[right] for score in scores))
        found = {f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        return {**found, "mrr": sum(1 / rank for rank in ranks) / len(ranks)}
