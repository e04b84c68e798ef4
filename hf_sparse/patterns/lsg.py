"""LSG: local blocks, sparse tokens beyond them chosen head by head, and global tokens with embeddings of their own."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.patterns.bigbird import BigBird
from hf_sparse.patterns.content import Content, ContentPattern, block_means
from hf_sparse.patterns.etc import even_spans
from hf_sparse.patterns.parent import Pattern, check_choice, check_count, check_switch
from hf_sparse.slots import Assignment, Slots


@dataclass(frozen=True)
class LSG(ContentPattern):
    """Every block reads itself and its two neighbours, beyond them a thinned part of the text, and the global tokens.

    Of ``sparsity_factor`` tokens one is kept. A block reads ``sparse_block_size`` of those kept on each side of the three
    blocks. Global tokens are nodes that read all tokens and one another; they start as learned vectors, which only a checkpoint
    of LSG has: from another one they start at 0.

    Args:
        block_size: tokens of a block; at least 1.
        sparse_block_size: kept tokens that a block reads on each side; at least 1.
        sparsity_factor: of how many tokens one is kept; divides ``block_size``.
        sparsity_type: which are kept. "norm": in each chunk of the smaller of both block sizes those whose keys have the
            largest norms. "pooling": means of keys and values of ``sparsity_factor`` tokens. "stride": each
            ``sparsity_factor``-th token, heads beginning one after the other. "block_stride": consecutive tokens of each block,
            other ones on the next head. "none": no token.
        num_global_tokens: global tokens; at least 1.
        pool_with_global: whether the first token leaves the encoder as the first global token; where a decoder reads global
            tokens it does not.
        pass_global_tokens_to_decoder: whether a decoder beside the encoder reads the global tokens too.

    Source: Condevaux and Harispe 2022, arXiv:2210.15497, and ccdv-ai/convert_checkpoint_to_lsg. Left out are "lsh", which draws
    hashes anew in each pass, "bos_pooling", which reads padding, and ``mask_first_token``. Blocks are counted from
    the first real token; there padding on the left and holes in a mask take places in them. A mean is that of its tokens,
    without the 1e-6 added to their number there.
    """

    key: ClassVar[str] = "lsg"
    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str = "norm"
    num_global_tokens: int = 1
    pool_with_global: bool = True
    pass_global_tokens_to_decoder: bool = True

    def check_fields(self) -> None:
        for name in ("block_size", "sparse_block_size", "sparsity_factor", "num_global_tokens"):
            check_count(getattr(self, name), name, least=1)
        check_choice(self.sparsity_type, "sparsity_type", ("none", "norm", "pooling", "stride", "block_stride"))
        for name in ("pool_with_global", "pass_global_tokens_to_decoder"):
            check_switch(getattr(self, name), name)
        if self.sparsity_type != "none":
            self._check_sizes()

    def _check_sizes(self) -> None:
        """Check that blocks, chunks and what is kept of them fit together, as published code needs it or goes astray."""
        kept, rest = divmod(self.block_size, self.sparsity_factor)
        if rest:
            raise ValueError(
                f"sparsity_factor must divide block_size, got {self.sparsity_factor} and {self.block_size}"
            )
        if 4 * self.sparse_block_size < 3 * kept:
            raise ValueError(
                f"sparse_block_size must be at least three quarters of the {kept} tokens kept of a block, got "
                f"{self.sparse_block_size}"
            )
        chunk = min(self.block_size, self.sparse_block_size)
        of_chunk = max(chunk // self.sparsity_factor, 1)
        if (self.sparsity_type, self.sparsity_factor > 1) == ("norm", True) and (
            chunk % self.sparsity_factor or self.block_size % chunk or self.sparse_block_size % of_chunk
        ):
            raise ValueError(
                "under 'norm' whole chunks of the smaller of block_size and sparse_block_size have to be read; got "
                f"{self.block_size} and {self.sparse_block_size} with sparsity_factor {self.sparsity_factor}"
            )

    @property
    def always(self) -> Pattern:
        return BigBird(self.block_size, num_random_blocks=0, num_external_global=self.num_global_tokens)

    def num_nodes(self, n: int) -> int:
        return self.num_global_tokens

    @property
    def num_node_vectors(self) -> int:
        return self.num_global_tokens

    def node_spans(self, n: int) -> Tensor:
        return even_spans(n, self.num_global_tokens)

    @property
    def nodes_start_as_means(self) -> bool:
        return False

    @property
    def first_node_is_pooled(self) -> bool:
        return self.pool_with_global

    @property
    def decoder_reads_nodes(self) -> bool:
        return self.pass_global_tokens_to_decoder

    def wide_open(self, length: int) -> "LSG":
        raise ValueError("tokens read global tokens with embeddings of their own, which a dense source has not")

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        sparse = 0 if self.sparsity_type == "none" else 2 * self.sparse_block_size
        return min(1.0, (3 * self.block_size + sparse + 2 * self.num_global_tokens) / n)

    def extend(self, query: Tensor, key: Tensor, value: Tensor, content: Content) -> tuple[Tensor, Tensor]:
        if content.scope.is_causal:
            raise ValueError("pattern 'lsg' has global tokens that read all, so it cannot be causal")
        if self.sparsity_type != "pooling" or self.sparsity_factor == 1:
            return key, value
        tokens = key.shape[2] - self.num_global_tokens
        both = torch.cat([key, value], -1)
        means = block_means(both[:, :, :tokens], self.sparsity_factor)
        extended: Tensor = torch.cat([both, means], 2)
        key, value = extended.split([key.shape[3], value.shape[3]], -1)
        return key, value

    def choose(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        rows, heads, total = query.shape[:3]
        tokens, size = total - self.num_global_tokens, self.block_size
        blocks, lanes = -(-tokens // size), rows * heads
        device = query.device
        place = torch.arange(blocks * size, device=device).view(blocks, size)
        place = place.masked_fill(place >= tokens, -1)
        kept = self._kept(key[:, :, :tokens], content, total).flatten(0, 1)
        if not kept.shape[1]:
            kept = torch.full((lanes, 1), -1, device=device)
        # of one block, and those that a block reads on each side, counted from the first kept of its own
        step = size // self.sparsity_factor
        side = torch.arange(self.sparse_block_size, device=device)
        window = torch.cat([side - step - self.sparse_block_size, side + 2 * step])
        wanted = torch.arange(blocks, device=device)[:, None] * step + window
        is_there = (wanted >= 0) & (wanted < kept.shape[1])
        keys = kept[:, wanted.clamp(0, kept.shape[1] - 1)].masked_fill(~is_there, -1)
        lane = torch.arange(lanes, device=device).repeat_interleave(blocks)
        slots = Slots(lane, place.expand(lanes, -1, -1).flatten(0, 1), keys.flatten(0, 1))
        return Assignment((slots,))

    def _kept(self, key: Tensor, content: Content, total: int) -> Tensor:
        """Return the places of what is kept of the tokens, in order of their chunks, int64 ``[B, H, R]``; -1 holds none."""
        rows, heads, tokens = key.shape[:3]
        factor = self.sparsity_factor
        if self.sparsity_type == "none":
            return torch.empty(rows, heads, 0, dtype=torch.int64, device=key.device)
        if factor == 1:
            return torch.arange(tokens, device=key.device).expand(rows, heads, -1)
        groups = torch.arange(-(-tokens // factor), device=key.device)
        if self.sparsity_type == "pooling":
            return (total + groups).expand(rows, heads, -1)
        if self.sparsity_type == "norm":
            return self._largest(key)
        head = torch.arange(heads, device=key.device)[:, None] + content.scope.head_offset
        if self.sparsity_type == "stride":
            found = groups * factor + head % factor
        else:
            of_block = self.block_size // factor
            block = torch.arange(-(-tokens // self.block_size), device=key.device)[:, None] * self.block_size
            inside = (torch.arange(of_block, device=key.device) + head * of_block) % self.block_size
            found = (block + inside[:, None]).flatten(1)
        return found.masked_fill(found >= tokens, -1).expand(rows, -1, -1)

    def _largest(self, key: Tensor) -> Tensor:
        """Return the places of the keys with the largest norms of each chunk, int64 ``[B, H, R]``."""
        chunk = min(self.block_size, self.sparse_block_size)
        norms = key.norm(dim=-1)
        missing = -norms.shape[2] % chunk
        norms = nn.functional.pad(norms, (0, missing), value=-1.0).unflatten(2, (-1, chunk))
        value, index = norms.topk(chunk // self.sparsity_factor, dim=-1)
        first = torch.arange(norms.shape[2], device=key.device)[:, None] * chunk
        return (index + first).masked_fill(value < 0, -1).flatten(2)
