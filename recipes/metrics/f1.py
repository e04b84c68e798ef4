"""The harmonic mean of precision and recall, over all labels together (micro) and as the mean over labels (macro)."""

from typing import Any

import datasets
import evaluate
import numpy as np


class F1(evaluate.Metric):
    """ "f1_micro" and "f1_macro", from 0 to 1.

    With ``config_name="multilabel"`` predictions and references are int64 ``[labels]``, 1 where a label is given, and a label
    that is neither predicted nor there counts as 0; otherwise they are int64 classes, and such a class does not count. Both as
    scikit-learn has it.
    """

    def _info(self) -> evaluate.MetricInfo:
        one: datasets.Value | datasets.Sequence = datasets.Value("int64")
        if self.config_name == "multilabel":
            one = datasets.Sequence(one)
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": one, "references": one})
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, float]:
        said, there = (np.array(held) for held in (predictions, references))
        if self.config_name != "multilabel":
            # a column for each class that was predicted or is there
            classes = np.union1d(said, there)
            said, there = (held[:, None] == classes for held in (said, there))
        right, total = ((said & there).sum(0), said.sum(0) + there.sum(0))
        each = np.where(total > 0, 2 * right / np.maximum(total, 1), 0.0)
        return {"f1_micro": float(2 * right.sum() / max(total.sum(), 1)), "f1_macro": float(each.mean())}
