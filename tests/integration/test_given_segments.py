"""Models whose nodes stand for segments that come with the call: sentences, packed documents, and the columns of a dataset."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, BertTokenizerFast

import hf_sparse
from tests.support.models import tiny_batch, tiny_model

N, ROOM = 40, 6
GIVEN = hf_sparse.pattern(
    "etc", radius=3, num_global=ROOM, segments="given", hard_global_to_long=True, max_relative_distance=2
)
FAMILIES = ("Bert", "Roberta", "Camembert", "XLMRoberta", "DistilBert", "Electra")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "!", "?", "...", "one", "two", "##s", ",", "\uff1f")


def sparse(family: str = "Bert", head: str = "Model", pattern: hf_sparse.Pattern = GIVEN) -> Any:
    """Return a tiny sparse model whose nodes' vector and labels are away from 0."""
    model: Any = hf_sparse.sparsify_(tiny_model(family, head), pattern).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sparse_" in name:
                parameter.normal_()
    return model


def batch_of(tokens: int = N) -> dict[str, Tensor]:
    """Return a batch whose first row has five segments and the second, which is padded, three; the first token is in none."""
    segments = torch.stack([torch.arange(tokens) // 8, torch.arange(tokens) // 13])
    segments[:, 0] = -1
    return {**tiny_batch(tokens), "segment_ids": segments}


def said(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_alone_and_in_a_batch_give_the_same(family: str) -> None:
    model, batch = sparse(family), batch_of()
    together = said(model, **batch)
    assert together.shape[:2] == (2, N)
    real = batch["attention_mask"][1] != 0
    alone = said(model, input_ids=batch["input_ids"][1:, real], segment_ids=batch["segment_ids"][1:, real])
    assert torch.allclose(together[1][real], alone[0], atol=1e-5)
    # segments count: one for the whole text is another model
    merged = said(model, **{**batch, "segment_ids": torch.zeros(2, N, dtype=torch.int64)})
    assert not torch.allclose(together, merged, atol=1e-2)


@pytest.mark.parametrize("name", ["document_ids", "position_ids"])
def test_packed_documents_give_what_they_give_alone(name: str) -> None:
    model, batch = sparse(), batch_of()
    lengths = (17, 23)
    positions = torch.cat([torch.arange(size) for size in lengths]).expand(2, -1)
    documents = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).expand(2, -1)
    held: dict[str, Tensor] = {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"]}
    told = {"position_ids": positions, **({"document_ids": documents} if name == "document_ids" else {})}
    packed = said(model, **held, **told)
    start = 0
    for size in lengths:
        alone = said(model, **{key: value[:, start : start + size] for key, value in held.items()})
        assert torch.allclose(packed[:, start : start + size], alone, atol=1e-5)
        start += size


def test_a_checkpoint_keeps_what_it_needs_and_trainer_keeps_the_column(tmp_path: Path) -> None:
    model, batch = sparse("Roberta", "ForMaskedLM"), batch_of()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(said(loaded, **batch), said(model, **batch))
    assert {"segment_ids", "document_ids", "global_attention_mask"} <= set(inspect.signature(loaded.forward).parameters)


def test_a_dense_checkpoint_converts_and_reads_segments(tmp_path: Path) -> None:
    tiny_model("Bert", "ForMaskedLM").save_pretrained(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", GIVEN, max_length=256)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse").eval()
    assert said(model, **batch_of()).isfinite().all()


def test_a_compiled_model_is_one_graph() -> None:
    model, batch = sparse(), batch_of()
    positions = torch.cat([torch.arange(17), torch.arange(23)]).expand(2, -1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for more in ({}, {"position_ids": positions}):
        assert torch.equal(said(compiled, **batch, **more), said(model, **batch, **more))
    torch._dynamo.reset()


def test_what_is_missing_or_does_not_fit_is_said() -> None:
    model, batch = sparse(), batch_of()
    segments = batch.pop("segment_ids")
    with pytest.raises(ValueError, match=r"needs segment_ids \[batch, tokens\] with each call"):
        said(model, **batch)
    for bad in (segments[:, 1:], segments[:1], torch.cat([segments, segments])):
        said_shape = re.escape(f"segment_ids must have shape [2, 40], got {list(bad.shape)}")
        with pytest.raises(ValueError, match=said_shape):
            said(model, **batch, segment_ids=bad)
    for name in ("attention_mask", "document_ids"):
        ones = torch.ones(1, N, dtype=torch.int64)
        with pytest.raises(ValueError, match=re.escape(f"{name} must have shape [2, 40], got [1, 40]")):
            said(model, **{**batch, "segment_ids": segments, name: ones})
    with pytest.raises(ValueError, match="start as means of tokens, and there are none"):
        said(model, inputs_embeds=torch.zeros(2, 0, 32), segment_ids=segments[:, :0])
    with pytest.raises(ValueError, match="row 0 has 40 segments, and the pattern has room for num_global=6"):
        said(model, **batch, segment_ids=torch.arange(N).expand(2, -1))
    with pytest.raises(ValueError, match=r"segment_ids must be a tensor \[batch, tokens\]"):
        said(model, **batch, segment_ids=[0] * N)
    band = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("band", radius=3))
    with pytest.raises(
        ValueError, match="segment_ids were given, but the nodes of pattern 'band' stand for no segments"
    ):
        said(band, **batch, segment_ids=segments)


def test_nodes_are_kept_on_request_with_their_gradients() -> None:
    model, batch = sparse("Bert", "ForMaskedLM"), batch_of()
    with hf_sparse.keep_nodes(model) as kept:
        first = model(**batch).logits
        model(**batch)
        with pytest.raises(ValueError, match="being kept already"), hf_sparse.keep_nodes(model):
            pass
    assert [tuple(nodes.shape) for nodes in kept] == [(2, ROOM, 32)] * 2
    # a sum over a layer norm would have no gradient
    kept[0][0, 3, 0].backward()
    assert model.bert.sparse_nodes.weight.grad.any()
    assert torch.equal(said(model, **batch), first)
    assert len(kept) == 2
    with (
        pytest.raises(ValueError, match="BertModel has no nodes that live through its layers"),
        hf_sparse.keep_nodes(tiny_model("Bert")),
    ):
        pass


def test_a_node_is_that_of_its_segment() -> None:
    model = sparse("Bert")
    model.encoder.layer = model.encoder.layer[:1]
    batch = batch_of()
    with hf_sparse.keep_nodes(model) as kept:
        said(model, **batch)
        other = batch["input_ids"].clone()
        other[0, 25] += 1  # of the fourth segment, tokens 24 to 31
        said(model, **{**batch, "input_ids": other})
    # the others see it change through the fourth node alone, and then it is its own: all move, but it moves most
    moved = (kept[0] - kept[1])[0].norm(dim=-1)
    assert int(moved.argmax()) == 3
    assert not (kept[0] - kept[1])[1].any()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(str(path))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[CLS] one two . two ! ? one [SEP] [PAD]", [-1, 0, 0, 0, 1, 1, 1, 2, -1, -1]),
        ("[CLS] one [SEP] two one [SEP]", [-1, 0, -1, 1, 1, -1]),
        ("one ##s , [MASK] [UNK] ... two", [0, 0, 0, 0, 0, 0, 1]),
        (". . one . [SEP] . two", [0, 0, 1, 1, -1, 2, 3]),
        ("[PAD] [PAD]", [-1, -1]),
        ("one \uff1f two", [0, 0, 1]),
    ],
)
def test_sentences_end_where_they_are_seen_to(tokenizer: BertTokenizerFast, text: str, wanted: list[int]) -> None:
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(text.split())])
    assert hf_sparse.sentence_ids(ids, tokenizer).tolist() == [wanted]


def test_neighbouring_sentences_are_joined_where_there_is_no_room(tokenizer: BertTokenizerFast) -> None:
    rows = ["one . " * 5 + "[PAD] [PAD]", "one . " * 2 + "[PAD] " * 8, "[PAD] " * 12]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(row.split()) for row in rows])
    found = hf_sparse.sentence_ids(ids, tokenizer, most=3)
    assert found.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1], [0, 0, 1, 1] + [-1] * 8, [-1] * 12]
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        hf_sparse.sentence_ids(ids, tokenizer, most=0)
    with pytest.raises(ValueError, match=r"must be an integer tensor \[batch, tokens\], got torch.float32"):
        hf_sparse.sentence_ids(ids.float(), tokenizer)
    with pytest.raises(ValueError, match="must be an integer tensor"):
        hf_sparse.sentence_ids(ids[0], tokenizer)
    with pytest.raises(ValueError, match="must be from 0 to 13, the ids of the tokenizer"):
        hf_sparse.sentence_ids(ids - 100, tokenizer)


def test_words_of_other_vocabularies_end_sentences_too() -> None:
    class Marked:
        all_special_ids, mask_token_id, unk_token_id = [0], None, None

        def __len__(self) -> int:
            return 6

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [("<s>", "\u0120one", "\u0120.", "\u2581!", "\u3002", "\u0120")[i] for i in ids]

    ids = torch.tensor([[0, 1, 2, 1, 3, 1, 4, 1, 5, 1]])
    assert hf_sparse.sentence_ids(ids, Marked()).tolist() == [[-1, 0, 0, 1, 1, 2, 2, 3, 3, 3]]  # type: ignore[arg-type]


def test_auto_model_of_a_given_checkpoint_says_what_it_needs(tmp_path: Path) -> None:
    sparse("Bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"hf_sparse\.sentence_ids"):
        said(AutoModel.from_pretrained(tmp_path), **tiny_batch(N))
