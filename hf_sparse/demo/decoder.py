"""A decoder trained on a book, converted, and read at its own length and at eight times that; writes docs/decoders.md.

    python -m hf_sparse.demo.decoder --book war_and_peace.txt.gz --models DIR

The dense model stays in DIR and is not trained again.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_sparse
from hf_sparse.integration.rotary import METHODS
from hf_sparse.recipes.results import replace_part, surroundings

LENGTH, FACTOR = 256, 8
VOCABULARY, BATCH, STEPS, RATE, WARM = 2048, 16, 900, 1.5e-3, 50
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# what a query reads is no farther away than in training; the first token beside, as Xiao et al. 2023, arXiv:2309.17453, keep it
PATTERNS = {
    "sparse, band": hf_sparse.pattern("band", radius=LENGTH - 1),
    "sparse, band and first token": hf_sparse.pattern("band", radius=LENGTH - 1)
    | hf_sparse.pattern("global", positions=(0,)),
}
# shares of the book, from its beginning
TRAINED, JUDGED_FROM = 0.9, 0.92
BEGIN, END = "*** START OF", "*** END OF"
PAGE = Path(hf_sparse.__file__).parents[1] / "docs" / "decoders.md"
PART = (
    "<!-- table: `python -m hf_sparse.demo.decoder` writes what follows, up to the next line of this kind -->",
    "<!-- end of table -->",
)


def main() -> None:
    """Train what is not there, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--book", required=True, type=Path, help="A plain text in UTF-8, gzipped.")
    parser.add_argument("--models", required=True, type=Path, help="Folder for checkpoints; may hold them.")
    held = parser.parse_args()
    text = _read_book(held.book)
    trained, judged = text[: int(len(text) * TRAINED)], text[int(len(text) * JUDGED_FROM) :]
    dense = held.models / "dense"
    if not (dense / "training.json").is_file():
        _train(trained, dense)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(dense)
    ids = torch.tensor(tokenizer(judged, verbose=False)["input_ids"])
    rows = {"dense": _row(AutoModelForCausalLM.from_pretrained(dense), ids, (LENGTH,))}
    for method in METHODS:
        for name, pattern in PATTERNS.items():
            folder = held.models / f"{method}-{'first' if 'first' in name else 'band'}"
            hf_sparse.convert(
                dense, folder, pattern, max_length=LENGTH * FACTOR, positions=method, overwrite=True, verify=False
            )
            if name == next(iter(PATTERNS)):
                # sdpa reads all pairs with the positions of the converted checkpoint
                model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
                rows[f"dense | {method}"] = _row(model, ids, (LENGTH, LENGTH * FACTOR))
            rows[f"{name} | {method}"] = _row(
                AutoModelForCausalLM.from_pretrained(folder), ids, (LENGTH, LENGTH * FACTOR)
            )
    training = json.loads((dense / "training.json").read_text(encoding="utf-8"))
    replace_part(PAGE, *PART, _lines(rows, training, len(ids)))


def _read_book(path: Path) -> str:
    """Return the text of a book without what Project Gutenberg says before and behind it."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8").replace("\r\n", "\n")
    start = text.index("\n", text.index(BEGIN)) if BEGIN in text else 0
    return text[start : text.index(END) if END in text else None].strip()


def _train(text: str, folder: Path) -> None:
    """Train a tokenizer and a small Llama, and save both."""
    tokenizer = _tokenizer(text)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _share_of_rate)
    losses, started = [], time.perf_counter()
    for _ in track(range(STEPS), "Training", console=Console(stderr=True), transient=True):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held = {
        "parameters": model.num_parameters(),
        "tokens": len(ids),
        "first": sum(losses[:20]) / 20,
        "last": sum(losses[-20:]) / 20,
        "seconds": time.perf_counter() - started,
        **surroundings(use_cpu=True),
    }
    (folder / "training.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    held = Tokenizer(models.BPE())
    held.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    held.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    held.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=held, eos_token="<|end|>", bos_token="<|end|>")


def _share_of_rate(step: int) -> float:
    """Return what the learning rate is multiplied by: it rises, and falls along a cosine to a tenth."""
    if step < WARM:
        return (step + 1) / WARM
    return 0.55 + 0.45 * math.cos(math.pi * (step - WARM) / (STEPS - WARM))


@torch.no_grad()
def _row(model: Any, ids: Tensor, lengths: tuple[int, ...]) -> list[float]:
    """Return the perplexity of tokens read in pieces of each length, and at the longest of the last eighth of each piece."""
    model.eval()
    found, last = [], math.nan
    # the same tokens at each length
    ids = ids[: len(ids) // (LENGTH * FACTOR) * LENGTH * FACTOR]
    for length in lengths:
        losses = torch.cat([_losses(model, piece[None]) for piece in ids.split(length)])
        found.append(float(losses.mean().exp()))
        last = float(losses[:, -length // FACTOR :].mean().exp())
    return [*found, last] if len(lengths) > 1 else found


def _losses(model: Any, piece: Tensor) -> Tensor:
    """Return the loss of every token of a piece but its first, float ``[1, N - 1]``."""
    logits = model(input_ids=piece, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2).float(), piece[:, 1:], reduction="none")


def _lines(rows: dict[str, list[float]], training: dict[str, Any], tokens: int) -> list[str]:
    long = LENGTH * FACTOR
    lines = [
        f"| model | `--positions` | {LENGTH} tokens | {long:,} tokens | of these the last {long // FACTOR} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in rows.items():
        cells = [f"{value:,.2f}" for value in values] + ["-"] * (3 - len(values))
        lines.append(f"| {name if '|' in name else f'{name} | as trained'} | {' | '.join(cells)} |")
    return [
        f"A Llama of {training['parameters'] / 1e6:.1f} million parameters ({CONFIG['num_hidden_layers']} layers of width "
        f"{CONFIG['hidden_size']}, {CONFIG['num_attention_heads']} heads, {CONFIG['num_key_value_heads']} of keys and values; "
        f"byte-level BPE of {VOCABULARY:,} tokens), trained on the first {TRAINED:.0%} of War and Peace "
        f"({training['tokens']:,} tokens) for {STEPS} steps of {BATCH} pieces of {LENGTH} tokens, in "
        f"{training['seconds']:,.0f} s: loss {training['first']:.2f} in the first 20 steps, {training['last']:.2f} in the last "
        f"20. Perplexity on the last {1 - JUDGED_FROM:.0%} ({tokens:,} tokens), in pieces of each length; sparse rows read "
        f"at most {LENGTH} tokens back. Device {training['device']}, {training['threads']} threads, torch "
        f"{training['versions']['torch']}.",
        "",
        *lines,
        "",
        "Command: `python -m hf_sparse.demo.decoder --book war_and_peace.txt.gz --models DIR`.",
        "",
    ]


if __name__ == "__main__":
    main()
