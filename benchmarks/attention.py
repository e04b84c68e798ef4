"""Attention alone: every pattern beside dense attention and the peers that take query, key and value."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hf_sparse
from hf_sparse.backends.flex_blocks import cached_layout
from hf_sparse.backends.flex_tags import serves
from hf_sparse.backends.plans import PLANS, cached_plan
from hf_sparse.benchmarks.timing import Cell
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern, parts_of
from hf_sparse.segments import Segment

HEADS, WIDTH = 12, 64
DROPOUT = 0.1
FORWARD, BOTH = "forward", "forward+backward"
DENSE = "dense SDPA"
# the longest length of patterns with dropout
MOST_WITH_DROPOUT = {
    ("cpu", "quick"): 1024,
    ("cpu", "full"): 16384,
    ("cuda", "quick"): 16384,
    ("cuda", "full"): 1048576,
}
# the longest lengths that dense attention is run for: forward, forward and backward, with dropout
DENSE_LIMITS = {
    ("cpu", "quick"): (4096, 4096, 1024),
    ("cpu", "full"): (32768, 16384, 4096),
    ("cuda", "quick"): (16384, 16384, 16384),
    ("cuda", "full"): (131072, 131072, 131072),
}


def patterns_at(n: int) -> dict[str, Pattern]:
    """Return the patterns that are timed at a length, by the name of their row."""
    make = hf_sparse.pattern
    stride = round(n**0.5)
    width = grid_width(n)
    return {
        "longformer, window 512 + CLS": make("longformer", window=512, global_tokens=(0,)),
        "bigbird, block 64, 3 random": make("bigbird", block_size=64, num_random_blocks=3),
        "band, radius 256": make("band", radius=256),
        "dilated, radius 64, dilation 4": make("dilated", radius=64, dilation=4),
        "strided, stride sqrt(N)": make("strided", stride=stride),
        "block_local, block 512": make("block_local", block_size=512),
        "global, 16 tokens": make("global", positions=tuple(range(16))),
        "random, block 64, 3 random": make("random", block_size=64, num_random_blocks=3),
        "star, radius 1, 1 relay": make("star"),
        "etc, radius 84, 256 nodes": make("etc", radius=84, num_global=256),
        "bigbird, block 64, no random, 256 nodes": make("bigbird", num_random_blocks=0, num_external_global=256),
        "sparse_transformer, strided, stride sqrt(N)": make(
            "sparse_transformer", kind="strided", stride=stride, summary=8
        ),
        "sparse_transformer, fixed, stride sqrt(N), summary 8": make("sparse_transformer", stride=stride, summary=8),
        "bp_transformer, 4 nodes a level": make("bp_transformer", nodes_per_level=4),
        "image_1d, block 256, memory 256": make("image_1d", block_size=256, memory=256),
        "image_2d, block 8 x 16, rim 8 x 16, squarest grid": make("image_2d", width=width),
        "axial, rows of the squarest grid": make("axial", width=width, axis="row"),
        "axial, columns of the squarest grid": make("axial", width=width, axis="column"),
        "routing, sqrt(N) clusters": make("routing", num_clusters=stride),
        "reformer, chunk 64, 2 hashes": make("reformer", num_hashes=2),
        "reformer, shared keys, chunk 64, 1 hash": make("reformer", num_hashes=1, shared_query_key=True),
        "sinkhorn, block 256, hard": make("sinkhorn", block_size=256, hard=True),
        "sac, block 64, 128 edges, radius 64": make("sac"),
    }


def grid_width(n: int) -> int:
    """Return the columns of the squarest grid of ``n`` pixels, at least as many as there are rows."""
    return n // next(rows for rows in range(int(n**0.5), 0, -1) if n % rows == 0)


def positions_of(pattern: Pattern | None, n: int) -> int:
    """Return the tokens and nodes of a call."""
    return n if pattern is None else n + pattern.num_nodes(n)


def tensors_at(n: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value ``[1, H, n, D]``, and a gradient of the output; float32 on the CPU, bfloat16 on CUDA."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    *leaves, grad = (
        torch.randn(1, HEADS, n, WIDTH, generator=generator).to(device=device, dtype=dtype) for _ in range(4)
    )
    return [leaf.requires_grad_() for leaf in leaves], grad


def state_of(pattern: Pattern | None, n: int, device: str) -> dict[str, Any]:
    """Return what attention is given beside tensors where a pattern picks by hidden states: its weights, and these."""
    if pattern is None or pattern.key != "sac":
        return {}
    width = HEADS * WIDTH
    state = pattern.make_state(hidden_size=width, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    hidden = torch.randn(1, n, width, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    return {"state": state.to(device=device, dtype=dtype), "hidden_states": hidden}  # type: ignore[union-attr]


def run_once(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, what: str) -> None:
    """Run forward, or forward and backward."""
    if what == FORWARD:
        with torch.no_grad():
            attend(*leaves)
        return
    for leaf in leaves:
        leaf.grad = None
    attend(*leaves).backward(grad)


def plan_rows(n: int, device: str) -> Iterator[dict[str, Any]]:
    """Yield how long it takes to plan each pattern at a length when nothing of it is known yet; a plan is then kept."""
    for name, pattern in patterns_at(n).items():
        scope = Scope(n, HEADS, num_heads=HEADS, nodes=pattern.num_nodes(n))
        # who reads whom by content is found anew in each call
        if pattern.is_content_based or (device == "cuda" and not serves(pattern, parts_of(pattern, scope))):
            continue
        taken = []
        for _ in range(3):
            parts_of.cache_clear()
            PLANS.clear()
            start = time.perf_counter()
            if device == "cuda":
                segments = (Segment(0, 0, n),)
                cached_layout.__wrapped__(pattern, scope, segments, 1, 1, "all", torch.device(device))
                torch.cuda.synchronize()
            else:
                cached_plan(pattern, scope, None, (), "all", True)
            taken.append(time.perf_counter() - start)
        yield {"section": "plan", "name": name, "n": n, "seconds": statistics.median(taken)}


def cells_at(n: int, device: str, mode: str) -> Iterator[Cell]:
    """Yield what is timed at a length."""
    forward, both, dropped = DENSE_LIMITS[device, mode]
    patterns = patterns_at(n)
    given = {name: state_of(pattern, n, device) for name, pattern in patterns.items()}
    tensors = {total: tensors_at(total, device) for total in {n, *(positions_of(p, n) for p in patterns.values())}}
    leaves, grad = tensors[n]
    for what in (FORWARD, BOTH):
        # dropout is for training: a quick run leaves it out of the forward alone
        for dropout in (0.0, DROPOUT) if (mode, what) != ("quick", FORWARD) else (0.0,):
            if dropout and n > MOST_WITH_DROPOUT[device, mode]:
                continue
            facts: dict[str, Any] = {"section": "attention", "n": n, "dropout": dropout}
            if n <= (dropped if dropout else {FORWARD: forward, BOTH: both}[what]):
                dense: Any = functools.partial(scaled_dot_product_attention, dropout_p=dropout)
                yield _cell(DENSE, dense, leaves, grad, what, {**facts, "density": 1.0})
            for name, pattern in patterns.items():
                attend: Any = functools.partial(
                    hf_sparse.sparse_attention, pattern=pattern, dropout=dropout, **given[name]
                )
                said = str(hf_sparse.explain(pattern, n, heads=HEADS, dropout=dropout, device=device))
                density = pattern.density(n, heads=HEADS)
                held = tensors[positions_of(pattern, n)]
                yield _cell(name, attend, *held, what, {**facts, "density": density, "ran": said})
            if not dropout:
                for name, peer in _peers(n, device):
                    yield _cell(name, peer, leaves, grad, what, facts)


def _cell(
    name: str, attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor, what: str, facts: dict[str, Any]
) -> Cell:
    return Cell(name, what, functools.partial(run_once, attend, leaves, grad, what), facts)


def _peers(n: int, device: str) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Yield the peers of ``band`` that serve a length."""
    if device == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, n], dtype=torch.int32, device=device)

        def flash_window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
            out: Any = varlen_attn(q, k, v, ends, ends, n, n, window_size=(256, 256))
            return out.transpose(0, 1)[None]

        yield "FlashAttention window (varlen_attn), radius 256", flash_window
    elif 512 <= n <= 16384:
        from local_attention import LocalAttention

        local = LocalAttention(
            window_size=256, look_backward=1, look_forward=1, exact_windowsize=True, use_rotary_pos_emb=False
        )
        yield "local-attention (PyPI), window 256 to each side", local
