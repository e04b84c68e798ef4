"""Precision, recall and F1 of whole entities: a predicted one counts if its kind, first and last token are right."""

import datasets
import evaluate


class EntityF1(evaluate.Metric):
    """Predictions and references are lists of tags, one for each token: "O", "B-kind" or "I-kind".

    "precision", "recall" and "f1" are from 0 to 1, over all entities of all texts. As in the CoNLL shared tasks an "I" that
    follows another kind, or nothing, begins an entity.

    Source: Tjong Kim Sang and De Meulder 2003, arXiv:cs/0306050, section 2.
    """

    def _info(self) -> evaluate.MetricInfo:
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": tags, "references": tags})
        )

    def _compute(self, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        shared = said = there = 0
        for one, other in zip(predictions, references, strict=True):
            if len(one) != len(other):
                raise ValueError(f"a text has {len(other)} tags, but {len(one)} were predicted")
            found, wanted = entities(one), entities(other)
            shared, said, there = shared + len(found & wanted), said + len(found), there + len(wanted)
        return {
            "precision": shared / said if said else 0.0,
            "recall": shared / there if there else 0.0,
            "f1": 2 * shared / (said + there) if said + there else 0.0,
        }


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """Return kind, first and behind the last token of each entity."""
    found, kind, first = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        begins, _, own = tag.partition("-")
        if begins not in ("B", "I", "O") or (begins == "O") == bool(own):
            raise ValueError(f"a tag is 'O', 'B-kind' or 'I-kind', got {tag!r}")
        if kind and (begins != "I" or own != kind):
            found.add((kind, first, place))
            kind = ""
        if not kind and own:
            kind, first = own, place
    return found
