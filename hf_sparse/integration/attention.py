"""The attention function registered with transformers."""

import dataclasses
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hf_sparse.attention import sparse_attention
from hf_sparse.integration.dense_layers import attend_densely
from hf_sparse.integration.layers import LayerTag, heads_here, is_cross_attention, num_heads_of, tag_of, takes_documents
from hf_sparse.integration.mask import SparseMask, documents_of
from hf_sparse.integration.windows import check_window
from hf_sparse.patterns import Pattern


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: SparseMask | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    global_attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    head_offset: int = 0,
    num_heads: int | None = None,
    block_indices: Tensor | None = None,
    packing_is_told: bool = False,
    sparse_hidden_states: Tensor | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend along the pattern of a tagged module; registered as ``hf_sparse``.

    Args:
        module: an attention module of a sparse model.
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``.
        value: float ``[B, G, S, Dv]``.
        attention_mask: what ``sparse_mask`` made; None where a model calls no mask function.
        dropout: probability of dropping an attention probability.
        scaling: factor of the scores.
        is_causal: what the model says where it calls no mask function.
        global_attention_mask: ``[B, S]``, nonzero = a global token.
        document_ids: int ``[B, S]``, packed documents.
        segment_ids: int ``[B, S]``, the segments that nodes stand for.
        position_ids: int ``[B or 1, S]``; packing is read from their restarts where no mask tells it.
        position_bias: float ``[1, H, T, S]``, or ``[H, 2 * M + 1]`` for each distance, as T5 passes it in a sparse model.
        softcap: as Gemma 2 passes it.
        s_aux: attention sinks, as gpt-oss passes them.
        sliding_window: the model's own; honoured where the pattern of the layer stays inside, else refused.
        head_offset: index of the first head held here, where ranks share a layer's heads.
        num_heads: heads of the whole layer; None where all are here, or those that tensor parallelism left.
        block_indices: blocks that the model chooses by itself (MiniMax-M3), which is refused.
        packing_is_told: whether ``document_ids`` says all there is to say about packing, where the mask cannot.
        sparse_hidden_states: float ``[B, S, hidden_size]``, what the module was given, for weights of its pattern.

    Returns:
        Output ``[B, T, H, Dv]``, and None in the place of attention weights.

    Raises:
        ValueError: if the module belongs to no sparse model, or something it is given cannot be honoured.
    """
    tag = tag_of(module)
    if tag is None:
        raise ValueError(_why_untagged(module))
    if block_indices is not None:
        raise ValueError(f"{type(module).__name__} chooses blocks of keys by itself, which hf_sparse does not honour")
    if num_heads is None:
        head_offset, num_heads = heads_here(module, query.shape[1])
    mask = read_mask(attention_mask, module, is_causal)
    if mask.may_be_packed and not (packing_is_told or tag.is_closed) and document_ids is None:
        document_ids = _documents_behind(module, position_ids, key)
    window = sliding_window if mask.window is None else mask.window
    _refuse(module, mask, window)
    has_nodes = tag.pattern is not None and tag.pattern.has_lasting_nodes
    if has_nodes:
        mask = _with_nodes(tag.pattern, mask, key, document_ids)  # type: ignore[arg-type]
        position_ids = None
        nodes = key.shape[2] - tag.pattern.num_tokens(key.shape[2])  # type: ignore[union-attr]
        global_attention_mask, document_ids, segment_ids = (
            None if ids is None else nn.functional.pad(ids, (0, nodes))
            for ids in (global_attention_mask, document_ids, segment_ids)
        )
    if mask.padding is not None and tuple(mask.padding.shape) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"attention_mask must have shape [batch, tokens] = {[key.shape[0], key.shape[2]]}, got {list(mask.padding.shape)}"
        )
    if query.dtype != value.dtype and torch.is_autocast_enabled(query.device.type):
        # rotary positions are in the dtype of the hidden states, which autocast leaves wide
        query, key = query.to(value.dtype), key.to(value.dtype)
    terms = _terms(module, tag, position_bias, softcap, s_aux, slice(head_offset, head_offset + query.shape[1]))
    if tag.pattern is None:
        is_cross = tag.stack == "cross"
        if document_ids is not None and not is_cross:
            mask = dataclasses.replace(mask, document_ids=document_ids)
        out = attend_densely(query, key, value, mask, window, dropout, scaling, terms, is_cross=is_cross, band=tag.band)
        return out.transpose(1, 2).contiguous(), None
    hidden_states = sparse_hidden_states
    if hidden_states is None and (parked := getattr(module, "_sparse_hidden", None)) is not None:
        hidden_states, module._sparse_hidden = parked, None  # type: ignore[assignment]
    if document_ids is None:
        document_ids = mask.document_ids
    if document_ids is None and mask.padding is None and not mask.is_causal and position_ids is not None:
        document_ids = None if packing_is_told else _packed_by(position_ids, key, tag.pattern)
    if tag.stack == "decoder":
        # the tokens that a call marks are the encoder's
        global_attention_mask = None
    global_mask = _read_global_mask(global_attention_mask, key, mask, query.shape[2])
    if window is not None:
        _check_inside(module, tag, mask, window, query, key, global_mask)
    query_positions, key_positions = mask.positions(key.shape[0], from_first=not tag.pattern.reads_padding)
    attended: Any = sparse_attention(
        query,
        key,
        value,
        tag.pattern,
        is_causal=mask.is_causal,
        key_padding_mask=mask.padding,
        global_mask=global_mask,
        scale=scaling,
        dropout=dropout,
        layer=tag.index,
        state=getattr(module, "sparse_state", None),
        hidden_states=hidden_states,
        document_ids=document_ids,
        segment_ids=segment_ids,
        query_positions=query_positions,
        key_positions=key_positions,
        head_offset=head_offset,
        num_heads=num_heads,
        training=bool(getattr(module, "training", False)),
        **terms,
    )
    return attended.transpose(1, 2).contiguous(), None


def _why_untagged(module: nn.Module) -> str:
    said = f"attn_implementation='hf_sparse' reached {type(module).__name__}, which belongs to no sparse model: "
    if getattr(getattr(module, "config", None), "sparse_attention", None) is None:
        return f"{said}its config has no sparse_attention entry; use hf_sparse.sparsify_(model, pattern) or convert it"
    return (
        f"{said}a sparse checkpoint was loaded by a dense class, as sentence-transformers does with encoders of T5; load it "
        "with AutoModel or another Auto class"
    )


def _packed_by(position_ids: Tensor, key: Tensor, pattern: Pattern) -> Tensor | None:
    """Return the documents that positions tell; None where there is one, as far as that can be seen and matters."""
    documents = documents_of(position_ids, key.shape[0], key.shape[2])
    refuses = not takes_documents(pattern) and not torch.compiler.is_compiling()
    return None if documents is None or (refuses and not bool(documents.any())) else documents


def _documents_behind(module: nn.Module, position_ids: Tensor | None, key: Tensor) -> Tensor | None:
    """Return documents where a mask was compiled apart from the model, so that it cannot tell them."""
    documents = None
    if position_ids is not None:
        documents = documents_of(position_ids, key.shape[0], key.shape[2], at_every_step=True)
    if documents is None:
        raise ValueError(
            f"{type(module).__name__}: whether rows are packed cannot be seen where a part of the model is compiled; compile "
            "all of it, or pass attention_mask"
        )
    return documents


class NamedPattern:
    """The attention function of ``hf_sparse:<key>``: one pattern with its defaults on a dense model, for this process."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.has_warned = False

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if tag_of(module) is not None:
            raise ValueError(
                f"this model is sparse already, with the pattern of its config; attn_implementation="
                f"'hf_sparse:{self.pattern.key}' is for dense models. Load it with 'hf_sparse', or with 'sdpa' to see it dense"
            )
        if self.pattern.has_lasting_nodes:
            raise ValueError(
                f"pattern {self.pattern.key!r} has nodes that live through all layers, so no attention name can serve it; "
                "use hf_sparse.sparsify_(model, pattern)"
            )
        if self.pattern.make_state(hidden_size=1, num_heads=1, num_key_value_heads=1, head_dim=1) is not None:
            raise ValueError(
                f"pattern {self.pattern.key!r} owns weights on each layer, so no attention name can serve it; "
                "use hf_sparse.sparsify_(model, pattern), or a pattern without (global_projections=False, "
                "relay_projections=False)"
            )
        is_cross = is_cross_attention("", module)
        if getattr(module, "is_decoder", False) and not is_cross and not getattr(module, "is_causal", True):
            raise ValueError(
                f"{type(module).__name__} of an encoder-decoder does not tell its attention name whether it reads the encoder; "
                "use hf_sparse.sparsify_(model, pattern)"
            )
        total = num_heads_of(module, getattr(module, "config", None))
        is_spread = (
            torch.distributed.is_available() and torch.distributed.is_initialized() and "num_heads" not in kwargs
        )
        if is_spread and total is not None and query.shape[1] < total:
            raise ValueError(
                f"{query.shape[1]} of {total} heads are on this rank, and an attention name does not know which; use "
                "hf_sparse.sparsify_(model, pattern), or load the model without tp_plan"
            )
        if not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            warnings.warn(
                f"attn_implementation='hf_sparse:{self.pattern.key}' lasts for this process only: saving the model loses it. "
                "hf_sparse.sparsify_(model, pattern) makes it last",
                stacklevel=2,
            )
        tagged = _Tagged(module, LayerTag(None if is_cross else self.pattern, getattr(module, "layer_idx", None) or 0))
        return attend(tagged, query, key, value, attention_mask, **kwargs)  # type: ignore[arg-type]


class _Tagged:
    """A dense model's attention module seen with a tag, without changing it."""

    def __init__(self, module: nn.Module, tag: Any) -> None:
        self._sparse = tag
        self.is_causal = getattr(module, "is_causal", False)
        self.training = module.training
        self.name = type(module).__name__


def read_mask(mask: SparseMask | Tensor | None, module: Any, is_causal: bool | None) -> SparseMask:
    """Return whatever form of mask reached a layer as a ``SparseMask``.

    Raises:
        ValueError: if the form cannot be honoured.
    """
    if isinstance(mask, SparseMask):
        return mask
    causal = bool(getattr(module, "is_causal", False)) if is_causal is None else is_causal
    if mask is None:
        return SparseMask(None, causal)
    shape = tuple(getattr(mask, "shape", ()))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return SparseMask(mask != 0, causal)
    if isinstance(mask, Tensor) and mask.dim() == 4 and shape[1:3] == (1, 1):
        # the older form of padding: 0 for a real token, a large negative number for padding
        is_real = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] > torch.finfo(mask.dtype).min / 2
        if mask.dtype != torch.bool and not torch.compiler.is_compiling() and bool((mask[:, 0, 0][is_real] != 0).any()):
            raise ValueError("an attention mask that weights tokens cannot be honoured; pass the 2-D padding mask")
        return SparseMask(is_real, causal)
    raise ValueError(
        f"an attention mask of type {type(mask).__name__} and shape {shape} cannot be honoured by sparse attention; pass the "
        "2-D padding mask [batch, tokens], and document_ids for packed rows"
    )


def _terms(
    module: Any,
    tag: LayerTag,
    position_bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    heads: slice,
) -> dict[str, Any]:
    """Return what a model adds to its scores, under the names that ``sparse_attention`` has for it.

    Args:
        module: the attention module.
        tag: of the module.
        position_bias: of every pair, or of every distance and all heads of the layer.
        softcap: the model's cap.
        sinks: the model's sinks.
        heads: those that are held here.
    """
    if tag.stack == "cross" and not getattr(module, "has_relative_attention_bias", True):
        # T5 passes zeros
        position_bias = None
    is_by_distance = position_bias is not None and position_bias.dim() == 2
    return {
        "bias": None if is_by_distance else position_bias,
        "distance_bias": position_bias[heads] if is_by_distance else None,  # type: ignore[index]
        "softcap": softcap,
        "sinks": sinks,
    }


def _refuse(module: Any, mask: SparseMask, window: int | None) -> None:
    refusal = mask.refusal
    if window is not None and not mask.is_causal and mask.window is None:
        refusal = f"the model's own sliding window of {window} tokens"
    if refusal is not None:
        raise ValueError(f"{getattr(module, 'name', type(module).__name__)}: hf_sparse does not honour {refusal} yet")


def _check_inside(
    module: Any,
    tag: LayerTag,
    mask: SparseMask,
    window: int,
    query: Tensor,
    key: Tensor,
    global_mask: Tensor | None,
) -> None:
    """Refuse what would read beyond the model's own sliding window."""
    where, length = f"{getattr(module, 'name', type(module).__name__)}: layer {tag.index}", key.shape[2]
    if global_mask is not None and length > window:
        raise ValueError(
            f"{where} has a sliding window of {window} tokens of its own, which global tokens would read beyond; leave "
            "global_attention_mask out"
        )
    scope: dict[str, Any] = {"heads": query.shape[1], "layer": tag.index, "length": length}
    check_window(tag.pattern, window, is_causal=mask.is_causal, where=where, **scope)  # type: ignore[arg-type]


def _read_global_mask(mask: Tensor | None, key: Tensor, told: SparseMask, queries: int) -> Tensor | None:
    """Return a global mask as bools; in cached decoding, tokens behind those that it speaks of are not global."""
    if mask is None:
        return None
    batch, keys = key.shape[0], key.shape[2]
    if told.is_causal and mask.dim() == 2 and (queries < keys or told.query_index is not None):
        mask = nn.functional.pad(mask, (0, max(keys - mask.shape[1], 0)))
    if tuple(mask.shape) != (batch, keys):
        raise ValueError(
            f"global_attention_mask must have shape [batch, tokens] = {[batch, keys]}, got {list(mask.shape)}"
        )
    return mask != 0


def _with_nodes(pattern: Pattern, mask: SparseMask, key: Tensor, document_ids: Tensor | None) -> SparseMask:
    """Return a mask with room for the nodes; packed rows whose documents would share them are refused."""
    if mask.is_causal:
        raise ValueError(
            f"pattern {pattern.key!r} has nodes that start as means of tokens, so in a causal model they would know what comes"
        )
    total = key.shape[2]
    tokens = pattern.num_tokens(total)
    if mask.document_ids is not None or (document_ids is not None and not pattern.takes_segments):
        refuse_packed(pattern)
    if mask.padding is None:
        return mask
    padding = nn.functional.pad(mask.padding[:, :tokens], (0, total - tokens), value=True)
    return dataclasses.replace(mask, padding=padding)


def refuse_packed(pattern: Pattern) -> NoReturn:
    """Refuse rows of several documents.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"pattern {pattern.key!r} has nodes that are no tokens, which the documents of a packed row would share; "
        "give each document a row of its own, or use etc with segments='given' and its document_ids"
    )
