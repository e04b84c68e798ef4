"""Sentences as segments: what a pattern's nodes can stand for."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# what marks the beginning or the inside of a word in a vocabulary
_WORD_MARKS = "\u0120\u2581# "
_ENDS = frozenset(".!?\u2026\u3002\uff01\uff1f")


def sentence_ids(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase, *, most: int | None = None) -> Tensor:
    """Number the sentences of tokenized texts, for ``segment_ids``.

    A sentence ends with a token of nothing but full stops, exclamation and question marks (``.!?`` and their Chinese and
    Japanese forms), the last of several in a row, or before a special token. That is right for running text; abbreviations
    split sentences too, and a quotation mark behind a full stop goes to the next one. Masked and unknown words are words, but
    a masked full stop ends nothing: number before masking.

    Args:
        input_ids: int64 ``[B, T]``.
        tokenizer: what made them.
        most: neighbouring sentences are joined so that no row has more than this many, at least 1; None joins none.

    Returns:
        int64 ``[B, T]``, from 0 on in each row; -1 for special tokens, padding among them.

    Raises:
        ValueError: if ``most`` is below 1, or the ids are no int tensor ``[B, T]`` of the tokenizer's.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        said = (
            f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(f"input_ids must be an integer tensor [batch, tokens], got {said}")
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < len(tokenizer):
        raise ValueError(f"input_ids must be from 0 to {len(tokenizer) - 1}, the ids of the tokenizer")
    if most is not None and most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    known, index = torch.unique(input_ids, return_inverse=True)
    words = tokenizer.convert_ids_to_tokens(known.tolist())
    ends = [bool(word.strip(_WORD_MARKS)) and set(word.strip(_WORD_MARKS)) <= _ENDS for word in words]
    apart = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id, tokenizer.unk_token_id}
    is_apart = torch.isin(known, torch.tensor(sorted(apart), device=known.device))[index]
    is_end = torch.tensor(ends, device=known.device)[index]
    begins = torch.nn.functional.pad((is_end | is_apart)[:, :-1], (1, 0), value=True) & ~is_apart
    begins &= ~is_end | torch.nn.functional.pad(is_apart[:, :-1], (1, 0), value=True)
    number = begins.long().cumsum(1) - 1
    if most is not None:
        # a row of special tokens alone has none
        count = (number.amax(1, keepdim=True) + 1).clamp(min=1)
        number = torch.where(count > most, number * most // count, number)
    return number.masked_fill(is_apart, -1)
