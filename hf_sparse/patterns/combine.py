"""Patterns made of patterns: unions, and different patterns on different heads."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_sparse.parts import Part, Scope
from hf_sparse.patterns.parent import Pattern, check_count
from hf_sparse.patterns.projections import GlobalProjections


@dataclass(frozen=True)
class _Combination(Pattern):
    """What unions and patterns by head share: they ask their members."""

    @property
    def members(self) -> tuple[Pattern, ...]:
        raise NotImplementedError

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        if not self.is_content_based:
            return super().density(n, heads=heads, layer=layer, is_causal=is_causal)
        return self._at_most([member.density(n, layer=layer, is_causal=is_causal) for member in self.members], heads)

    def _at_most(self, densities: list[float], heads: int) -> float:
        """Return the density of the whole, at most, from those of the members."""
        raise NotImplementedError

    @property
    def is_content_based(self) -> bool:  # type: ignore[override]
        return any(member.is_content_based for member in self.members)

    @property
    def has_lse(self) -> bool:
        return all(member.has_lse for member in self.members)

    @property
    def has_global_tokens(self) -> bool:
        return any(member.has_global_tokens for member in self.members)

    @property
    def reads_padding(self) -> bool:
        return any(member.reads_padding for member in self.members)

    @property
    def varies_by_layer(self) -> bool:
        return any(member.varies_by_layer for member in self.members)

    def on_grid(self, prefix: int, height: int, width: int) -> Pattern:
        return dataclasses.replace(
            self,
            patterns=tuple(member.on_grid(prefix, height, width) for member in self.members),  # type: ignore[call-arg]
        )

    def for_decoder(self) -> Pattern:
        return dataclasses.replace(self, patterns=tuple(member.for_decoder() for member in self.members))  # type: ignore[call-arg]

    def num_nodes(self, n: int) -> int:
        return max(member.num_nodes(n) for member in self.members)

    @property
    def takes_segments(self) -> bool:
        return any(member.takes_segments for member in self.members)

    def node_spans(self, n: int) -> Tensor:
        return next(member for member in self.members if member.has_nodes).node_spans(n)

    @property
    def num_node_vectors(self) -> int:
        return max(member.num_node_vectors for member in self.members if member.has_nodes)

    def added_scores(self, n: int) -> tuple[Tensor, Tensor] | None:
        # else there are others
        return self.members[0].added_scores(n) if len(self.members) == 1 else None

    @property
    def num_labels(self) -> int:
        return max(member.num_labels for member in self.members)

    def label(self, q: Tensor, k: Tensor, scope: Scope) -> Tensor:
        return next(member for member in self.members if member.num_labels).label(q, k, scope)

    @property
    def pools_nodes(self) -> bool:
        return any(member.pools_nodes for member in self.members)

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        for member in self.members:
            member.check(num_layers=num_layers, num_heads=num_heads, length=length)

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        states = [
            member.make_state(
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_key_value_heads=num_key_value_heads,
                head_dim=head_dim,
            )
            for member in self.members
        ]
        owned = [state for state in states if state is not None]
        if self.is_content_based and any(isinstance(state, GlobalProjections) for state in owned):
            raise ValueError(
                "projections of global tokens or relays are not read beside a content-based pattern; set "
                "global_projections=False or relay_projections=False"
            )
        if len(owned) > 1:
            raise ValueError(
                "at most one member of a combination may own weights on a layer; set global_projections=False, "
                "relay_projections=False or max_relative_distance=0 on the others"
            )
        return owned[0] if owned else None

    def _check_one_length(self) -> None:
        if len({member.reads_padding for member in self.members}) > 1:
            raise ValueError("patterns laid over the real and over the padded length cannot be combined")
        if sum(member.has_nodes for member in self.members) > 1:
            raise ValueError("at most one member of a combination may have nodes that are no tokens")
        if self.is_content_based and any(member.has_nodes for member in self.members):
            raise ValueError("content-based patterns are not served beside nodes that are no tokens")
        if len(self.members) > 1 and any(member.added_scores(1) is not None for member in self.members):
            raise ValueError("a pattern that counts some keys more than once cannot be combined with others")


@dataclass(frozen=True)
class Union(_Combination):
    """A pair is an edge if it is one in any member; it counts once.

    Args:
        patterns: the members, at least one.
    """

    key: ClassVar[str] = "union"
    patterns: tuple[Pattern, ...] = ()

    def check_fields(self) -> None:
        flat: list[Pattern] = []
        for pattern in self.patterns:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"a union is made of patterns, got {pattern!r}")
            flat += pattern.patterns if isinstance(pattern, Union) else (pattern,)
        if not flat:
            raise ValueError("a union needs at least one pattern")
        object.__setattr__(self, "patterns", tuple(flat))
        self._check_one_length()

    @property
    def members(self) -> tuple[Pattern, ...]:
        return self.patterns

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return tuple(part for member in self.patterns for part in member.parts(scope))

    def _at_most(self, densities: list[float], heads: int) -> float:
        return min(1.0, sum(densities))

    def wide_open(self, length: int) -> "Union":
        opened, errors = [], []
        for member in self.patterns:
            try:
                opened.append(member.wide_open(length))
            except ValueError as error:
                opened.append(member)
                errors.append(error)
        if len(errors) == len(self.patterns):
            raise errors[0]
        return Union(tuple(opened))

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "patterns": [member.to_dict() for member in self.patterns]}


@dataclass(frozen=True)
class ByHead(_Combination):
    """Different patterns on different heads.

    Args:
        heads: the heads of each member; together 0 ... H - 1, each once.
        patterns: the members, in the same order.
    """

    key: ClassVar[str] = "by_head"
    heads: tuple[tuple[int, ...], ...] = ()
    patterns: tuple[Pattern, ...] = ()

    def check_fields(self) -> None:
        object.__setattr__(self, "heads", tuple(tuple(group) for group in self.heads))
        object.__setattr__(self, "patterns", tuple(self.patterns))
        for head in (head for group in self.heads for head in group):
            check_count(head, "a head", least=0)
        for pattern in self.patterns:
            if not isinstance(pattern, Pattern):
                raise TypeError(f"by_head maps heads to patterns, got {pattern!r}")
        named = sorted(head for group in self.heads for head in group)
        if not named or named != list(range(len(named))) or len(self.heads) != len(self.patterns):
            raise ValueError(f"by_head must name each head from 0 on exactly once, got heads {named}")
        if self.num_labels:
            raise ValueError("by_head takes no pattern with labels, which all heads have; set max_relative_distance=0")
        self._check_one_length()

    @property
    def members(self) -> tuple[Pattern, ...]:
        return self.patterns

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        last = scope.head_offset + scope.heads
        named = sum(map(len, self.heads))
        if last > named:
            raise ValueError(f"by_head names {named} heads, but there are {last}")
        parts: list[Part] = []
        for group, member in zip(self.heads, self.patterns, strict=True):
            held = frozenset(head - scope.head_offset for head in group if scope.head_offset <= head < last)
            for part in member.parts(scope) if held else ():
                heads = held if part.heads is None else held & part.heads
                parts.append(dataclasses.replace(part, heads=heads))
        return tuple(parts)

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        super().check(num_layers=num_layers, num_heads=num_heads, length=length)
        named = sum(map(len, self.heads))
        if named != num_heads:
            raise ValueError(f"by_head names {named} heads, but the model has {num_heads}")

    def _at_most(self, densities: list[float], heads: int) -> float:
        shares = [sum(head < heads for head in group) for group in self.heads]
        return sum(share * one for share, one in zip(shares, densities, strict=True)) / heads

    def wide_open(self, length: int) -> "ByHead":
        return ByHead(self.heads, tuple(member.wide_open(length) for member in self.patterns))

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "heads": [list(group) for group in self.heads],
            "patterns": [member.to_dict() for member in self.patterns],
        }


def by_head(patterns: Mapping[int | Iterable[int], Pattern]) -> ByHead:
    """Return different patterns on different heads.

    Args:
        patterns: maps a head or a range of heads to a pattern; together the keys name each head once.

    Raises:
        ValueError: if a head is named twice or left out.
    """
    heads = tuple((group,) if isinstance(group, int) else tuple(group) for group in patterns)
    return ByHead(heads, tuple(patterns.values()))
