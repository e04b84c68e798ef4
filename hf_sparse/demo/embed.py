"""One row of the demo in a process of its own: load a model, embed documents and queries, measure time and memory."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import hf_sparse
from hf_sparse.demo.corpus import read_corpus

CHUNK = 512


def embed(model: Any, ids: Sequence[int], special: tuple[int, int]) -> Tensor:
    """Return the mean-pooled, normalised embedding ``[D]`` of a text between its special tokens."""
    row = torch.tensor([[special[0], *ids, special[1]]])
    hidden = model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)


def embed_document(model: Any, ids: Sequence[int], special: tuple[int, int], how: str) -> Tensor:
    """Embed a document: "truncated" to 512 tokens, as the mean over "chunks" of 512, or "whole"."""
    room = CHUNK - 2
    if how == "truncated":
        return embed(model, ids[:room], special)
    if how == "chunks":
        chunks = [embed(model, ids[start : start + room], special) for start in range(0, len(ids), room)]
        return torch.nn.functional.normalize(torch.stack(chunks).mean(0), dim=0)
    return embed(model, ids, special)


def main(path: str) -> None:
    """Do what a job file says: ``{"model", "how", "attention", "pattern", "split", "out"}``, and write ``out``."""
    job = json.loads(Path(path).read_text())
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    corpus = read_corpus(tokenizer)
    attention = {"attn_implementation": job["attention"]} if job["attention"] else {}
    model = AutoModel.from_pretrained(job["model"], **attention).eval()
    if job["pattern"]:
        hf_sparse.sparsify_(model, hf_sparse.pattern_from_dict(job["pattern"]))
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    torch.set_grad_enabled(False)
    start = time.perf_counter()
    documents = []
    for done, ids in enumerate(corpus.documents, 1):
        documents.append(embed_document(model, ids, special, job["how"]))
        print(done, flush=True)
    seconds = time.perf_counter() - start
    queries = torch.stack([embed(model, ids, special) for _, ids in getattr(corpus, job["split"])])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    result = {"documents": torch.stack(documents), "queries": queries, "seconds": seconds, "peak_mib": peak}
    torch.save(result, job["out"])
