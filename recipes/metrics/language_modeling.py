"""Perplexity, and bits a byte, which models with different tokenizers can be compared by."""

import math

import datasets
import evaluate


class LanguageModeling(evaluate.Metric):
    """Predictions are losses, float64, the sum over a text's predicted tokens in nats; references their numbers.

    A reference is {"tokens": how many tokens were predicted, "bytes": how many bytes of UTF-8 these stand for}. "perplexity" is
    the exponential of the mean loss of a token, "bits_per_byte" the loss in bits over the bytes.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": {"tokens": datasets.Value("int64"), "bytes": datasets.Value("int64")},
                }
            ),
        )

    def _compute(self, predictions: list[float], references: list[dict[str, int]]) -> dict[str, float]:
        tokens, size = (sum(reference[name] for reference in references) for name in ("tokens", "bytes"))
        if not tokens or not size:
            raise ValueError("no token was predicted, so there is no perplexity")
        loss = math.fsum(predictions)
        return {"perplexity": math.exp(loss / tokens), "bits_per_byte": loss / math.log(2) / size}
