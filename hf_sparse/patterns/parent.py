"""What every pattern is: a frozen dataclass under a key, with a rule, serialisation and checks."""

import dataclasses
import json
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.parts import Part, Scope, edge_mask
from hf_sparse.plan import make_plan


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Who may read whom. Subclasses are frozen dataclasses whose fields are hyper-parameters under the field's names.

    A position-based pattern answers :meth:`parts`; everything else follows from that.
    """

    key: ClassVar[str]
    # whether its edges depend on queries and keys
    is_content_based: ClassVar[bool] = False
    # the pattern as one line of JSON; set on each instance, no field
    json: ClassVar[str]

    def __post_init__(self) -> None:
        self.check_fields()
        # made once and kept: compiled graphs take the pattern as this string, and cannot trace its making
        object.__setattr__(self, "json", json.dumps(self.to_dict(), sort_keys=True))

    def check_fields(self) -> None:
        """Check the fields, and bring them into their one form (sequences become tuples).

        Raises:
            ValueError: if a value is bad.
            TypeError: if a value is of the wrong kind.
        """

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        """Return the parts whose union is this pattern, for one layer and one length."""
        raise NotImplementedError

    @property
    def has_lse(self) -> bool:
        """Whether all keys of a query share one softmax, so that there is a logsumexp."""
        return True

    @property
    def has_global_tokens(self) -> bool:
        """Whether a ``global_mask`` means something to this pattern."""
        return False

    def num_nodes(self, n: int) -> int:
        """Return how many nodes that are no tokens stand behind ``n`` tokens; never fewer for more tokens."""
        return 0

    @property
    def takes_segments(self) -> bool:
        """Whether each call says which tokens a node stands for; ``num_nodes`` is then what a row has room for."""
        return False

    def nodes_of(self, n: int, spans: tuple[tuple[int, int], ...] | None) -> int:
        """Return how many nodes a sequence of ``n`` tokens has, whose call names ``spans``."""
        return self.num_nodes(n) if spans is None else len(spans)

    def node_spans(self, n: int) -> Tensor:
        """Return the tokens whose mean each node starts as: first and behind the last, int64 ``[nodes, 2]``."""
        raise NotImplementedError

    @property
    def num_node_vectors(self) -> int:
        """Return how many learned vectors nodes have; node j has the vector j modulo that."""
        return 1

    @property
    def nodes_start_as_means(self) -> bool:
        """Whether a node starts as the mean of some tokens and a learned vector, and not as the vector alone."""
        return True

    @property
    def first_node_is_pooled(self) -> bool:
        """Whether the first token leaves the last layer as the first node."""
        return False

    @property
    def pools_nodes(self) -> bool:
        """Whether nodes are made on each layer from keys and values, and are no part of the sequence given."""
        return False

    @property
    def has_nodes(self) -> bool:
        """Whether nodes that are no tokens stand behind the tokens."""
        return self.num_nodes(2) > 0

    @property
    def has_lasting_nodes(self) -> bool:
        """Whether its nodes live through all layers of a model."""
        return self.has_nodes and not self.pools_nodes

    @property
    def decoder_reads_nodes(self) -> bool:
        """Whether a decoder beside the encoder reads what became of the encoder's nodes too."""
        return False

    def num_tokens(self, total: int) -> int:
        """Return of how many positions, tokens and nodes together, how many are tokens; the inverse of ``num_nodes``.

        Raises:
            ValueError: if no number of tokens with its nodes gives that many.
        """
        if not self.has_nodes or not total:
            return total
        least, most = 1, total
        while least < most:
            middle = (least + most) // 2
            least, most = (least, middle) if middle + self.num_nodes(middle) >= total else (middle + 1, most)
        if least + self.num_nodes(least) != total:
            raise ValueError(
                f"pattern {self.key!r} has nodes behind the tokens, and {total} positions are no number of tokens with its "
                f"nodes; {least} tokens have {self.num_nodes(least)}"
            )
        return least

    @property
    def reads_padding(self) -> bool:
        """Whether the padded length, not the real one, shapes the pattern."""
        return False

    @property
    def varies_by_layer(self) -> bool:
        """Whether layers of one model get different parts."""
        return False

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        """Check that the pattern fits a model.

        Args:
            num_layers: self-attention layers of the stack.
            num_heads: query heads of a layer.
            length: the longest input of the model, in tokens; None skips checks against it.

        Raises:
            ValueError: if it does not fit.
        """

    @property
    def num_labels(self) -> int:
        """How many kinds of pairs have a learned score of their own; 0 where there are none."""
        return 0

    def label(self, q: Tensor, k: Tensor, scope: Scope) -> Tensor:
        """Return the kind of each pair, for patterns with labels; of two tokens it depends on the distance alone.

        Args:
            q: int64, logical query positions.
            k: int64, logical key positions, broadcastable with ``q``.
            scope: of the sequence.

        Returns:
            int64 ``[*broadcast(q, k)]``, below ``num_labels``; for pairs that are no edges any of them.
        """
        raise NotImplementedError

    def added_scores(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Return what is added to the scores of ``n`` tokens: a column for queries and one for keys, whose product it is.

        Returns:
            float64 ``[n]`` each; None where nothing is added.
        """
        return None

    def on_grid(self, prefix: int, height: int, width: int) -> "Pattern":
        """Return the pattern with what it leaves open about a grid of pixels filled in.

        Args:
            prefix: tokens before the first pixel.
            height: rows of the grid.
            width: columns of the grid.

        Raises:
            ValueError: if the pattern is for another grid.
        """
        return self

    def for_decoder(self) -> "Pattern":
        """Return the pattern for a decoder that stands beside an encoder: global tokens are the encoder's alone."""
        return self

    def wide_open(self, length: int) -> "Pattern":
        """Return the same system with settings under which every token reads every token.

        Args:
            length: tokens of the longest sequence.

        Raises:
            ValueError: if no setting of this system does that.
        """
        raise ValueError(f"pattern {self.key!r} has no setting under which every token reads every token")

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        """Return a new module with the weights this pattern owns on each layer, or None where it owns none."""
        return None

    def mask(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> Tensor:
        """Draw the pattern, for looking and testing.

        Args:
            n: tokens, at least 1.
            heads: number of heads, at least 1.
            layer: index of the layer.
            is_causal: whether keys ahead of the query are left out.

        Returns:
            bool ``[heads, n, n]``, or ``[heads, n + m, n + m]`` for a pattern with m nodes behind the tokens; True where the
            query (row) reads the key (column).
        """
        if n < 1 or heads < 1:
            raise ValueError(f"n and heads must be at least 1, got n={n}, heads={heads}")
        scope = Scope(n, heads, layer, is_causal, nodes=self.num_nodes(n))
        position = torch.arange(scope.total)
        return edge_mask(
            self.parts(scope),
            position[:, None],
            position[None, :],
            heads=heads,
            is_causal=is_causal,
            tokens=n if scope.nodes else None,
        )

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        """Return the number of edges over ``n**2``, each edge once, averaged over heads; edges of nodes count as well.

        Counted from the plan, in time and memory of the blocks read: no mask of n x n is made.
        """
        scope = Scope(n, heads, layer, is_causal, nodes=self.num_nodes(n))
        return make_plan(self.parts(scope), scope).count_edges() / (heads * n * n)

    def to_dict(self) -> dict[str, Any]:
        """Return the pattern as plain JSON values; the inverse of ``pattern_from_dict``."""
        fields = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"key": self.key, **fields}

    def __or__(self, other: "Pattern") -> "Pattern":
        from hf_sparse.patterns.combine import Union

        if not isinstance(other, Pattern):
            return NotImplemented
        return Union((self, other))


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_count(value: Any, name: str, *, least: int) -> None:
    """Check a field that counts something.

    Raises:
        TypeError: if the value is no int.
        ValueError: if it is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(value: Any, name: str, known: tuple[str, ...]) -> None:
    """Check a field that has one of a few values.

    Raises:
        ValueError: if the value is none of them.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def check_switch(value: Any, name: str) -> None:
    """Check a field that is on or off.

    Raises:
        TypeError: if the value is no bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")


def check_seed(value: Any) -> None:
    """Check a seed.

    Raises:
        TypeError: if the value is no int.
        ValueError: if it is below 0 or does not fit into 63 bits.
    """
    check_count(value, "seed", least=0)
    if value >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {value}")
