"""The harmonic mean of precision and recall, over all labels together (micro) and as the mean over labels (macro)."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """ "f1_micro" and "f1_macro", from 0 to 1.

    With ``config_name="multilabel"`` predictions and references are int64 ``[labels]``, 1 where a label is given, as every
    example's; otherwise int64 classes. A label that is neither predicted nor there counts as 0, as scikit-learn has it.
    """

    def _info(self) -> evaluate.MetricInfo:
        one: datasets.Value | datasets.Sequence = datasets.Value("int64")
        if self.config_name == "multilabel":
            one = datasets.Sequence(one)
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": one, "references": one})
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {
            f"f1_{average}": float(f1_score(references, predictions, average=average, zero_division=0))
            for average in ("micro", "macro")
        }
