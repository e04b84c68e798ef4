"""The share of predictions that are right."""

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Predictions and references are int64 classes; "accuracy" is from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        right = sum(one == other for one, other in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}
