"""Pushing a sparse model: its weights, and a card that says what it reads and how to load it."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_sparse.errors import PushError, UnsupportedModelError
from hf_sparse.integration.card import Card, draw
from hf_sparse.integration.density import layer_of, mean_density
from hf_sparse.integration.entry import read_entry
from hf_sparse.integration.families import family_of
from hf_sparse.integration.hub import clean_token, push_folder, said_by_hub
from hf_sparse.integration.layers import self_attention_modules, tag_of

_README = "README.md"
# tokens that are drawn of a model whose limit is not known
_UNKNOWN_LENGTH = 512


def push_model(
    model: Any, repository: str, *, max_shard_size: int | str, tags: Sequence[str], **settings: Any
) -> CommitInfo:
    """Push a sparse model, with its card.

    Args:
        model: what to push.
        repository: id of the model on the Hub.
        max_shard_size: of a weights file, as for ``save_pretrained``.
        tags: more of them for the card.
        settings: of ``push_folder``.

    Raises:
        PushError: if the Hub cannot be reached or refuses.
    """
    origin, token = model.config._name_or_path, clean_token(settings.get("token"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        # what stands there already; else what came along with a local checkpoint
        held = readme_of(repository, token) or (readme_of(origin) if Path(origin).is_dir() else None)
        card, source = model_card(model, folder, place=repository, tags=tags), readme_of(origin, token)
        if source is None:
            # a folder that is gone looks like an id
            card = dataclasses.replace(card, base_model=None)
        (folder / _README).write_text(card.text(held, source=source), encoding="utf-8")
        return push_folder(folder, repository, **settings)


def model_card(model: Any, folder: Path, *, place: str, tags: Sequence[str] = ()) -> Card:
    """Return what the README of a sparse model is to say, and draw its picture.

    Args:
        model: what it is of.
        folder: of the README; gets the picture.
        place: id on the Hub that it goes to.
        tags: more of them.
    """
    config, entry = model.config, read_entry(model.config)
    found = [
        (layer_of(stack, at, module, config), tag_of(module)) for stack, at, _, module in self_attention_modules(model)
    ]
    name = (config.architectures or [type(model).__name__])[0]
    said = f"This `{name}` is a `{config.dense_model_type}` model with sparse attention, made with `hf_sparse`."
    length = _length_of(config)
    if length is not None:
        density = mean_density(((layer, tag.pattern) for layer, tag in found if tag is not None), length)
        said += f"\nIt reads up to {length:,} tokens, and of all pairs at that length {density:.2%}."
    first, origin = found[0][0], config._name_or_path
    return Card(
        entry=entry,
        origin=said,
        place=place,
        base_model=origin if origin and origin != place and not Path(origin).exists() else None,
        tags=tuple(tags),
        picture=draw(folder, entry, length=length or _UNKNOWN_LENGTH, heads=first.heads, is_causal=first.is_causal),
    )


def readme_of(place: str, token: str | bool | None = None) -> str | None:
    """Return the README of a checkpoint; None where there is none, or no such checkpoint for this token.

    Args:
        place: a folder, or an id on the Hub.
        token: for the Hub; None takes the one that was logged in with.

    Raises:
        PushError: if the Hub does not tell.
    """
    path = Path(place, _README)
    if not place or Path(place).is_dir():
        return path.read_text(encoding="utf-8") if place and path.is_file() else None
    try:
        return Path(hf_hub_download(place, _README, token=token)).read_text(encoding="utf-8")
    except Exception as error:
        is_unknown = isinstance(error, (EntryNotFoundError, RepositoryNotFoundError, HFValidationError))
        if is_unknown and not isinstance(error, LocalEntryNotFoundError):
            return None
        # begun anew, the card would take the place of one that could not be seen
        raise PushError(f"{place} could not be read from {constants.ENDPOINT}: {said_by_hub(error)}") from None


def _length_of(config: Any) -> int | None:
    try:
        return int(family_of(config).length(config))
    except UnsupportedModelError:
        return None
