"""The baseline that people use today: a dense model that reads each chunk of a document alone."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.integration.vision import image_pixels


def read_in_chunks_(model: PreTrainedModel, chunk: int) -> None:
    """Let a dense model read its input chunk by chunk, in place.

    What it says of tokens is put together again. Of what it says of whole chunks, the mean is taken, and the largest where
    there may be several labels: a document has a label if a chunk has it. The loss is of what was put together. An encoder and
    decoder encode the chunks alone, and decode from all of them.

    Args:
        model: with any head whose labels are of tokens or of documents.
        chunk: tokens of a chunk; longer inputs are a multiple of it. Images are cut into tiles of the model's image size.

    Source: chunks that a decoder reads together are those of Ivgi et al. 2022, arXiv:2208.00748.
    """
    held: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    make = _tiled if model.main_input_name == "pixel_values" else _chunked
    held.__class__ = make(type(held), chunk)


def _chunked(parent: Any, chunk: int) -> type:
    class Chunked(parent):
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            start_positions: Tensor | None = None,
            end_positions: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            rows, length = input_ids.shape
            if length <= chunk:
                given = {"labels": labels, "start_positions": start_positions, "end_positions": end_positions, **kwargs}
                named = {name: value for name, value in given.items() if value is not None}
                return parent.forward(self, input_ids=input_ids, attention_mask=attention_mask, **named)
            if length % chunk:
                raise ValueError(f"inputs of {length} tokens are no multiple of chunks of {chunk}")
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            # chunks of padding alone are not read
            is_read = mask.view(-1, chunk).any(1)
            fields = {"input_ids": input_ids, "attention_mask": mask, **kwargs}
            pieces = {
                name: value.reshape(-1, chunk)[is_read]
                if isinstance(value, Tensor) and value.shape == (rows, length)
                else value
                for name, value in fields.items()
            }
            # returned as a dictionary, whatever is asked for: its fields are put together one by one
            found = parent.forward(self, **{**pieces, "return_dict": True})
            for name, value in found.items():
                if isinstance(value, Tensor) and value.shape[:1] == (int(is_read.sum()),):
                    found[name] = _together(value, is_read, rows, chunk, self.config)
            # an encoder may be handed what its decoder learns from
            if labels is not None and "logits" in found:
                found["loss"] = _loss(found["logits"], labels)
            elif start_positions is not None and end_positions is not None:
                wanted = ((found["start_logits"], start_positions), (found["end_logits"], end_positions))
                found["loss"] = sum(torch.nn.functional.cross_entropy(logits, at) for logits, at in wanted) / 2
            return found

    return _named_as(parent, Chunked)


def _tiled(parent: Any, _: int) -> type:
    class Tiled(parent):
        def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            height, width = image_pixels(self.config)
            down, right = (-size % tile for size, tile in zip(pixel_values.shape[2:], (height, width), strict=True))
            pixels = torch.nn.functional.pad(pixel_values, (0, right, 0, down))
            tiles = pixels.unfold(2, height, height).unfold(3, width, width).permute(0, 2, 3, 1, 4, 5)
            found = parent.forward(self, pixel_values=tiles.flatten(0, 2), **{**kwargs, "return_dict": True})
            is_read = torch.ones(len(found["logits"]), dtype=torch.bool, device=pixels.device)
            found["logits"] = _together(found["logits"], is_read, len(pixels), 0, self.config)
            if labels is not None:
                found["loss"] = _loss(found["logits"], labels)
            return found

    return _named_as(parent, Tiled)


def _named_as(parent: Any, made: type) -> type:
    """Return a class that is saved and loaded as its parent."""
    made.__name__ = made.__qualname__ = parent.__name__
    made.__module__ = parent.__module__
    return made


def _together(value: Tensor, is_read: Tensor, rows: int, chunk: int, config: Any) -> Tensor:
    """Return what was said of the chunks that were read as what is said of rows."""
    is_of_tokens = value.dim() > 1 and value.shape[1] == chunk
    is_largest = config.problem_type == "multi_label_classification"
    # a score where nothing was read is no candidate
    fill = torch.finfo(value.dtype).min if (value.dim() == 2 and is_of_tokens) or is_largest else 0.0
    whole = value.new_full((len(is_read), *value.shape[1:]), fill)
    whole[is_read] = value
    if is_of_tokens:
        return whole.view(rows, -1, *value.shape[2:])
    parts = whole.view(rows, -1, *value.shape[1:])
    if is_largest:
        return parts.amax(1)
    count = is_read.view(rows, -1).sum(1).clamp(min=1)
    return parts.sum(1) / count.view(-1, *[1] * (value.dim() - 1))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
