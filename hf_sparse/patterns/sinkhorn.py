"""Sparse Sinkhorn attention: blocks are sorted by content, and a query reads its own block and the one sorted to its place."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.patterns.content import Content, ContentPattern, block_means, block_sums, up_to_first
from hf_sparse.patterns.parent import Pattern, check_choice, check_count, check_switch
from hf_sparse.patterns.plain_linear import PlainLinear
from hf_sparse.slots import Assignment, Slots, cut


@dataclass(frozen=True)
class Sinkhorn(ContentPattern):
    """A query reads its own block, and in its place in the order of blocks a mixture of the other blocks.

    A matrix of blocks by blocks says how much of each goes where. Its rows and columns are brought to sums of 1 in turn, so
    that it comes near a permutation. Mixed are keys and values, place by place within the block. A token that the last block
    lacks is missing from the mixture.

    Causal: a place takes blocks before it alone, which only rows then share out, since sums of columns would know what comes;
    what a block asks for depends on tokens up to its first. A prefix gives what it gives alone. The first block has nothing
    but its own.

    Args:
        block_size: tokens of a block, at least 1.
        iterations: how often rows and columns are normalised, at least 1.
        temperature: what the scores of blocks are divided by, above 0; near 0 the mixture comes near a single block.
        sortcut: every query reads the first so many of the sorted blocks, at least 1, and nothing else; not causal. None reads
            the own block and the sorted one.
        hard: whether a place takes the whole of its strongest block, with the gradient of the mixture (straight-through).
        sort_net: "attention" scores blocks by the products of mean queries and mean keys; "learned" by two layers on the sums
            of hidden states, whose weights a checkpoint has to be trained for.
        max_blocks: blocks of the longest sequence, at least 1, for the learned one.

    Source: Tay et al. 2020, arXiv:2002.11296, sections 3 and 4. One softmax over both blocks. A block is not sorted to its own
    place, where it is read anyway. Gumbel noise is added in training only, from torch's global generator.
    """

    key: ClassVar[str] = "sinkhorn"
    block_size: int = 64
    iterations: int = 7
    temperature: float = 0.75
    sortcut: int | None = None
    hard: bool = False
    sort_net: str = "attention"
    max_blocks: int = 64

    def check_fields(self) -> None:
        for name in ("block_size", "iterations", "max_blocks"):
            check_count(getattr(self, name), name, least=1)
        if self.sortcut is not None:
            check_count(self.sortcut, "sortcut", least=1)
        check_switch(self.hard, "hard")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float):
            raise TypeError(f"temperature must be a number, got {self.temperature!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        check_choice(self.sort_net, "sort_net", ("attention", "learned"))

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        if self.sort_net == "learned" and length is not None and length > self.block_size * self.max_blocks:
            raise ValueError(
                f"max_blocks={self.max_blocks} of {self.block_size} tokens are less than the {length} tokens of the model; "
                f"raise it to {-(-length // self.block_size)}"
            )

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        return SortNet(hidden_size, num_heads, self.max_blocks) if self.sort_net == "learned" else None

    def extend(self, query: Tensor, key: Tensor, value: Tensor, content: Content) -> tuple[Tensor, Tensor]:
        tokens = query.shape[2]
        blocks = -(-tokens // self.block_size)
        if self.sortcut is not None and content.scope.is_causal:
            raise ValueError("sortcut reads blocks from anywhere, so it cannot be causal; set sortcut=None")
        if blocks == 1:
            return key, value
        ratio = query.shape[1] // key.shape[1]
        if ratio > 1:
            key, value = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
        mixing = self.mixing(query, key, content)
        content.held["mixing"] = mixing.detach()
        mixing = mixing[:, :, : self.sortcut]
        if self.hard and (content.takes_shares or not (torch.is_grad_enabled() and mixing.requires_grad)):
            content.held["shares"] = mixing
            return key, value
        content.held["is_mixed"] = torch.ones(())
        missing = blocks * self.block_size - tokens
        both = torch.cat([key, value], -1)
        held = nn.functional.pad(both, (0, 0, 0, missing)).unflatten(2, (blocks, self.block_size))
        mixed = _Strongest.apply(mixing, held) if self.hard else torch.einsum("bhij,bhjtd->bhitd", mixing, held)
        extended: Tensor = torch.cat([both, mixed.flatten(2, 3)], 2)
        key, value = extended.split([key.shape[3], value.shape[3]], -1)
        return key, value

    def choose(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        tokens, size = query.shape[2], self.block_size
        places = cut(torch.arange(tokens, device=query.device), size)
        blocks, lanes = len(places), query.shape[0] * query.shape[1]
        if blocks == 1:
            return self._everything(lanes, tokens, query.device)
        mixing = content.held["mixing"]
        wanted = mixing.argmax(-1).masked_fill(mixing.sum(-1) == 0, -1).flatten(0, 1)[:, : self.sortcut]
        taken = places[wanted.clamp(min=0)].masked_fill(wanted[..., None] < 0, -1)
        if self.hard and self.sortcut is not None:
            # several places may take the same block
            taken = _once(taken.flatten(1), tokens).view_as(taken)
        copies = None
        if "is_mixed" in content.held:
            slot = tokens + torch.arange(wanted.shape[1] * size, device=query.device).view(-1, size)
            if self.hard:
                copies = places[wanted.clamp(min=0)].clamp(min=0).flatten(1)
                taken = torch.where(taken >= 0, slot, -1)
            else:
                may = mixing.flatten(0, 1)[:, : self.sortcut] > 0
                held = (may[..., None] & (places >= 0)).any(2)
                taken = torch.where(held, slot, -1)
        lane = torch.arange(lanes, device=query.device)
        if self.sortcut is not None:
            keys = taken.flatten(1)
            whole = torch.arange(tokens, device=query.device).expand(lanes, -1)
            return Assignment((Slots(lane, whole, keys),), chosen=size, copies=copies)
        keys = torch.cat([taken, places.expand(lanes, -1, -1)], -1)
        queries = places.expand(lanes, -1, -1)
        slots = Slots(lane.repeat_interleave(blocks), queries.flatten(0, 1), keys.flatten(0, 1))
        return Assignment((slots,), chosen=size, copies=copies)

    def mixing(self, query: Tensor, key: Tensor, content: Content) -> Tensor:
        """Return how much of each block goes to each place, float ``[B, H, blocks, blocks]``, rows being places."""
        state, is_causal = content.state, content.scope.is_causal
        tokens, size = query.shape[2], self.block_size
        blocks = -(-tokens // size)
        if self.sort_net == "attention":
            asked = up_to_first(query, size) if is_causal else block_means(query, size)
            scores = torch.einsum("bhid,bhjd->bhij", asked, block_means(key, size)) / math.sqrt(query.shape[3])
        else:
            if not isinstance(state, SortNet) or content.hidden_states is None:
                raise ValueError("sort_net='learned' needs the state that make_state makes, and hidden_states")
            scores = state(content.hidden_states.to(query.dtype), size, is_causal=is_causal)
            scores = scores[:, content.scope.head_offset : content.scope.head_offset + query.shape[1]]
        scores = scores / self.temperature
        if content.is_training:
            uniform = torch.rand(scores.shape, dtype=scores.dtype).clamp(1e-9, 1 - 1e-9).to(scores.device)
            scores = scores - (-uniform.log()).log() / self.temperature
        barred = torch.eye(blocks, dtype=torch.bool, device=scores.device)
        if is_causal:
            barred = torch.ones_like(barred).triu()
        elif self.sortcut is not None:
            barred = torch.zeros_like(barred)
        return sinkhorn(scores.masked_fill(barred, float("-inf")), 0 if is_causal else self.iterations)

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        blocks = -(-n // self.block_size)
        read = (2 if blocks > 1 else 1) if self.sortcut is None else min(self.sortcut, blocks)
        pairs = min(1.0, read * self.block_size / n)
        return pairs * (0.75 if blocks > 1 else 0.5) if is_causal else pairs

    def wide_open(self, length: int) -> Pattern:
        return Sinkhorn(block_size=length)

    def _everything(self, lanes: int, tokens: int, device: torch.device) -> Assignment:
        every = torch.arange(tokens, device=device).expand(lanes, -1)
        return Assignment((Slots(torch.arange(lanes, device=device), every, every),))


class _Strongest(torch.autograd.Function):
    """The block of the largest share, with the gradient that a mixture by the shares would give them (straight-through)."""

    @staticmethod
    def forward(ctx: Any, mixing: Tensor, held: Tensor) -> Tensor:
        """Return blocks ``[B, H, places, T, D]`` for shares ``[B, H, places, blocks]`` and blocks ``[B, H, blocks, T, D]``."""
        first = torch.arange(0, held.shape[0] * held.shape[1] * held.shape[2], held.shape[2], device=held.device)
        at = (mixing.argmax(-1).flatten(0, 1) + first[:, None]).flatten()
        ctx.save_for_backward(held, at)
        # what stands where nothing is taken, at a first block under causality, is read by nobody
        return held.flatten(0, 2).index_select(0, at).unflatten(0, mixing.shape[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        held, at = ctx.saved_tensors
        (grad,) = grads
        of_mixing = torch.einsum("bhitd,bhjtd->bhij", grad, held)
        of_held = torch.zeros_like(held)
        of_held.view(-1, *held.shape[3:]).index_add_(0, at, grad.flatten(0, 2))
        return of_mixing, of_held


class SortNet(nn.Module):
    """Two layers that say, from the sum of a block's hidden states, to which places it asks to go.

    Args:
        hidden_size: width of the hidden states.
        heads: query heads of the layer.
        max_blocks: blocks of the longest sequence.

    Source: Tay et al. 2020, arXiv:2002.11296, section 3.1.
    """

    def __init__(self, hidden_size: int, heads: int, max_blocks: int) -> None:
        super().__init__()
        self.heads, self.max_blocks = heads, max_blocks
        self.inner = PlainLinear(hidden_size, hidden_size)
        self.outer = PlainLinear(hidden_size, heads * max_blocks)
        self.reset()

    def reset(self) -> None:
        """Start with no preference to speak of, the same in every process."""
        with torch.no_grad():
            for layer in (self.inner, self.outer):
                generator = torch.Generator().manual_seed(layer.weight.shape[0])
                drawn = torch.randn(layer.weight.shape, generator=generator, device="cpu", dtype=torch.float32)
                layer.weight.copy_(0.02 * drawn)
                layer.bias.zero_()

    def forward(self, hidden_states: Tensor, size: int, *, is_causal: bool) -> Tensor:
        """Return scores ``[B, H, blocks, blocks]``, rows being places, of hidden states ``[B, N, hidden_size]``.

        Raises:
            ValueError: if there are more than ``max_blocks`` blocks.
        """
        blocks = -(-hidden_states.shape[1] // size)
        if blocks > self.max_blocks:
            raise ValueError(f"{blocks} blocks are more than max_blocks={self.max_blocks} of the learned sort_net")
        pooled = hidden_states.cumsum(1)[:, ::size] if is_causal else block_sums(hidden_states, size)
        scores = self.outer(self.inner(pooled).relu()).unflatten(-1, (self.heads, self.max_blocks))
        return scores[..., :blocks].transpose(1, 2)


def sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Return nearly doubly stochastic matrices.

    Args:
        scores: float ``[..., N, N]``, -inf where there may be nothing.
        iterations: how often rows and columns are normalised in turn; 0 normalises rows alone, once.

    Returns:
        ``[..., N, N]``, at least 0; a row of nothing but -inf is 0.

    Source: Sinkhorn 1964, in log space as in Mena et al. 2018, arXiv:1802.08665.
    """
    is_barred = scores == float("-inf")
    # finite, so that nothing becomes a difference of infinities; what is barred is set to 0 in the end
    held = scores.masked_fill(is_barred, 0.0)

    def normalized(held: Tensor, dim: int) -> Tensor:
        top = held.masked_fill(is_barred, float("-inf"))
        is_empty = is_barred.all(dim, keepdim=True)
        return held - top.masked_fill(is_empty, 0.0).logsumexp(dim, keepdim=True)

    for _ in range(max(iterations, 1)):
        held = normalized(held, -1)
        if iterations:
            held = normalized(held, -2)
    return held.exp().masked_fill(is_barred, 0.0)


def _once(keys: Tensor, tokens: int) -> Tensor:
    """Return places ``[X, S]`` with each at most once, those that come again as -1."""
    ordered, order = torch.where(keys < 0, tokens, keys).sort(dim=1, stable=True)
    again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0)) | (ordered == tokens)
    return torch.empty_like(keys).scatter_(1, order, ordered.masked_fill(again, -1))
