"""Names of weights: how a checkpoint spells those of a class."""

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter


class Spelling:
    """How a checkpoint spells the names of a model's weights.

    transformers reads weights under older names than the class has, and with or without the prefix of the base model.

    Attributes:
        stored: maps names of today, with or without the prefix, to those in the checkpoint.
        cut: names of today whose weights are parts of one that is stored whole, or are made of several.
    """

    def __init__(self, stored: Iterable[str], renamings: tuple[Any, ...], prefix: str) -> None:
        self.stored: dict[str, str] = {}
        self.cut: set[str] = set()
        self._renamings = renamings
        self._prefix = prefix
        for name in stored:
            self._read(name)

    def _read(self, stored: str) -> None:
        name = stored
        for renaming in self._renamings:
            if not isinstance(renaming, WeightConverter):
                name, _ = renaming.rename_source_key(name)
        for converter in self._renamings:
            if isinstance(converter, WeightConverter):
                renamed, matched = converter.rename_source_key(name)
                if matched is not None:
                    first, *others = converter.target_patterns
                    names = [renamed, *(renamed.replace(first, other) for other in others)]
                    self.cut.update(names)
                    self.stored.update(dict.fromkeys(names, stored))
                    return
        self.stored[name] = stored

    def find(self, name: str) -> str | None:
        """Return the name of today by which a weight of the class is held: with the prefix, without, or as it is."""
        spellings = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((spelling for spelling in spellings if spelling in self.stored), None)

    def spell(self, new: str, *, like: str) -> str:
        """Return the name that the checkpoint would give a weight which is not in it, beside one that is.

        Args:
            new: name in the class.
            like: name in the class of a weight that :meth:`find` finds.
        """
        found = self.find(like)
        if found != like:
            is_longer = found == self._prefix + like
            new = self._prefix + new if is_longer else new.removeprefix(self._prefix)
        if found is None or self.stored[found] == found:
            return new
        for renaming in reversed(self._renamings):
            if renaming.was_used() and not isinstance(renaming, WeightConverter):
                new, _ = renaming.reverse_transform().rename_source_key(new)
        return new


def renamings_of(model: Any) -> tuple[Any, ...]:
    """Return what transformers renames as it loads a model, in its order."""
    return tuple(get_model_conversion_mapping(model))
