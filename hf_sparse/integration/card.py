"""The README of a sparse model: where it comes from, who reads whom, and how to load it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard
from yaml import YAMLError

from hf_sparse.drawing import drawing, write_picture
from hf_sparse.integration.entry import Entry
from hf_sparse.parts import Scope
from hf_sparse.patterns import PATTERNS

PICTURE = "sparse_attention.png"
LIBRARY = "hf_sparse"
# stands where nobody knows by what a checkpoint is loaded
SOMEWHERE = "path/to/this/checkpoint"
_START = "<!-- hf_sparse writes what follows, up to the next line of this kind -->"
_END = "<!-- end of hf_sparse -->"
# tokens a side of a picture, at most; of a drawing in text, characters
_MOST_DRAWN, _WIDTH = 1024, 66
# what stays true of a model whose attention or weights have changed
_LASTING = ("license", "license_name", "license_link", "language", "base_model")


@dataclass(frozen=True)
class Card:
    """What a README says of a sparse model.

    Attributes:
        entry: which pattern serves which layer.
        origin: where the model comes from and how far it reads, as Markdown.
        place: what it is loaded by: an id on the Hub or ``SOMEWHERE``.
        subfolder: of the transformer in it; "" for the top.
        base_model: id on the Hub of the model it was made from; None keeps what is said already.
        picture: who reads whom, as Markdown; "" leaves it out. See :func:`draw`.
        fidelity: how near the model stays to the dense one, as a table in Markdown; "" leaves it out.
        loads_by_code: whether it brings the code that registers its type.
        tags: more of them.
    """

    entry: Entry
    origin: str
    place: str = SOMEWHERE
    subfolder: str = ""
    base_model: str | None = None
    picture: str = ""
    fidelity: str = ""
    loads_by_code: bool = False
    tags: tuple[str, ...] = ()

    def text(self, held: str | None = None, *, source: str | None = None) -> str:
        """Return a README.

        Args:
            held: what it says already, front matter and all; a section of ours in it is written anew. None where there is none.
            source: README of the model that this one was made from, whose licence, language and base model hold on.
        """
        metadata, body = _split(held)
        lasting = {key: value for key, value in _split(source)[0].items() if key in _LASTING}
        metadata = self._metadata({**lasting, **metadata})
        before, start, rest = body.partition(_START)
        after = rest.partition(_END)[2] if start else ""
        parts = [before.rstrip(), f"{_START}\n{self._section()}\n{_END}", after.strip()]
        card = RepoCard("---\n{}\n---\n" + "\n\n".join(part for part in parts if part) + "\n")
        card.data = CardData(**metadata)
        return str(card)

    def _metadata(self, held: dict[str, Any]) -> dict[str, Any]:
        tags = held.get("tags") or []
        # patterns of an earlier card are written anew
        tags = [tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in PATTERNS]
        library = held.get("library_name")
        others = [library] if library not in (None, LIBRARY) else []
        more = ["sparse-attention", *_keys(self.entry.to_dict()), *others, *self.tags]
        base = {} if self.base_model is None else {"base_model": self.base_model}
        # transformers' name would have the Hub show a snippet that fails, since it does not import hf_sparse
        made = {**held, **base, "library_name": LIBRARY, "tags": list(dict.fromkeys([*tags, *more]))}
        # results of the dense model
        made.pop("model-index", None)
        return made

    def _section(self) -> str:
        load = [
            f"## Sparse attention\n\n{self.origin}\nIts attention follows `{json.dumps(self.entry.pattern.to_dict())}`."
        ]
        if self.entry.layers:
            load[0] += f"\nSome layers differ: `{json.dumps(self.entry.to_dict()['layers'])}`."
        load += [self.picture] if self.picture else []
        load += [f"### How near it stays to the dense model\n\n{self.fidelity.strip()}"] if self.fidelity else []
        subfolder = f', subfolder="{self.subfolder}"' if self.subfolder else ""
        load.append(
            f"""### How to load it

```python
import hf_sparse  # registers the sparse classes; without it the next line raises
from transformers import AutoModel

model = AutoModel.from_pretrained("{self.place}"{subfolder})
```"""
        )
        if self.loads_by_code:
            load.append("Where hf_sparse is installed, `trust_remote_code=True` does it without the import.")
        return "\n\n".join(load)


def draw(folder: Path, entry: Entry, *, length: int, heads: int, is_causal: bool) -> str:
    """Draw who reads whom for a README, and return that part of it.

    Args:
        folder: of the README; gets ``PICTURE`` where matplotlib is installed, else the drawing is text.
        entry: its pattern for all layers is drawn, on the first layer.
        length: longest input, in tokens; of a long one the first 1,024 are drawn.
        heads: of a layer.
        is_causal: whether a query reads only what comes before.

    Returns:
        Markdown; "" for a pattern that looks at the content, which has no picture.
    """
    pattern = entry.pattern
    if pattern.is_content_based:
        return ""
    # one head stands for all, but where the pattern names them
    scope = Scope(min(length, _MOST_DRAWN), heads if "by_head" in _names(pattern.to_dict()) else 1, is_causal=is_causal)
    said = f"Who reads whom among the first {scope.length} tokens: a row is a query, a column a key."
    if find_spec("matplotlib") is not None:
        write_picture(folder / PICTURE, pattern, scope)
        return f"![{said}]({PICTURE})"
    mask = pattern.mask(scope.length, heads=scope.heads, is_causal=is_causal)
    return "\n".join([said, "", "```text", *drawing(mask, width=_WIDTH), "```"])


def _split(text: str | None) -> tuple[dict[str, Any], str]:
    """Return a README's front matter and the rest; where the front matter cannot be read it is part of the rest."""
    if text is None or not re.match(r"\s*---\r?\n", text):
        return {}, text or ""
    try:
        card = RepoCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, YAMLError):
        return {}, text
    return card.data.to_dict(), card.text


def _keys(held: Any) -> list[str]:
    """Return the keys of the patterns that an entry, written out, is made of."""
    return [name for name in dict.fromkeys(_names(held)) if name not in ("union", "by_head")]


def _names(held: Any) -> Iterator[str]:
    for value in held.values() if isinstance(held, dict) else held if isinstance(held, list) else ():
        yield from _names(value)
    if isinstance(held, dict) and "key" in held:
        yield str(held["key"])
