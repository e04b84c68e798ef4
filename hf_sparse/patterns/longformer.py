"""Longformer: a window, and a few global tokens with projections of their own."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hf_sparse.parts import Globals, Part, Scope, Window
from hf_sparse.patterns.global_tokens import check_positions, check_positions_fit
from hf_sparse.patterns.parent import Pattern, check_count, check_switch
from hf_sparse.patterns.projections import GlobalProjections


@dataclass(frozen=True)
class Longformer(Pattern):
    """Every token reads ``window / 2`` tokens to each side (window + 1 keys) and the global tokens; those read all.

    Args:
        window: both sides together, in tokens, even, at least 2; one number, or one for each layer.
        global_tokens: logical positions of the global tokens when a call brings no ``global_mask``. Empty, as the bare
            in-tree ``LongformerModel``; task heads set their own (CLS, the question, ``<s>``).
        dilation: distance between neighbouring keys of the window, at least 1; one number, one for each head, or for each
            layer one or the other (the paper dilates two heads of the upper layers). The window then reaches ``dilation``
            times as far with as many keys.
        global_projections: whether the rows of global tokens use query, key and value projections of their own, which
            a conversion starts as copies. Without them, or without a ``state``, they use the layer's own.

    Source: Beltagy et al. 2020, arXiv:2004.05150, sections 3.1 and 3.2. As in the published code, global tokens are
    counted once where they also fall into the window. The published dilated kernel reaches ``window`` to each side; ours
    reaches ``window / 2`` with or without dilation.
    """

    key: ClassVar[str] = "longformer"
    window: int | tuple[int, ...] = 512
    global_tokens: tuple[int, ...] = ()
    dilation: int | tuple[int, ...] | tuple[int | tuple[int, ...], ...] = 1
    global_projections: bool = True

    def check_fields(self) -> None:
        object.__setattr__(self, "window", _one_or_many(self.window, "window", least=2))
        object.__setattr__(self, "dilation", _dilations(self.dilation))
        object.__setattr__(self, "global_tokens", check_positions(self.global_tokens, "global_tokens"))
        for window in self.window if isinstance(self.window, tuple) else (self.window,):
            if window % 2:
                raise ValueError(f"window must be even (half to each side), got {window}; try {window + 1}")
        check_switch(self.global_projections, "global_projections")

    @property
    def has_global_tokens(self) -> bool:
        return True

    @property
    def varies_by_layer(self) -> bool:
        return isinstance(self.window, tuple) or self._dilates_by_layer

    @property
    def _dilates_by_layer(self) -> bool:
        return isinstance(self.dilation, tuple) and any(isinstance(one, tuple) for one in self.dilation)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        if isinstance(self.window, tuple):
            if scope.layer >= len(self.window):
                raise ValueError(f"window has {len(self.window)} entries, one a layer, but this is layer {scope.layer}")
            reach = self.window[scope.layer] // 2
        else:
            reach = self.window // 2
        globals_ = Globals(positions=self.global_tokens, has_projections=self.global_projections)
        by_head: Any = self.dilation
        if self._dilates_by_layer:
            if scope.layer >= len(by_head):
                raise ValueError(f"dilation has {len(by_head)} entries, one a layer, but this is layer {scope.layer}")
            by_head = by_head[scope.layer]
        if isinstance(by_head, int):
            return (Window(before=reach, after=reach, dilation=by_head), globals_)
        last = scope.head_offset + scope.heads
        if last > len(by_head):
            raise ValueError(f"dilation has {len(by_head)} entries, one a head, but there are {last} heads")
        held = by_head[scope.head_offset : last]
        windows = [
            Window(
                heads=frozenset(head for head, own in enumerate(held) if own == dilation),
                before=reach,
                after=reach,
                dilation=dilation,
            )
            for dilation in sorted(set(held))
        ]
        return (*windows, globals_)

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        if isinstance(self.window, tuple) and len(self.window) != num_layers:
            raise ValueError(f"window has {len(self.window)} entries, one a layer, but the model has {num_layers}")
        by_layer: Any = self.dilation if self._dilates_by_layer else (self.dilation,)
        if self._dilates_by_layer and len(by_layer) != num_layers:
            raise ValueError(f"dilation has {len(by_layer)} entries, one a layer, but the model has {num_layers}")
        for by_head in by_layer:
            if isinstance(by_head, tuple) and len(by_head) != num_heads:
                raise ValueError(f"dilation has {len(by_head)} entries, one a head, but the model has {num_heads}")
        check_positions_fit(self.global_tokens, "global_tokens", length)

    def for_decoder(self) -> "Longformer":
        return Longformer(self.window, (), self.dilation, global_projections=False)

    def wide_open(self, length: int) -> "Longformer":
        return Longformer(2 * length, self.global_tokens, 1, self.global_projections)

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        if not self.global_projections:
            return None
        return GlobalProjections(hidden_size, num_heads, num_key_value_heads, head_dim)


def _one_or_many(value: Any, name: str, *, least: int) -> int | tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name} must be one number or a number for each, got none")
        for one in value:
            check_count(one, name, least=least)
        return tuple(value)
    check_count(value, name, least=least)
    return int(value)


def _dilations(value: Any) -> Any:
    """Return dilations: one, one for each head, or for each layer one or the other."""
    if isinstance(value, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in value):
        return tuple(_one_or_many(one, "dilation", least=1) for one in value)
    return _one_or_many(value, "dilation", least=1)
