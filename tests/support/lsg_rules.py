"""LSG as its published code computes it (ccdv-ai/convert_checkpoint_to_lsg), in loops; nothing here knows hf_sparse."""

from typing import Any

import torch
import transformers
from torch import Tensor

Settings = dict[str, Any]


def kept(key: Tensor, head: int, settings: Settings) -> list[list[int]]:
    """Return what is kept of the tokens ``[T, D]`` of a head, in order: lists of one token, or of those that are averaged."""
    block, sparse, factor = settings["block_size"], settings["sparse_block_size"], settings["sparsity_factor"]
    kind, tokens = settings["sparsity_type"], len(key)
    # published code pads to whole blocks; a token behind the end is kept and masked
    padded = -(-tokens // block) * block
    if kind == "none":
        return []
    if factor == 1:
        return [[at] if at < tokens else [] for at in range(padded)]
    if kind == "pooling":
        return [[at for at in range(first, first + factor) if at < tokens] for first in range(0, padded, factor)]
    if kind == "stride":
        places = [group * factor + head % factor for group in range(padded // factor)]
    elif kind == "block_stride":
        count = block // factor
        places = [first + (i + head * count) % block for first in range(0, padded, block) for i in range(count)]
    else:
        places, chunk = [], min(block, sparse)
        for first in range(0, padded, chunk):
            norms = {at: float(key[at].detach().norm()) if at < tokens else 0.0 for at in range(first, first + chunk)}
            ascending = sorted(norms, key=lambda at: norms[at])
            places += ascending[chunk - chunk // factor :]
    return [[at] if at < tokens else [] for at in places]


def attended(query: Tensor, key: Tensor, value: Tensor, settings: Settings, *, scale: float) -> Tensor:
    """Return the output for one row ``[H, g + T, D]`` whose first g are global tokens, in float64."""
    globals_, block = settings["num_global_tokens"], settings["block_size"]
    sparse, factor = settings["sparse_block_size"], settings["sparsity_factor"]
    query, key, value = (tensor.double() for tensor in (query, key, value))
    tokens, out = query.shape[1] - globals_, torch.zeros_like(value)
    for head in range(len(query)):
        thinned = kept(key[head, globals_:], head, settings)
        step = block // factor
        for row in range(globals_ + tokens):
            keys, values = [key[head, :globals_]], [value[head, :globals_]]
            own = (row - globals_) // block
            first, last = (own - 1) * block, (own + 2) * block
            if row < globals_:
                first, last = 0, tokens
            near = range(max(first, 0), min(last, tokens))
            keys += [key[head, globals_ + at][None] for at in near]
            values += [value[head, globals_ + at][None] for at in near]
            far = [
                *range((own - 1) * step - sparse, (own - 1) * step),
                *range((own + 2) * step, (own + 2) * step + sparse),
            ]
            for entry in far if row >= globals_ else []:
                if 0 <= entry < len(thinned) and thinned[entry]:
                    at = [globals_ + place for place in thinned[entry]]
                    keys.append(key[head, at].mean(0, keepdim=True))
                    values.append(value[head, at].mean(0, keepdim=True))
            scores = scale * torch.cat(keys) @ query[head, row]
            out[head, row] = scores.softmax(0) @ torch.cat(values)
    return out


def read_by_lsg(dense: Any, table: Tensor, ids: Tensor, settings: Settings) -> Tensor:
    """Return what an encoder says of one text as LSG has it, float64 ``[T, hidden_size]``.

    Args:
        dense: base model of BERT's or BART's kin, in float64.
        table: embeddings of global tokens ``[512, D]``.
        ids: int64 ``[T]``, no padding.
        settings: of LSG's config.
    """
    count = settings["num_global_tokens"]
    hidden = _through_layers(dense, table, ids, settings)
    said = hidden[count:].clone()
    if settings["pool_with_global"]:
        said[0] = hidden[0]
    return said


def decoded_by_lsg(dense: Any, table: Tensor, ids: Tensor, decoder_ids: Tensor, settings: Settings) -> Tensor:
    """Return what the decoder of a base model of BART's kin says of one text, float64 ``[S, hidden_size]``."""
    if settings["pass_global_tokens_to_decoder"]:
        read = _through_layers(dense, table, ids, settings)
    else:
        read = read_by_lsg(dense, table, ids, settings)
    with torch.no_grad():
        dense.set_attn_implementation("sdpa")
        said: Tensor = dense.decoder(input_ids=decoder_ids[None], encoder_hidden_states=read[None]).last_hidden_state[0]
    return said


def _through_layers(dense: Any, table: Tensor, ids: Tensor, settings: Settings) -> Tensor:
    """Return the last hidden states of global tokens and tokens, float64 ``[g + T, hidden_size]``."""

    def attention(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float, **_: Any) -> Any:
        return attended(query[0], key[0], value[0], settings, scale=scaling).transpose(0, 1)[None], None

    transformers.AttentionInterface.register("lsg_rules", attention)
    dense.set_attn_implementation("lsg_rules")
    globals_ = table[: settings["num_global_tokens"]].double()[None]
    with torch.no_grad():
        if dense.config.is_encoder_decoder:
            encoder = dense.encoder
            hidden = encoder.embed_tokens(ids[None]) + encoder.embed_positions(ids[None])
            hidden = encoder.layernorm_embedding(torch.cat([globals_, hidden], 1))
            for layer in encoder.layers:
                hidden = layer(hidden, None)
            hidden = encoder.layer_norm(hidden) if hasattr(encoder, "layer_norm") else hidden
            return hidden[0]
        hidden = torch.cat([dense.embeddings.LayerNorm(globals_), dense.embeddings(ids[None])], 1)
        if hasattr(dense, "embeddings_project"):
            hidden = dense.embeddings_project(hidden)
        layers = dense.transformer if hasattr(dense, "transformer") else dense.encoder
        said: Tensor = layers(hidden, None).last_hidden_state[0]
    return said
