"""Documents as models read them: cut, in chunks whose outputs are put together, joined into rows, masked."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

import transformers
from datasets import Dataset
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse.errors import RecipeError
from hf_sparse.recipes import documents
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.chunks import read_in_chunks_
from hf_sparse.recipes.documents import read_splits, some_of
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.reading import Reading, pad, tokenize
from hf_sparse.recipes.tasks.answer import Answering
from hf_sparse.recipes.tasks.language import masked, packed
from hf_sparse.recipes.tasks.retrieve import Retrieval
from tests.recipe_cases import arguments, plain, write
from tests.support.checkpoints import write_tokenizer
from tests.support.models import tiny_model
from tests.support.zoo import tiny_of_type

TEXT = "the river reads a page of the long word every stone"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "Bert")
    return AutoTokenizer.from_pretrained(folder)


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_document_is_read_whole_cut_or_in_chunks(tokenizer: Any) -> None:
    (whole,) = tokenize(tokenizer, Reading(16), [TEXT])
    assert words(tokenizer, whole["input_ids"]) == f"<s> {TEXT} </s>"
    (cut,) = tokenize(tokenizer, Reading(6, cuts=True), [TEXT])
    assert words(tokenizer, cut["input_ids"]) == "<s> the river reads a </s>"
    with pytest.raises(RecipeError, match="a document has 13 tokens, more than 6: pass --truncate"):
        tokenize(tokenizer, Reading(6), [TEXT])
    (parts,) = tokenize(tokenizer, Reading(18, 6), [TEXT])
    # three chunks with special tokens of their own; the last is as long as it is
    assert words(tokenizer, parts["input_ids"][:12]) == "<s> the river reads a </s> <s> page of the long </s>"
    assert words(tokenizer, parts["input_ids"][12:]) == "<s> word every stone </s>"
    # of a text that is cut chunks hold what is read whole: ten words of eleven
    (some,) = tokenize(tokenizer, Reading(12, 6, cuts=True), [TEXT])
    assert words(tokenizer, some["input_ids"][12:]) == "<s> word every </s>"
    with pytest.raises(RecipeError, match="a document has 13 tokens, more than 12"):
        tokenize(tokenizer, Reading(12, 6), [TEXT])
    (split,) = tokenize(tokenizer, Reading(12, 6, cuts=True), [TEXT.split()], is_split=True)
    assert split["input_ids"] == some["input_ids"]
    # as long as is read whole is no more than is read in chunks
    assert tokenize(tokenizer, Reading(13, 6), [TEXT])[0]["input_ids"] == parts["input_ids"]


def test_a_question_stands_before_every_chunk_of_its_context(tokenizer: Any) -> None:
    (row,) = tokenize(tokenizer, Reading(32, 8), ["the stone"], [TEXT])
    said = words(tokenizer, row["input_ids"])
    assert said.count("<s> the stone") == 4
    context = [TEXT[a:b] for (a, b), one in zip(row["offset_mapping"], row["sequence_ids"], strict=True) if one == 1]
    assert " ".join(context) == TEXT
    (cut,) = tokenize(tokenizer, Reading(10, 8, cuts=True), ["the stone"], [TEXT])
    (whole,) = tokenize(tokenizer, Reading(10, cuts=True), ["the stone"], [TEXT])
    read = [
        [at for at, one in zip(row["offset_mapping"], row["sequence_ids"], strict=True) if one == 1]
        for row in (cut, whole)
    ]
    assert read[0] == read[1]
    assert len(read[0]) == 5
    with pytest.raises(RecipeError, match="a question has 5 tokens, which leaves no room for its context among 8"):
        tokenize(tokenizer, Reading(32, 8), ["the stone of the page"], [TEXT])


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_logits_of_chunks_are_averaged_or_the_largest(problem: str) -> None:
    model = tiny_model("Bert", "ForSequenceClassification", problem_type=problem, num_labels=3)
    ids = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    with torch.no_grad():
        alone = [
            torch.stack(
                [
                    model(ids[row : row + 1, at : at + 8], attention_mask=mask[row : row + 1, at : at + 8]).logits[0]
                    for at in range(0, 24, 8)
                    if mask[row, at]
                ]
            )
            for row in range(2)
        ]
        read_in_chunks_(model, 8)
        labels = torch.tensor([[0.0, 1, 0], [1, 1, 0]]) if problem.startswith("multi") else torch.tensor([2, 0])
        found = model(ids, attention_mask=mask, labels=labels)
    assert [len(part) for part in alone] == [3, 2]
    wanted = torch.stack([part.amax(0) if problem.startswith("multi") else part.mean(0) for part in alone])
    torch.testing.assert_close(found.logits, wanted)
    loss = (
        torch.nn.functional.binary_cross_entropy_with_logits
        if problem.startswith("multi")
        else torch.nn.functional.cross_entropy
    )
    torch.testing.assert_close(found.loss, loss(wanted, labels))


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForQuestionAnswering", "Model"])
def test_what_chunks_say_of_tokens_is_joined(head: str) -> None:
    model = tiny_model("Bert", head)
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [model(ids[:, at : at + 8]) for at in (0, 8)]
        read_in_chunks_(model, 8)
        found = model(ids)
        short = model(ids[:, :5])
    names = {"ForTokenClassification": ("logits",), "ForQuestionAnswering": ("start_logits", "end_logits")}
    for name in names.get(head, ("last_hidden_state",)):
        torch.testing.assert_close(found[name], torch.cat([part[name] for part in alone], 1))
        assert short[name].shape[1] == 5
    with pytest.raises(ValueError, match="no multiple of chunks of 8"):
        model(ids[:, :12])


def test_a_model_that_reads_chunks_is_saved_as_what_it_was(tmp_path: Path) -> None:
    model = tiny_model("Bert", "ForSequenceClassification")
    read_in_chunks_(model, 8)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is transformers.BertForSequenceClassification


def test_an_encoder_reads_chunks_and_a_decoder_all_of_them() -> None:
    config = transformers.BartConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(5, 60, (1, 16))
    with torch.no_grad():
        alone = torch.cat([model.get_encoder()(ids[:, at : at + 8]).last_hidden_state for at in (0, 8)], 1)
        wanted = model(encoder_outputs=(alone,), decoder_input_ids=ids[:, :4]).logits
        read_in_chunks_(model, 8)
        found = model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
    torch.testing.assert_close(found, wanted)


def test_batches_are_as_long_as_a_multiple_that_the_model_allows() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [1, 2, 3]}, {"input_ids": [5], "labels": [4]}]
    batch = pad(rows, 4, {"input_ids": 1, "labels": -100})
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [5, 1, 1, 1]]
    assert batch["labels"].tolist() == [[1, 2, 3, -100], [4, -100, -100, -100]]
    assert Reading(4096).multiple == 64
    # no position beyond the last
    assert Reading(100).multiple == 4
    assert Reading(4096, 512).multiple == 512


def test_texts_are_joined_into_rows_of_one_length(tokenizer: Any) -> None:
    found = packed(["the river", "a long page", "stone"], tokenizer, 6)
    assert [words(tokenizer, ids) for ids in found["input_ids"]] == [
        "<s> the river </s> <s> a",
        "long page </s> <s> stone </s>",
    ]
    assert found["document_ids"] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert found["attention_mask"] == [[1] * 6, [1] * 6]


def test_one_token_in_seven_is_masked_and_no_special_one(tokenizer: Any) -> None:
    ids = torch.randint(5, len(tokenizer), (100, 200), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    found, labels = masked(ids, tokenizer, torch.Generator().manual_seed(1))
    chosen = labels != -100
    assert not chosen[:, [0, -1]].any()
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(found[~chosen], ids[~chosen])
    assert (found[chosen] == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    again, _ = masked(ids, tokenizer, torch.Generator().manual_seed(1))
    assert torch.equal(found, again)


def test_a_text_file_is_a_document_and_a_few_are_chosen_whatever_their_order(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text(f"one line of {split}\n\nanother line\n")
    splits = read_splits(RecipeArguments("m", str(tmp_path), "o"), ("text",))
    assert splits["train"]["text"][:] == ["one line of train\n\nanother line\n"]
    held = [f"document {i}" for i in range(20)]
    one, other = (some_of(Dataset.from_dict({"text": texts}), 5, "text")["text"][:] for texts in (held, held[::-1]))
    assert sorted(one) == sorted(other)
    assert len(one) == 5


def test_the_likeliest_span_of_the_context_is_the_answer(tokenizer: Any) -> None:
    held = {
        "question": ["the stone"],
        "context": [TEXT],
        "answers": [{"text": ["long word"], "answer_start": [TEXT.index("long word")]}],
    }
    splits = {kind: Dataset.from_dict(held) for kind in ("train", "validation", "test")}
    task = Answering(splits, RecipeArguments("m", "d", "o"))
    rows = task.encode(splits["test"], "test", tokenizer, Reading(32))
    start, end = rows[0]["start_positions"], rows[0]["end_positions"]
    assert words(tokenizer, rows[0]["input_ids"][start : end + 1]) == "long word"
    marked = [token for token, mark in zip(rows[0]["input_ids"], rows[0]["global_attention_mask"], strict=True) if mark]
    assert words(tokenizer, marked) == "<s> the stone"
    logits = [torch.zeros(1, len(rows[0]["input_ids"])).numpy() for _ in range(2)]
    # larger on the question, which is no answer
    logits[0][0, 1] = logits[1][0, 2] = 9
    logits[0][0, start] = logits[1][0, end] = 5
    assert task.metrics(tuple(logits), None, "test") == {"exact_match": 1.0, "f1": 1.0}
    cut = task.encode(splits["test"], "validation", tokenizer, Reading(8, cuts=True))
    assert (cut[0]["start_positions"], cut[0]["end_positions"]) == (0, 0)


@pytest.mark.parametrize("tokens", [64, 65])
def test_an_answer_is_no_longer_than_64_tokens(tokenizer: Any, tokens: int) -> None:
    context = " ".join((TEXT.split() * 8)[1:81])
    wanted = "river" if tokens > 64 else " ".join(context.split()[:tokens])
    answers = [{"text": [wanted], "answer_start": [0]}]
    held = Dataset.from_dict({"question": ["the stone"], "context": [context], "answers": answers})
    splits = {"train": held, "test": held}
    task = Answering(splits, RecipeArguments("m", "d", "o"))
    (row,) = task.encode(splits["test"], "test", tokenizer, Reading(128))
    first = row["start_positions"]
    starts, ends = torch.zeros(2, 1, len(row["input_ids"])).numpy()
    starts[0, first], ends[0, first], ends[0, first + tokens - 1] = 9.0, 5.0, 9.0
    assert task.metrics((starts, ends), None, "test")["exact_match"] == 1.0


def test_a_query_of_several_documents_is_left_out(tokenizer: Any) -> None:
    held = {"text": [TEXT, "a page"], "query": [["the river", "every word"], ["the stone", "every word"]]}
    splits = {kind: Dataset.from_dict(held) for kind in ("train", "validation", "test")}
    task = Retrieval(splits, RecipeArguments("m", "d", "o"))
    rows = task.encode(splits["test"], "test", tokenizer, Reading(32))
    assert [len(ids) for ids in rows["query_input_ids"]] == [1, 1]
    batch = task.collate(list(rows), tokenizer, Reading(32))
    assert batch["owner"].tolist() == [0, 1]
    assert [words(tokenizer, ids) for ids in batch["query_input_ids"].tolist()] == [
        "<s> the river </s>",
        "<s> the stone </s>",
    ]
    vectors = torch.tensor([[[1.0, 0], [0.9, 0.1], [-100, -100]], [[0, 1.0], [0.9, 0.1], [0.1, 0.9]]]).numpy()
    found = task.metrics(vectors, torch.tensor([1, 2]).numpy(), "test")
    assert found["recall@1"] == pytest.approx(2 / 3)
    assert found["mrr"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_a_configuration_of_a_dataset_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def load(name: str, config: str | None, **_: Any) -> Any:
        asked_for.append((name, config))
        if config is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['en', 'de']")
        return {"train": Dataset.from_dict({"text": ["x"]})}

    monkeypatch.setattr(documents, "load_dataset", load)
    names = {"validation_split": "train2", "test_split": "train2"}
    with pytest.raises(RecipeError, match=r"\['en', 'de'\]; name one by --dataset_config"):
        read_splits(RecipeArguments("m", "org/things", "o"), ("text",))
    with pytest.raises(RecipeError, match="org/things has no split 'train2'; it has train"):
        read_splits(RecipeArguments("m", "org/things", "o", dataset_config="de", **names), ("text",))
    assert asked_for == [("org/things", None), ("org/things", "de")]


def test_layers_that_pass_nothing_on_are_said_before_anything_is_trained(checkpoints: Path, tmp_path: Path) -> None:
    tiny_of_type("stablelm", vocab_size=600).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(checkpoints / "dense").save_pretrained(tmp_path / "dense")
    dataset = write(tmp_path / "data", plain)
    pattern = hf_sparse.pattern("band", radius=8)
    for name, one in (("sparse", pattern), ("global", pattern | hf_sparse.pattern("global", positions=(0,)))):
        hf_sparse.convert(tmp_path / "dense", tmp_path / name, one, verify=False)
    held = arguments(tmp_path, dataset, tmp_path / "run", truncate=True, epochs=1.0)
    with pytest.raises(RecipeError, match=r"where documents of a joined row begin: .*; pass --packing false"):
        finetune("clm", held)
    assert not (tmp_path / "run").exists()
    (run,) = finetune("clm", dataclasses.replace(held, packing=False))["runs"]
    assert len(run["losses"]) == 4
    marked = dataclasses.replace(held, model=str(tmp_path / "global"), output=str(tmp_path / "marked"), packing=False)
    with pytest.raises(RecipeError, match="cannot be told which tokens are global"):
        finetune("clm", marked)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00002-of-00003.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.txt"],
    ],
)
def test_parts_that_are_missing_are_noticed(names: list[str], checkpoints: Path, tmp_path: Path) -> None:
    dataset = Path(write(tmp_path / "data", plain))
    for name in names:
        shutil.copy(dataset / "train.jsonl", dataset / name)
    (dataset / "train.jsonl").unlink()
    with pytest.raises(RecipeError, match="which are not all 2 parts of a split; fetch it again"):
        finetune("mlm", arguments(checkpoints, str(dataset), tmp_path / "run"))
