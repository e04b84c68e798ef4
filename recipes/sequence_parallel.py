"""Sequences longer than one device holds: each rank has a stretch of the tokens, and attention sees them all.

DeepSpeed's Ulysses layer exchanges, around attention, stretches of all heads for whole sequences of some heads. Here is what
makes a sparse model ready for it, and what it cannot serve, refused. ``Trainer`` does not take part: accelerate lets no
attention but its own names into its sequence parallelism, so the loop of training is the caller's.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_sparse.integration.attention import attend
from hf_sparse.integration.layers import NAME, tag_of
from hf_sparse.integration.mask import SparseMask
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.labels import RelativeLabels
from hf_sparse.patterns.routing import Centroids

# content-based patterns whose heads choose each for itself, from queries and keys alone, and draw nothing
_BY_HEAD_ALONE = ("routing", "reformer")
# what a call may not bring along: each speaks of a whole sequence, of which a rank has a stretch
_OF_WHOLE_SEQUENCES = ("global_attention_mask", "document_ids", "segment_ids", "position_bias", "s_aux", "softcap")


@contextlib.contextmanager
def spread_sequences(model: PreTrainedModel, *, ranks: int, batch_size: int = 1) -> Iterator[Any]:
    """Let a model read sequences of which each rank has a stretch, as long as the context lasts.

    Every rank calls the model with what :func:`stretch_of` gives it. Outputs are those of its own tokens; the gradients of
    the ranks' losses add up to those of the whole, where each loss is a sum or over the same number of tokens
    (``num_items_in_batch``). One model at a time.

    Args:
        model: a sparse model with grouped key and value heads, as Llama has.
        ranks: that share a sequence, neighbours by number; at least 2. Their number divides that of all ranks and of the heads.
        batch_size: rows of every call, at least 1.

    Yields:
        DeepSpeed's groups of ranks, ``mpu`` for ``deepspeed.initialize``: ``get_sequence_parallel_group()`` and others.

    Raises:
        ImportError: without deepspeed.
        RuntimeError: if there are no ranks yet: ``torch.distributed.init_process_group`` comes first.
        ValueError: if the model or one of its patterns cannot be spread. A call that cannot be raises it too; where only some
            ranks do, the others wait until the launcher ends them.

    Source: Jacobs et al. 2023, arXiv:2309.14509, section 3; the layer is DeepSpeed's ``UlyssesSPAttentionHF``.
    """
    check_can_spread(model, ranks)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            "there are no ranks: start with torchrun, and call torch.distributed.init_process_group first"
        )
    if torch.distributed.get_world_size() % ranks:
        raise ValueError(f"ranks={ranks} must divide the {torch.distributed.get_world_size()} processes that there are")
    ulysses = _ulysses()
    own = {id(module): getattr(module, "num_key_value_groups", None) for module in _sparse_modules(model)}
    share: dict[str, Any] = {"own": frozenset(own), "ranks": ranks, "heads": model.config.num_attention_heads}
    # DeepSpeed keeps what stands under our name, and calls it with whole sequences
    ALL_ATTENTION_FUNCTIONS[NAME] = functools.partial(_attend_share, share)
    try:
        groups = ulysses.register_with_transformers(
            model,
            core_attn_implementation=NAME,
            sequence_parallel_size=ranks,
            micro_batch_size=batch_size,
            seq_length_is_variable=True,
        )
        spread, share["rank"] = ALL_ATTENTION_FUNCTIONS[NAME], groups.get_sequence_parallel_rank()
        ALL_ATTENTION_FUNCTIONS[NAME] = functools.partial(_checked, share, spread)
        try:
            yield groups
        finally:
            ALL_ATTENTION_FUNCTIONS[NAME] = spread
            _release(ulysses, groups)
            for module in _sparse_modules(model):
                # changed where several ranks share a key and value head
                module.num_key_value_groups = own[id(module)]  # type: ignore[assignment]
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]


def stretch_of(batch: Mapping[str, Tensor], *, rank: int, ranks: int) -> dict[str, Tensor]:
    """Return the tokens of a batch that one rank holds, with their positions.

    Args:
        batch: "input_ids" ``[B, N]``, and possibly "labels" ``[B, N]`` and an "attention_mask" without padding.
        rank: among those that share the sequences, from 0.
        ranks: that share the sequences; a divisor of N.

    Returns:
        "input_ids" and "position_ids" ``[B, N / ranks]``, and where there are labels, "labels" and "shift_labels": of each
        token the label of the next one, which may stand on the next rank.

    Raises:
        ValueError: if there is padding, N cannot be shared, or the batch holds anything else.
    """
    if unknown := sorted(set(batch) - {"input_ids", "labels", "attention_mask"}):
        raise ValueError(
            f"sequences are spread without {unknown[0]!r}; a batch may hold input_ids, labels, attention_mask"
        )
    mask = batch.get("attention_mask")
    if mask is not None and not bool((mask != 0).all()):
        raise ValueError("sequences are spread without padding: give each batch rows of one length")
    ids = batch["input_ids"]
    tokens = ids.shape[1]
    if not 0 <= rank < ranks or tokens % ranks:
        raise ValueError(f"{tokens} tokens cannot be shared by rank {rank} of {ranks}: cut or join them to a multiple")
    held = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
    found = {"input_ids": ids[:, held]}
    found["position_ids"] = torch.arange(tokens, device=ids.device).expand(ids.shape[0], -1)[:, held].contiguous()
    if "labels" in batch:
        found["labels"] = batch["labels"][:, held]
        found["shift_labels"] = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)[:, held].contiguous()
    return found


def check_can_spread(model: PreTrainedModel, ranks: int) -> None:
    """Check that the sequences of a model can be spread over so many ranks.

    Raises:
        ValueError: if they cannot; says why.
    """
    config, name = model.config, type(model).__name__
    if ranks < 2:
        raise ValueError(f"ranks must be at least 2, got {ranks}")
    patterns = {tag.pattern for module in _sparse_modules(model) if (tag := tag_of(module)) is not None}
    if not patterns:
        raise ValueError(f"{name} is dense; make it sparse by hf_sparse.sparsify_, or use DeepSpeed's layer by itself")
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} cannot be spread: DeepSpeed's layer serves models of one stack whose config has num_key_value_heads, "
            "as Llama's"
        )
    if heads % ranks or (groups % ranks and ranks % groups):
        raise ValueError(
            f"{heads} heads over {groups} of keys and values cannot be shared by {ranks} ranks: ranks must divide the heads, "
            "and divide or be a multiple of those of keys and values"
        )
    for pattern in patterns:
        why = None if pattern is None else _why_not(pattern, model)
        if why is not None:
            raise ValueError(f"pattern {pattern.key!r} cannot be spread over ranks: {why}")  # type: ignore[union-attr]


def _why_not(pattern: Pattern, model: PreTrainedModel) -> str | None:
    """Return why a pattern does not serve a share of the heads, or None where it does."""
    members: tuple[Pattern, ...] = getattr(pattern, "patterns", (pattern,))
    for member in members:
        if member is not pattern and (why := _why_not(member, model)) is not None:
            return f"{member.key!r}: {why}"
    if pattern.has_lasting_nodes:
        return "it has nodes that are no tokens, so no rank's stretch holds them"
    for member in members:
        if member.is_content_based and not hasattr(member, "patterns") and member.key not in _BY_HEAD_ALONE:
            return "what its heads choose is drawn for all of them together, or from more than queries and keys"
    config = model.config
    state = pattern.make_state(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    if state is not None and not isinstance(state, Centroids | RelativeLabels):
        return f"its {type(state).__name__} read hidden states, of which a rank has its own stretch alone"
    return None


def _sparse_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if tag_of(module) is not None]


def _ulysses() -> Any:
    try:
        deepspeed = importlib.import_module("deepspeed")
        layer = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    except ImportError as error:
        raise ImportError("sequences are spread by DeepSpeed; pip install 'hf-sparse[deepspeed]'") from error
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False)
    return layer.UlyssesSPAttentionHF


def _release(ulysses: Any, groups: Any) -> None:
    """Let DeepSpeed forget the groups and the model, so that another one may follow."""
    if hasattr(ulysses, "unregister_from_transformers"):
        ulysses.unregister_from_transformers()
    else:
        # DeepSpeed up to 0.19.8
        groups._release_sequence_parallel_groups()


def _checked(
    share: dict[str, Any],
    spread: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SparseMask | Tensor | None,
    **given: Any,
) -> Any:
    """Attend by DeepSpeed's layer, which drops masks without a word: what they say is refused before."""
    if id(module) not in share["own"]:
        return attend(module, query, key, value, attention_mask, **given)
    refused = [name for name in _OF_WHOLE_SEQUENCES if given.get(name) is not None]
    if isinstance(attention_mask, SparseMask):
        padding = attention_mask.padding
        refused += ["padding"] * (padding is not None and not bool(padding.all()))
        refused += [] if attention_mask.refusal is None else [attention_mask.refusal]
        refused += ["packed documents"] * (attention_mask.document_ids is not None)
        given["is_causal"] = attention_mask.is_causal
    elif attention_mask is not None:
        refused.append(f"an attention mask of type {type(attention_mask).__name__}")
    refused += ["dropout of attention"] * (given.get("dropout", 0.0) > 0)
    refused += ["cached decoding"] * (query.shape[2] != key.shape[2])
    if refused:
        raise ValueError(f"sequences are spread over ranks without {refused[0]}")
    first = query.shape[2] * share["rank"]
    wanted = torch.arange(first, first + query.shape[2], device=query.device)
    positions = given.get("position_ids")
    if positions is None or positions.shape[-1] != len(wanted) or not bool((positions == wanted).all()):
        raise ValueError(
            f"position_ids of rank {share['rank']} must count from {first} to {first + len(wanted) - 1} in every row, as "
            "stretch_of makes them: sequences are spread whole, without padding or packing"
        )
    return spread(module, query, key, value, attention_mask, **given)


def _attend_share(
    share: dict[str, Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> Any:
    """Attend over whole sequences with this rank's heads; called by DeepSpeed's layer."""
    heads = share["heads"] // share["ranks"]
    if id(module) not in share["own"] or query.shape[1] != heads:
        raise RuntimeError(f"DeepSpeed's layer did not exchange tokens for heads around {type(module).__name__}")
    return attend(module, query, key, value, mask, head_offset=share["rank"] * heads, num_heads=share["heads"], **given)
