"""Nodes that are no tokens: put behind the embeddings, taken off behind the last layer.

One module on the base model does it, by hooks of its own. Position 0 stays the first token, and what comes out has the caller's
length.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.attention import check_segments_are_known
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.attention import refuse_packed
from hf_sparse.integration.layers import NAME, self_attention_modules, tag_of
from hf_sparse.integration.mask import documents_of
from hf_sparse.node_means import node_places, span_means
from hf_sparse.patterns import Pattern

# behind which of a base model's parts nodes are put: the first that it has; and of an encoder beside a decoder
_EMBEDDINGS = ("encoder.embedding_hidden_mapping_in", "embeddings_project", "embeddings")
_OF_ENCODER = ("layernorm_embedding",)
# no thread has this number
_NOBODY = 0
# in each thread, the nodes of the model whose pass is under way there
_BEGUN = threading.local()


class Nodes(nn.Module):
    """The nodes of a model: each starts as the mean of some tokens' embeddings and a learned vector, or as the vector alone.

    Attributes:
        weight: float ``[vectors, hidden_size]``, the learned vectors; 0 in a converted checkpoint.

    Args:
        pattern: says how many nodes there are and which tokens each starts as.
        hidden_size: width of the embeddings.
        is_read: whether a decoder reads what becomes of them, so that the encoder's output keeps them.
    """

    def __init__(self, pattern: Pattern, hidden_size: int, *, is_read: bool = False) -> None:
        super().__init__()
        self.pattern = pattern
        self.is_read = is_read
        self.weight = nn.Parameter(torch.empty(pattern.num_node_vectors, hidden_size))
        # of the pass under way: its thread and what was given about the tokens, and how many there are once that is known
        self._pass: tuple[int | None, dict[str, Tensor | None]] = _NOBODY, {}
        self._tokens: int | None = None
        # what keep_nodes collects
        self._kept: list[Tensor] | None = None

    def reset(self) -> None:
        """Set the learned vectors to 0."""
        nn.init.zeros_(self.weight)

    def hook(self, base: nn.Module, embeddings: nn.Module, layers: nn.Module | None, decoder: nn.Module | None) -> None:
        """Register the hooks on a base model and parts of it.

        Args:
            base: gets tokens and gives hidden states.
            embeddings: behind which the nodes are put.
            layers: what runs them all, or the base model itself where nothing else reads them; None where that is not known.
            decoder: reads the nodes in what the base model gives; None where none does.

        Raises:
            UnsupportedModelError: if the first node is to be pooled and it is not known where the layers end.
        """
        if self.pattern.first_node_is_pooled and not self.is_read:
            if layers is None:
                raise UnsupportedModelError(
                    f"{type(base).__name__} has no encoder behind which the first token could become the first global token of "
                    f"pattern {self.pattern.key!r}"
                )
            layers.register_forward_hook(self._pool)
        base.register_forward_pre_hook(self._keep_given, with_kwargs=True)
        embeddings.register_forward_hook(self._append)
        base.register_forward_hook(self._take_off, always_call=True)
        if decoder is not None:
            decoder.register_forward_pre_hook(self._let_read, with_kwargs=True)

    def forward(
        self,
        embedded: Tensor,
        is_real: Tensor | None = None,
        document_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the nodes of a batch.

        Args:
            embedded: float ``[B, T, hidden_size]``.
            is_real: bool ``[B, T]``, True = a real token; None where all are.
            document_ids: int ``[B, T]``, packed documents.
            segment_ids: int ``[B, T]``, for patterns that take them.

        Returns:
            float ``[B, nodes, hidden_size]``; a row with fewer nodes has them first, and zeros behind them.
        """
        if not self.pattern.nodes_start_as_means:
            return self.weight.to(embedded.dtype).expand(len(embedded), -1, -1)
        real = embedded.new_ones(embedded.shape[:2], dtype=torch.bool) if is_real is None else is_real
        places = node_places(real, document_ids, segment_ids, self.pattern.json, True)
        running = nn.functional.pad(real.long().cumsum(1), (1, 0))
        counts = running.gather(1, places[..., 1]) - running.gather(1, places[..., 0])
        means = span_means(embedded.masked_fill(~real[..., None], 0.0), places, counts)
        vector = torch.arange(places.shape[1], device=embedded.device) % len(self.weight)
        return (means + self.weight[vector].to(embedded.dtype)) * (places[..., 1:] > places[..., :1])

    def _keep_given(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        name = module.config._attn_implementation  # type: ignore[union-attr]
        if name != NAME:
            raise ValueError(
                f"attn_implementation={name!r} cannot show this model dense: its pattern {self.pattern.key!r} has nodes, "
                f"which no dense model has; load it with {NAME!r}"
            )
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **given}
        mask, segments = given.get("attention_mask"), given.get("segment_ids")
        check_segments_are_known(self.pattern, segments)
        documents = self._documents(given)
        if documents is not None:
            # the layers do not see position_ids
            kwargs = {**kwargs, "document_ids": documents}
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(
                f"pattern {self.pattern.key!r} has nodes that are no tokens and needs a padding mask [batch, tokens], got "
                f"{tuple(getattr(mask, 'shape', ())) or type(mask).__name__}"
            )
        is_real = None if mask is None else mask != 0
        owner = None if torch.compiler.is_compiling() else threading.get_ident()
        if owner is not None:
            _BEGUN.by = self
        self._pass = owner, {"is_real": is_real, "document_ids": documents, "segment_ids": segments}
        self._tokens = None
        return args, kwargs

    def _documents(self, given: Mapping[str, Any]) -> Tensor | None:
        """Return the documents of packed rows, for patterns that serve such."""
        documents, position_ids = given.get("document_ids"), given.get("position_ids")
        if documents is None and isinstance(position_ids, Tensor):
            documents = documents_of(position_ids, *position_ids.shape)
            segments = given.get("segment_ids")
            if documents is not None and segments is not None and len(documents) == 1:
                documents = documents.expand(len(segments), -1)
        if documents is None or self.pattern.takes_segments:
            return documents
        is_told = given.get("document_ids") is not None
        if is_told or (not torch.compiler.is_compiling() and bool((documents > 0).any())):
            refuse_packed(self.pattern)
        return None

    def _own_pass(self) -> dict[str, Tensor | None]:
        """Return what the pass under way was given.

        Raises:
            RuntimeError: if another thread has come in: what is kept is of one pass.
        """
        owner, given = self._pass
        if torch.compiler.is_compiling() or owner in (None, threading.get_ident()):
            return given
        # embeddings that run by themselves are of no pass
        if owner != _NOBODY or getattr(_BEGUN, "by", None) is self:
            raise RuntimeError(
                f"two threads run a model with pattern {self.pattern.key!r} at a time, which keeps its nodes in one place; "
                "give each thread a copy, or let them wait for one another"
            )
        return given

    def _append(self, _module: nn.Module, _args: tuple[Any, ...], embedded: Any) -> Any:
        given = self._own_pass()
        self._tokens = embedded.shape[1]
        if not self._tokens:
            raise ValueError(
                f"pattern {self.pattern.key!r} has nodes that start as means of tokens, and there are none"
            )
        for name, ids in given.items():
            if ids is not None and ids.shape != embedded.shape[:2]:
                said = "attention_mask" if name == "is_real" else name
                raise ValueError(f"{said} must have shape {list(embedded.shape[:2])}, got {list(ids.shape)}")
        return torch.cat([embedded, self(embedded, **given)], 1)

    def _pool(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        self._own_pass()
        hidden, at = output[0], self._tokens
        pooled = torch.cat([hidden[:, at : at + 1], hidden[:, 1:]], 1)  # type: ignore[operator]
        if isinstance(output, dict):
            output["last_hidden_state"] = pooled
            if output.get("hidden_states") is not None:
                output["hidden_states"] = (*output["hidden_states"][:-1], pooled)
            return output
        return (pooled, *output[1:])

    def _take_off(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if output is not None:
            self._own_pass()
        if not torch.compiler.is_compiling():
            _BEGUN.by = None
        if output is None:
            # the pass has failed; what is kept may be another's
            return output
        tokens, self._pass, self._tokens = self._tokens, (None if torch.compiler.is_compiling() else _NOBODY, {}), None
        if tokens is None:
            return output
        total = tokens + self.pattern.num_nodes(tokens)
        if self._kept is not None:
            self._kept.append(output[0][:, tokens:total])
        if self.is_read:
            return output
        if isinstance(output, dict):
            for name, value in output.items():
                output[name] = _cut(value, tokens, total)
            return output
        return _cut(output, tokens, total)

    def _let_read(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a decoder a padding mask with room for the nodes, if what it reads has them."""
        hidden, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if hidden is None or mask is None or mask.dim() != 2:
            return args, kwargs
        more = hidden.shape[1] - mask.shape[1]
        if more == self.pattern.num_nodes(mask.shape[1]):
            kwargs = {**kwargs, "encoder_attention_mask": nn.functional.pad(mask, (0, more), value=1)}
        return args, kwargs


def _cut(value: Any, tokens: int, total: int) -> Any:
    """Return hidden states, one or many, without the nodes."""
    if isinstance(value, tuple | list):
        return type(value)(_cut(one, tokens, total) for one in value)
    is_hidden = isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == total
    return value[:, :tokens] if is_hidden else value


@contextlib.contextmanager
def keep_nodes(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep what becomes of a model's nodes, which its outputs leave away.

    Args:
        model: a model whose pattern has nodes that live through the layers.

    Yields:
        A list, to which each forward pass adds the nodes behind the last layer, float ``[B, nodes, hidden_size]``, with their
        gradients; a row with fewer nodes has them first. Of ``segments="given"`` node j is the j-th segment of the row.

    Raises:
        ValueError: if the model has no such nodes, or they are being kept already.
    """
    held = [module for module in model.modules() if isinstance(module, Nodes)]
    if not held:
        raise ValueError(f"{type(model).__name__} has no nodes that live through its layers")
    if held[0]._kept is not None:
        raise ValueError("the nodes of this model are being kept already")
    kept: list[Tensor] = []
    held[0]._kept = kept
    try:
        yield kept
    finally:
        held[0]._kept = None


def add_nodes(model: nn.Module) -> None:
    """Give a model whose layers are tagged the nodes that their patterns ask for; one that has them keeps them.

    Raises:
        ValueError: if layers differ in their nodes, or a decoder is to read nodes of its own.
        UnsupportedModelError: if the model has no embeddings to put nodes behind.
    """
    tags = [tag for tag in (tag_of(module) for *_, module in self_attention_modules(model)) if tag is not None]
    reading = [tag for tag in tags if tag.pattern is not None and tag.pattern.has_lasting_nodes]
    if not reading:
        return
    pattern: Any = reading[0].pattern
    base: Any = getattr(model, "base_model", model)
    decoder = getattr(base, "decoder", None) if base.config.is_encoder_decoder else None
    is_uneven = len({tag.pattern for tag in tags if tag.stack != "decoder"}) > 1
    if is_uneven or any(tag.stack == "decoder" for tag in reading):
        raise ValueError(
            f"pattern {pattern.key!r} has nodes that live through all layers, so it has to serve all"
            f"{'' if decoder is None else ' of the encoder, and none of the decoder'}: give no layers"
        )
    if decoder is not None:
        base = base.encoder
    if isinstance(getattr(base, "sparse_nodes", None), Nodes):
        return
    held = dict(base.named_modules())
    embeddings = next((held[name] for name in (_EMBEDDINGS if decoder is None else _OF_ENCODER) if name in held), None)
    if embeddings is None:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no embeddings that nodes could be put behind, which pattern {pattern.key!r} needs"
        )
    weight, reader = next(base.parameters()), decoder if pattern.decoder_reads_nodes else None
    nodes = Nodes(pattern, base.config.hidden_size, is_read=reader is not None)
    nodes.to(device=weight.device, dtype=weight.dtype)
    layers = getattr(base, "encoder", None) or getattr(base, "transformer", None) if decoder is None else base
    nodes.hook(base, embeddings, layers, reader)
    base.sparse_nodes = nodes


def take_nodes(model: nn.Module) -> None:
    """Take the nodes from a model, and their hooks."""
    for module in list(model.modules()):
        nodes = module._modules.pop("sparse_nodes", None)
        if nodes is None:
            continue
        for hooked in module.modules():
            for hooks in (hooked._forward_pre_hooks, hooked._forward_hooks):
                for number in [n for n, hook in hooks.items() if getattr(hook, "__self__", None) is nodes]:
                    hooks.pop(number)


def reset_nodes(model: nn.Module) -> None:
    """Start the learned vectors that were not loaded."""
    for module in model.modules():
        if isinstance(module, Nodes) and not getattr(module.weight, "_is_hf_initialized", False):
            module.reset()
