"""What every pattern has to pass."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns import Pattern, pattern_from_json
from tests.support.rules import Rule, draw, from_rows

Combine = Callable[[Pattern, Pattern], Pattern]
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A mask drawn by hand.

    Attributes:
        fields: of the pattern.
        rows: one string a query: ``x`` reads, ``.`` does not; a space sets nodes apart.
        tokens: how many of the rows are tokens; None: all.
        is_causal: whether it is the causal mask.
        layer: index of the layer.
    """

    fields: dict[str, Any]
    rows: tuple[str, ...]
    tokens: int | None = None
    is_causal: bool = False
    layer: int = 0

    @property
    def n(self) -> int:
        """The number of tokens."""
        return len(self.rows) if self.tokens is None else self.tokens

    @property
    def mask(self) -> Tensor:
        """The rows as bool ``[1, n + m, n + m]``."""
        return from_rows(*(row.replace(" ", "") for row in self.rows))


def lengths(block: int, *, longest: int = 65) -> tuple[int, ...]:
    """Return the lengths at which masks are compared: the edges of a block, and the usual ones."""
    return tuple(sorted({1, 2, max(1, block - 1), block, block + 1, 7, longest}))


def check_drawn_by_hand(pattern: Pattern, *rows: str, is_causal: bool = False, layer: int = 0) -> None:
    """Compare the mask of one head with rows of ``x`` (reads) and ``.``."""
    drawn = pattern.mask(len(rows), is_causal=is_causal, layer=layer)
    assert torch.equal(drawn, from_rows(*rows)), drawn.int()


def check_drawing(key: str, drawing: Drawing) -> None:
    """Compare mask, density and number of nodes with a drawing."""
    pattern = hf_sparse.pattern(key, **drawing.fields)
    check_table(pattern, drawing.mask, drawing.n, layer=drawing.layer, is_causal=drawing.is_causal)


def check_table(
    pattern: Pattern, wanted: Tensor, n: int, *, heads: int | None = None, layer: int = 0, is_causal: bool = False
) -> None:
    """Compare mask, density and number of nodes with a table; nodes are the rows and columns behind the tokens.

    Args:
        pattern: what is tried.
        wanted: bool ``[heads, n + m, n + m]``, or of one head where all heads are alike.
        n: tokens.
        heads: heads to ask for; None: those of the table.
        layer: index of the layer.
        is_causal: whether to ask for the causal mask.
    """
    heads = heads or wanted.shape[0]
    wanted = wanted.expand(heads, -1, -1)
    settings: dict[str, Any] = {"heads": heads, "layer": layer, "is_causal": is_causal}
    assert pattern.num_nodes(n) == wanted.shape[1] - n, f"{n} tokens"
    drawn = pattern.mask(n, **settings)
    assert drawn.dtype == torch.bool
    assert torch.equal(drawn, wanted), f"{n} tokens, {settings}"
    assert pattern.density(n, **settings) == int(wanted.sum()) / (heads * n * n), f"{n} tokens, {settings}"


def check_no_leak(pattern: Pattern, n: int) -> None:
    """However many layers, over tokens and nodes, a causal pattern brings nothing of a token to an earlier one."""
    step = pattern.mask(n, is_causal=True)[0].double() + torch.eye(n + pattern.num_nodes(n), dtype=torch.float64)
    reached = step
    # each round doubles the layers
    for _ in range(n.bit_length() + 1):
        reached = ((reached @ reached) > 0).double()
    assert not reached[:n, :n].triu(1).any()


def check_mask(
    pattern: Pattern, rule: Rule, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False
) -> None:
    """Compare mask and density with a rule asked about every pair."""
    wanted: Tensor = draw(rule, n, heads=heads, is_causal=is_causal)
    settings: dict[str, Any] = {"heads": heads, "layer": layer, "is_causal": is_causal}
    assert torch.equal(pattern.mask(n, **settings), wanted), f"{n} tokens, {settings}"
    assert pattern.density(n, **settings) == float(wanted.double().mean()), f"{n} tokens, {settings}"


def check_fields(key: str, defaults: dict[str, Any]) -> None:
    """Compare key, class name registry, field names, their order and their defaults."""
    pattern = hf_sparse.pattern(key)
    assert type(pattern) is hf_sparse.PATTERNS[key]
    assert pattern.key == key
    assert list(pattern.to_dict().items()) == [("key", key), *defaults.items()]


def check_round_trip(pattern: Pattern) -> None:
    """A pattern survives JSON, equal and of equal hash, and pickle and copies, which other processes make."""
    again = hf_sparse.pattern_from_dict(json.loads(json.dumps(pattern.to_dict())))
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert again.to_dict() == pattern.to_dict()
    assert pattern_from_json(pattern.json) == pattern
    assert pickle.loads(pickle.dumps(pattern)) == copy.deepcopy(pattern) == pattern


def check_unknown_field(key: str, known: str) -> None:
    """An unknown field is refused with the known ones."""
    message = f"pattern '{key}' has no field 'widht'; known: {known}"
    with pytest.raises(ValueError, match=message):
        hf_sparse.pattern(key, widht=3)
    with pytest.raises(ValueError, match=message):
        hf_sparse.pattern_from_dict({"key": key, "widht": 3})


def check_count_field(key: str, field: str, *, least: int) -> None:
    """A field that counts refuses what is below its least value and what is no whole number."""
    assert hf_sparse.pattern(key, **{field: least}).to_dict()[field] == least
    for bad in (least - 1, -7):
        with pytest.raises(ValueError, match=f"{field} must be at least {least}, got {bad}"):
            hf_sparse.pattern(key, **{field: bad})
    for wrong in (2.0, "2", None, True):
        with pytest.raises(TypeError, match=f"{field} must be a whole number, got {wrong!r}"):
            hf_sparse.pattern(key, **{field: wrong})


def check_bad_values(key: str, field: str, *bad: Any, **others: Any) -> None:
    """A field refuses values that are below its least or not among its choices, and names itself."""
    for value in bad:
        with pytest.raises(ValueError, match=f"{field} must be"):
            hf_sparse.pattern(key, **{field: value}, **others)


def check_wrong_kinds(key: str, field: str, *wrong: Any) -> None:
    """A field refuses what is of the wrong kind, and names itself."""
    for value in wrong:
        with pytest.raises(TypeError, match=f"{field} must be"):
            hf_sparse.pattern(key, **{field: value})


def check_fits_model(pattern: Pattern, block: int) -> None:
    """A block larger than a model's longest input is refused; without a length it is not looked at."""
    pattern.check(num_layers=2, num_heads=4, length=block)
    pattern.check(num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=f"block_size {block} is larger than the model's maximum length {block - 1}"):
        pattern.check(num_layers=2, num_heads=4, length=block - 1)
