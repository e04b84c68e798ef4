"""Star-Transformer: a ring of neighbours and relay nodes that connect all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.parts import Globals, Part, Patches, Scope, Window
from hf_sparse.patterns.parent import Pattern, check_count, check_switch
from hf_sparse.patterns.projections import RelayProjections


@dataclass(frozen=True)
class StarTransformer(Pattern):
    """Every token reads its neighbours in a ring and the relays, which are no tokens; every relay reads all.

    Causal: the ring is open, and relays read relays alone, through the layer's projections. A relay that reads the tokens would
    carry what comes to what was.

    Args:
        radius: neighbours to each side; at least 1.
        num_relays: relay nodes; at least 1.
        cyclic: whether the last token is a neighbour of the first.
        relay_projections: whether the rows of relays use query, key, value and output projections of their own, which a
            conversion starts as copies. Without them, or without a ``state``, they use the layer's own.

    Source: Guo et al. 2019, arXiv:1902.09113, section 3. There the relay reads what the tokens have become in the same layer;
    here all are updated together, so the relay is one layer behind. Tokens do not read their embedding a second time.
    """

    key: ClassVar[str] = "star"
    radius: int = 1
    num_relays: int = 1
    cyclic: bool = True
    relay_projections: bool = True

    def check_fields(self) -> None:
        check_count(self.radius, "radius", least=1)
        check_count(self.num_relays, "num_relays", least=1)
        check_switch(self.cyclic, "cyclic")
        check_switch(self.relay_projections, "relay_projections")

    def num_nodes(self, n: int) -> int:
        return self.num_relays

    @property
    def num_node_vectors(self) -> int:
        return self.num_relays

    def node_spans(self, n: int) -> Tensor:
        return torch.tensor([[0, n]]).expand(self.num_relays, -1)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        window = Window(before=self.radius, after=self.radius)
        ends: tuple[Part, ...] = ()
        if self.cyclic and not scope.is_causal:
            if scope.length <= 2 * self.radius + 1:
                window = Window()
            else:
                ends = (RingEnds(length=scope.length, radius=self.radius),)
        has_own = self.relay_projections and not scope.is_causal
        return (window, *ends, node_globals(scope, self.num_relays, has_projections=has_own))

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        if not self.relay_projections:
            return None
        return RelayProjections(hidden_size, num_heads, num_key_value_heads, head_dim)


@dataclass(frozen=True, eq=False, kw_only=True)
class RingEnds(Patches):
    """The neighbours over the ends of a ring that is longer than ``2 * radius``."""

    length: int
    radius: int

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q - k).abs() >= self.length - self.radius)[None]

    def patches(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, last = torch.arange(self.radius), torch.arange(self.length - self.radius, self.length)
        yield first, last
        yield last, first


def node_globals(scope: Scope, nodes: int, *, has_projections: bool = False) -> Globals:
    """Return nodes behind the tokens that read all and are read by all; if causal, they read one another alone."""
    positions = tuple(range(scope.length, scope.length + nodes))
    return Globals(
        positions=positions, is_replaceable=False, reads_all=not scope.is_causal, has_projections=has_projections
    )
