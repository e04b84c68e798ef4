"""Metrics that ship with the recipes: each against its definition written out, and none asks the network."""

import itertools
import math
import random
from typing import Any

import pytest

pytest.importorskip("evaluate", reason="the metrics need hf-sparse[recipes]")

import evaluate

from hf_sparse.recipes.metrics import METRICS, load_metric


def computed(name: str, predictions: list[Any], references: list[Any], **settings: Any) -> dict[str, float]:
    found: dict[str, float] = load_metric(name, **settings).compute(predictions=predictions, references=references)
    return found


def f1_of(pairs: list[tuple[int, int]]) -> float:
    """Return F1 of (predicted, there) in {0, 1}."""
    both = sum(p * r for p, r in pairs)
    total = sum(p + r for p, r in pairs)
    return 2 * both / total if total else 0.0


def test_each_is_known_by_its_name() -> None:
    assert METRICS == (
        "accuracy",
        "entity_f1",
        "f1",
        "language_modeling",
        "question_answering",
        "retrieval",
        "rouge",
    )
    with pytest.raises(
        ValueError,
        match=r"unknown metric 'bleu'; known: accuracy, .*; one on the Hub is named as owner/name, a script by",
    ):
        load_metric("bleu")


def test_one_of_the_hub_is_asked_for_by_its_owner_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(evaluate, "load", lambda name, **settings: asked.append((name, settings["config_name"])))
    load_metric("owner/name", config_name="plain")
    assert asked == [("owner/name", "plain")]


def test_accuracy_is_the_share_that_is_right() -> None:
    assert computed("accuracy", [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}


def test_f1_of_classes_and_of_labels_equals_the_definition() -> None:
    drawn = random.Random(0)
    said, there = ([drawn.randrange(4) for _ in range(60)] for _ in range(2))
    found = computed("f1", said, there)
    by_class = [f1_of([(int(p == c), int(r == c)) for p, r in zip(said, there, strict=True)]) for c in range(4)]
    assert math.isclose(found["f1_macro"], sum(by_class) / 4)
    # of single classes micro F1 is the accuracy
    assert math.isclose(found["f1_micro"], sum(p == r for p, r in zip(said, there, strict=True)) / 60)
    many = [[[drawn.randrange(2) for _ in range(5)] for _ in range(30)] for _ in range(2)]
    found = computed("f1", *many, config_name="multilabel")
    columns = [list(zip(*(zip(*rows, strict=True) for rows in many), strict=True))[label] for label in range(5)]
    by_label = [f1_of(list(zip(*column, strict=True))) for column in columns]
    assert math.isclose(found["f1_macro"], sum(by_label) / 5)
    flat = [list(itertools.chain(*rows)) for rows in many]
    assert math.isclose(found["f1_micro"], f1_of(list(zip(*flat, strict=True))))


@pytest.mark.parametrize(
    ("said", "answers", "exact", "f1"),
    [
        ("The cat!", ["a cat", "dog"], 1.0, 1.0),
        ("the big cat", ["cat"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("red red blue", ["red blue blue"], 0.0, 2 / 3),
    ],
)
def test_answers_count_as_in_squad(said: str, answers: list[str], exact: float, f1: float) -> None:
    found = computed("question_answering", [said], [answers])
    assert found["exact_match"] == exact
    assert math.isclose(found["f1"], f1)


def test_entities_count_whole() -> None:
    there = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "B-ORG", "O"]]
    assert computed("entity_f1", there, there) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    # a shorter person; a place of the right kind; two organisations taken for one
    said = [["B-PER", "O", "O", "I-LOC"], ["O", "B-ORG", "I-ORG", "O"]]
    found = computed("entity_f1", said, there)
    assert found == {"precision": 1 / 3, "recall": 1 / 4, "f1": 2 / 7}
    assert computed("entity_f1", [["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    # an "I" of another kind begins an entity
    assert computed("entity_f1", [["B-A", "I-B"]], [["B-A", "B-B"]])["f1"] == 1.0
    for bad in ("X", "B", "O-A", "B-"):
        with pytest.raises(ValueError, match=f"a tag is 'O', 'B-kind' or 'I-kind', got '{bad}'"):
            computed("entity_f1", [[bad]], [["O"]])
    with pytest.raises(ValueError, match="a text has 2 tags, but 1 were predicted"):
        computed("entity_f1", [["O"]], [["O", "O"]])


def test_rouge_counts_words_pairs_and_sequences() -> None:
    found = computed("rouge", ["the cat sat down"], ["the dog sat down"])
    assert math.isclose(found["rouge1"], 3 / 4)
    assert math.isclose(found["rouge2"], 1 / 3)
    assert math.isclose(found["rougeL"], 3 / 4)
    # sentence by sentence the order of sentences does not count
    found = computed("rouge", ["cats sat\ndogs ran"], ["dogs ran\ncats sat"])
    assert math.isclose(found["rougeLsum"], 1.0)
    assert math.isclose(found["rougeL"], 1 / 2)


def test_perplexity_is_of_tokens_and_bits_are_of_bytes() -> None:
    counts = [{"tokens": 3, "bytes": 8}, {"tokens": 1, "bytes": 4}]
    found = computed("language_modeling", [3 * math.log(2), 5 * math.log(2)], counts)
    assert math.isclose(found["perplexity"], 2 ** (8 / 4))
    assert math.isclose(found["bits_per_byte"], 8 / 12)
    with pytest.raises(ValueError, match="no token was predicted"):
        computed("language_modeling", [0.0], [{"tokens": 0, "bytes": 3}])


def test_retrieval_counts_ranks_and_ties_against_the_model() -> None:
    scores = [[0.1, 0.9, 0.5], [0.3, 0.3, 0.1], [float(i) for i in range(12)]]
    found = computed("retrieval", scores, [1, 0, 4])
    assert found["recall@1"] == 1 / 3
    assert found["recall@5"] == 2 / 3
    assert found["recall@10"] == 1.0
    assert math.isclose(found["mrr"], (1 + 1 / 2 + 1 / 8) / 3)
    assert computed("retrieval", [[1.0, math.nan]], [0])["recall@1"] == 0.0
    with pytest.raises(ValueError, match="document is number 2, but 2 documents were scored"):
        computed("retrieval", [[1.0, 0.0]], [2])
