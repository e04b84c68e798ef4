"""What runs are judged by: the right rows, all of the text, and what was chosen on the validation split alone."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import hf_sparse
from hf_sparse.errors import FailedRunError, RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.metrics import load_metric
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.results import spread, table
from hf_sparse.recipes.tasks.answer import Answering
from hf_sparse.recipes.tasks.classify import Classification
from hf_sparse.recipes.tasks.language import Causal, Masked, _predicted_bytes
from hf_sparse.recipes.tasks.retrieve import Retrieval
from hf_sparse.recipes.tasks.summarize import Summarization
from hf_sparse.recipes.tasks.tag import Tagging
from hf_sparse.recipes.training import _judged, _validated
from tests.recipe_cases import arguments, asked, passage, write

pytestmark = pytest.mark.usefixtures("one_thread")
HELD = RecipeArguments("model", "data", "out")
KINDS = ("train", "validation", "test")


def splits_of(**columns: list[Any]) -> dict[str, Dataset]:
    return dict.fromkeys(KINDS, Dataset.from_dict(columns))


@pytest.fixture(scope="module")
def tokenizer(checkpoints: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints / "dense")


def test_answers_are_compared_with_those_of_their_own_row(checkpoints: Path, tmp_path: Path) -> None:
    """The saved model, asked question by question in a plain loop, has the score that the run says."""
    dataset = write(tmp_path / "data", asked)
    (run,) = finetune("answer", arguments(checkpoints, dataset, tmp_path / "run"))["runs"]
    model: Any = AutoModelForQuestionAnswering.from_pretrained(run["folder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(run["folder"])
    said, wanted, lengths = [], [], set()
    for row in Dataset.from_json(f"{dataset}/test.jsonl"):
        held = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, owner = held.pop("offset_mapping")[0].tolist(), held.sequence_ids()
        marks = torch.tensor([[int(i == 0 or one == 0) for i, one in enumerate(owner)]])
        with torch.no_grad():
            found = model(**held, global_attention_mask=marks)
        at = [i for i, one in enumerate(owner) if one == 1]
        firsts, lasts = (
            sorted(at, key=lambda i, logits=logits[0]: -float(logits[i]))[:20]
            for logits in (found.start_logits, found.end_logits)
        )
        pairs = [(a, b) for a in firsts for b in lasts if a <= b < a + 64]
        start, end = max(pairs, key=lambda p: float(found.start_logits[0, p[0]] + found.end_logits[0, p[1]]))
        said.append(row["context"][offsets[start][0] : offsets[end][1]])
        wanted.append(row["answers"]["text"])
        lengths.add(len(owner))
    # of several lengths, so that sorted by it they would be another order
    assert len(lengths) > 3
    metric = load_metric("question_answering").compute(predictions=said, references=wanted)
    assert run["metrics"] == pytest.approx(dict(metric))


def test_the_question_of_a_batch_is_global(checkpoints: Path, tokenizer: Any) -> None:
    answers = [{"text": ["river"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    splits = splits_of(question=["what is it", "who"], context=["river and more", "a module"], answers=answers)
    task = Answering(splits, HELD)
    rows = task.encode(splits["test"], "test", tokenizer, Reading(64))
    batch = task.collator(tokenizer, task.load(str(checkpoints / "sparse")), Reading(64))(list(rows))
    for marks, row in zip(batch["global_attention_mask"], rows, strict=True):
        # the first token and all before the separator
        end = row["input_ids"].index(tokenizer.sep_token_id)
        assert marks.nonzero()[:, 0].tolist() == list(range(end))


def test_names_are_told_apart_by_name_and_not_by_number() -> None:
    def split(names: list[str], labels: list[str]) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict(
            {"text": ["x"] * len(labels), "label": [names.index(one) for one in labels]}, features=features
        )

    splits = {
        "train": split(["black", "grey", "white"], ["black", "white", "grey"]),
        "validation": split(["grey", "white"], ["grey", "white"]),
        "test": split(["white", "black"], ["white", "black"]),
    }
    task = Classification(splits, HELD)
    assert task.names == ["black", "grey", "white"]
    assert [task.numbers(one, "test") for one in splits["test"]["label"]] == [2, 0]
    assert [task.numbers(one, "validation") for one in splits["validation"]["label"]] == [1, 2]
    # one that is declared, and that no document of the training split has
    splits["train"] = split(["black", "grey", "white"], ["black", "white"])
    with pytest.raises(RecipeError, match="the validation split has labels that the training split has not: 'grey'"):
        Classification(splits, HELD)


@pytest.mark.parametrize(
    ("label", "said"),
    [([0.5, 1.0], "the label 0.5"), (["a", None], "the label None"), ([{"a": 1}] * 2, "the label {'a'")],
)
def test_labels_are_text_or_whole_numbers(label: list[Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Classification(splits_of(text=["x", "y"], label=label), HELD)


def test_entities_that_are_not_read_are_not_found(tokenizer: Any) -> None:
    words = ["module", "object", "class", "method", "function", "string", "name", "value"]
    tags = ["B-A", "O", "O", "B-A", "I-A", "O", "B-B", "O"]
    splits = splits_of(tokens=[words], tags=[tags])
    task = Tagging(splits, HELD)
    for longest, recall in ((64, 1.0), (7, 2 / 3)):
        rows = task.encode(splits["test"], "test", tokenizer, Reading(longest, cuts=True))
        labels = np.array(rows["labels"])
        found = task.metrics(np.where(labels == -100, 0, labels), labels, "test")
        assert (found["precision"], found["recall"]) == (1.0, pytest.approx(recall))


def test_padding_and_what_continues_a_word_have_no_tag(tokenizer: Any) -> None:
    splits = splits_of(tokens=[["unbelievablenesses", "name"], ["name"]], tags=[["B-A", "O"], ["B-A"]])
    task = Tagging(splits, HELD)
    rows = task.encode(splits["test"], "test", tokenizer, Reading(64))
    assert len(rows[0]["input_ids"]) > 6
    assert [[label for label in row["labels"] if label != -100] for row in rows] == [[0, 1], [0]]
    batch = task.collate(list(rows), tokenizer, Reading(64))
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != -100).sum() == 3


@pytest.mark.parametrize("tags", [["B-A", "A"], ["X-A", "O"], ["B", "O"]])
def test_what_is_no_tag_is_said_before_anything_is_trained(tags: list[str]) -> None:
    with pytest.raises(RecipeError, match="column 'tags': a tag is 'O', 'B-kind' or 'I-kind'"):
        Tagging(splits_of(tokens=[["a", "b"]], tags=[tags]), HELD)


def chances(*held: float) -> np.ndarray:
    return np.array([[np.log(p / (1 - p))] for p in held])


def test_a_threshold_is_chosen_on_the_validation_split_alone() -> None:
    task = Classification(splits_of(text=["x"] * 4, label=[["rare"], [], [], []]), HELD)
    labels = np.array([[1.0], [1.0], [0.0], [0.0]])
    validation = SimpleNamespace(predictions=chances(0.2, 0.15, 0.05, 0.05), label_ids=labels, metrics={})
    # where another threshold would be the best one
    test = SimpleNamespace(predictions=chances(0.9, 0.04, 0.3, 0.3), label_ids=labels, metrics={"test_loss": 0.5})
    seen = []

    def predict(split: str) -> Any:
        seen.append(split)
        return {"validation": validation, "test": test}[split]

    trainer = SimpleNamespace(predict=predict, compute_metrics=None)
    found = _judged(task, trainer, dict(zip(KINDS, KINDS, strict=True)))
    assert 0.05 < found["threshold"] <= 0.15
    assert seen == ["validation", "test"]
    # one of two is found, and two that are none
    assert found["metrics"]["f1_micro"] == pytest.approx(2 * 1 / (2 + 3))
    assert found["loss"] == 0.5
    # so are epochs: under the threshold that fits them, where none of their labels reaches a half
    task.threshold = 0.5
    assert _validated(task, validation) == {"f1_micro": 1.0, "f1_macro": 1.0}


def test_a_summary_is_compared_with_the_whole_one(tokenizer: Any) -> None:
    text = "the name of the module is the string of the class"
    splits = splits_of(text=[text, text], summary=[text, "the name"])
    task = Summarization(splits, RecipeArguments("m", "d", "o", max_summary_length=6))
    rows = task.encode(splits["test"], "test", tokenizer, Reading(64))
    batch = task.collate(list(rows), tokenizer, Reading(64))
    assert batch["labels"].shape == (2, 6)
    assert batch["labels"][1].tolist()[-2:] == [-100, -100]
    found = task.metrics(batch["labels"].numpy(), batch["labels"].numpy(), "test")
    # four of eleven words, and all of two
    assert found["rouge1"] == pytest.approx((2 * 4 / (4 + 11) + 1) / 2)


def test_one_label_alone_is_no_class_beside_its_absence() -> None:
    metric = load_metric("f1", config_name="multilabel")
    found = metric.compute(predictions=[[0]] * 4, references=[[1], [0], [0], [0]])
    assert found == {"f1_micro": 0.0, "f1_macro": 0.0}


def test_bits_are_of_the_bytes_that_were_predicted(tokenizer: Any) -> None:
    texts = {kind: [passage(random.Random(seed), 30 * (seed + 1))] for seed, kind in enumerate(KINDS)}
    splits = {kind: Dataset.from_dict({"text": held}) for kind, held in texts.items()}
    task = Causal(splits, HELD)
    for kind in KINDS:
        rows = task.encode(splits[kind], kind, tokenizer, Reading(16))
        if kind == "train":
            continue
        wanted = 0
        for ids in rows["input_ids"]:
            whole, first = (len(tokenizer.decode(held, skip_special_tokens=True).encode()) for held in (ids, ids[:1]))
            wanted += whole - first
        assert wanted > 0
        bits = task.metrics(np.array([[np.log(2) * wanted, 10.0]]), None, kind)["bits_per_byte"]
        assert bits == pytest.approx(1.0)


def test_a_letter_of_several_bytes_counts_as_such() -> None:
    letters = SimpleNamespace(batch_decode=lambda rows, **_: ["".join(map(chr, row)) for row in rows])
    ids = [ord(letter) for letter in "é→aß"]
    assert _predicted_bytes({"input_ids": ids}, letters) == 3 + 1 + 2
    assert _predicted_bytes({"input_ids": ids, "document_ids": [0, 0, 1, 1]}, letters) == 3 + 2


def test_neither_padding_nor_the_first_token_of_a_document_is_predicted() -> None:
    task = Causal(splits_of(text=["x"]), HELD)
    batch = {
        "input_ids": torch.arange(7)[None] + 5,
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "document_ids": torch.tensor([[0, 0, 1, 1, 1, -1, -1]]),
    }
    assert task.finish(batch, None)["labels"].tolist() == [[5, 6, -100, 8, 9, -100, -100]]


def test_the_same_tokens_are_masked_each_time(tokenizer: Any) -> None:
    splits = splits_of(text=[passage(random.Random(3), 60)])
    task = Masked(splits, HELD)
    once, again = (task.encode(splits["test"], "test", tokenizer, Reading(64))[:] for _ in range(2))
    assert once["labels"] == again["labels"]
    assert any(label != -100 for label in once["labels"][0])
    assert (task.best, task.is_larger_better) == ("loss", False)


def test_documents_without_a_query_are_searched_too(checkpoints: Path, tokenizer: Any) -> None:
    texts = [passage(random.Random(i), 10 + 12 * i) for i in range(5)]
    held = {"text": texts, "query": [["the name"], ["shared"], ["a class", "an object"], ["shared"], ["the string"]]}
    splits = splits_of(**held)
    task = Retrieval(splits, HELD)
    reading = Reading(256)
    model = task.load(str(checkpoints / "sparse")).eval()
    assert len(task.encode(splits["train"], "train", tokenizer, reading)) == 3
    rows = task.encode(splits["test"], "test", tokenizer, reading)
    assert [len(ids) for ids in rows["query_input_ids"]] == [1, 0, 2, 0, 1]
    from transformers import TrainingArguments

    trainer = task.trainer(
        model=model,
        args=TrainingArguments(
            "unused", per_device_eval_batch_size=2, use_cpu=True, label_names=["owner"], report_to=[]
        ),
        data_collator=task.collator(tokenizer, model, reading),
        eval_dataset=rows,
    )
    trainer.args.remove_unused_columns = False
    found = trainer.predict(rows)

    def vector(text: str) -> Any:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).numpy()

    assert found.label_ids.tolist() == [1, 0, 2, 0, 1]
    for text, queries, vectors in zip(
        texts, [["the name"], [], ["a class", "an object"], [], ["the string"]], found.predictions, strict=True
    ):
        for one, mine in zip([text, *queries], vectors, strict=False):
            np.testing.assert_allclose(mine, vector(one), atol=1e-5)
    scores = task.metrics(found.predictions, found.label_ids, "test")
    ranks = [
        sum(vector(other) @ vector(query) >= vector(texts[i]) @ vector(query) for other in texts)
        for i, query in ((0, "the name"), (2, "a class"), (2, "an object"), (4, "the string"))
    ]
    assert scores["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_several_seeds_have_a_mean_and_its_interval() -> None:
    # of three the factor of Student's t is 4.3027
    mean, half = spread([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.302653 * (0.07**0.5) / 3**0.5, rel=1e-6)
    assert spread([0.4]) == (0.4, 0.0)
    run = {"model": "sparse", "metrics": {"f1": 0.1}, "seconds": 1.0, "tokens_per_second": None, "peak_memory_mib": 3.0}
    runs = [{**run, "metrics": {"f1": value}} for value in (0.1, 0.2, 0.6)]
    line = table({"runs": runs, "models": {"sparse": {"title": "mine"}}})[-1]
    assert line == f"| mine | 0.3000 ± {half:.4f} | 1 |  | 3 |"
    # the most memory of those that are known
    for run, memory in zip(runs, (2.0, None, 1.0), strict=True):
        run["peak_memory_mib"] = memory
    assert table({"runs": runs, "models": {"sparse": {"title": "mine"}}})[-1].endswith("| 1 |  | 2 |")
    unknown = [{**run, "peak_memory_mib": None} for run in runs]
    assert table({"runs": unknown, "models": {"sparse": {"title": "mine"}}})[-1].endswith("| 1 |  |  |")


SCRIPT = """
import datasets
import evaluate


class Sizes(evaluate.Metric):
    def _info(self):
        one = datasets.Value("int64")
        return evaluate.MetricInfo("", "", datasets.Features({"predictions": one, "references": one}))

    def _compute(self, predictions, references):
        return {"zeros": predictions.count(0), "accuracy": sum(references) / 8, "each": predictions}
"""


def test_a_metric_that_is_asked_for_stands_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sizes.py"
    path.write_text(SCRIPT)
    task = Classification(splits_of(text=["x"] * 4, label=[0, 1, 1, 1]), replace(HELD, metric=str(path)))
    logits = np.array([[3.0, 1.0], [2.0, 0.0], [0.0, 2.0], [5.0, 1.0]])
    found = task.metrics(logits, np.array([0, 1, 1, 1]), "test")
    # numbers alone
    assert found == {"accuracy": 0.5, "f1_micro": 0.5, "f1_macro": 0.5, "sizes_zeros": 3.0, "sizes_accuracy": 0.375}
    monkeypatch.chdir(tmp_path)
    by_name = Classification(splits_of(text=["x"] * 4, label=[0, 1, 1, 1]), replace(HELD, metric="sizes.py"))
    assert by_name.metrics(logits, np.array([0, 1, 1, 1]), "test") == found
    # one that cannot be computed of labels, or of these
    for metric, said in (("rouge", "ValueError: Predictions"), ("sizes.py", "ZeroDivisionError: division by zero")):
        path.write_text(SCRIPT.replace("/ 8", "/ 0"))
        task = Classification(splits_of(text=["x"] * 4, label=[0, 1, 1, 1]), replace(HELD, metric=metric))
        with pytest.raises(FailedRunError, match=f"--metric {metric} cannot be computed of what this task .*{said}"):
            task.metrics(logits, np.array([0, 1, 1, 1]), "test")


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        (Classification, {"text": ["a module", "the river of words"], "label": ["0", "1"]}),
        (Tagging, {"tokens": [["a", "module"], ["the", "river"]], "tags": [["O", "B-X"], ["O", "B-X"]]}),
        (Retrieval, {"text": ["a module", "the river of words"], "query": ["module", "what flows"]}),
        (Summarization, {"text": ["a module", "the river of words"], "summary": ["module", "river"]}),
    ],
)
def test_the_first_token_of_a_document_is_global_though_nobody_said_so(
    task: Any, columns: dict[str, Any], checkpoints: Path, tokenizer: Any, tmp_path: Path
) -> None:
    prefix = "bart-" if task is Summarization else ""
    pattern = hf_sparse.pattern("longformer", window=32, global_projections=False)
    hf_sparse.convert(checkpoints / f"{prefix}dense", tmp_path / "sparse", pattern, max_length=256, verify=False)
    splits = splits_of(**columns)
    held = task(splits, HELD)
    rows = held.encode(splits["test"], "test", tokenizer, Reading(64))
    batch = held.collator(tokenizer, held.load(str(tmp_path / "sparse")), Reading(64))(list(rows))
    names = ["", "query_"] if task is Retrieval else [""]
    for name in names:
        marks = batch[f"{name}global_attention_mask"]
        assert marks.shape == batch[f"{name}input_ids"].shape
        assert marks[:, 0].tolist() == [1, 1]
        assert int(marks.sum()) == 2
