"""Segments are the stretches of real tokens, each counted from its own first one."""

import pytest
import torch

import hf_sparse
from hf_sparse.segments import Segment, find_segments


def bools(*rows: str) -> torch.Tensor:
    """Read a mask, one string a row."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_without_masks_each_row_is_one_segment() -> None:
    assert find_segments(2, 5) == [Segment(0, 0, 5), Segment(1, 0, 5)]


def test_padding_at_the_ends_is_cut_off_and_holes_are_kept() -> None:
    mask = bools("..xx.", "x.x.x", ".....", "xxxxx")
    wanted = [Segment(0, 2, 4), Segment(1, 0, 5, (1, 3)), Segment(3, 0, 5)]
    assert find_segments(4, 5, key_padding_mask=mask) == wanted


def test_a_padded_length_keeps_the_padding_as_invalid() -> None:
    mask = bools("..xx.", "xxxxx", ".....")
    wanted = [Segment(0, 0, 5, (0, 1, 4)), Segment(1, 0, 5)]
    assert find_segments(3, 5, key_padding_mask=mask, reads_padding=True) == wanted


def test_documents_are_segments_and_negative_ids_are_padding() -> None:
    ids = torch.tensor([[4, 4, 0, -1, 7], [-1, 1, 1, 1, -1]])
    wanted = [Segment(0, 0, 2), Segment(0, 2, 3), Segment(0, 4, 5), Segment(1, 1, 4)]
    assert find_segments(2, 5, document_ids=ids) == wanted


def test_padding_inside_a_document_belongs_to_it() -> None:
    ids, mask = torch.tensor([[0, 0, 0, 1, 1, 1]]), bools("x.xx..")
    assert find_segments(1, 6, document_ids=ids, key_padding_mask=mask) == [Segment(0, 0, 3, (1,)), Segment(0, 3, 4)]


def test_global_positions_count_from_the_start_of_the_segment() -> None:
    mask, is_global = bools("..xxx", "xxxx."), bools("x.x.x", ".....")
    wanted = [Segment(0, 2, 5, (), (0, 2)), Segment(1, 0, 4, (), ())]
    assert find_segments(2, 5, key_padding_mask=mask, global_mask=is_global) == wanted


def test_segments_are_alike_when_only_the_row_differs() -> None:
    segment = Segment(0, 2, 5, (1,), (0,))
    assert segment.is_like(Segment(3, 2, 5, (1,), (0,)), 0)
    assert Segment(3, 2, 5, (1,), (0,)).is_like(segment, 3)
    for other in (Segment(1, 1, 5, (1,), (0,)), Segment(1, 2, 5, (), (0,)), Segment(1, 2, 5, (1,), None)):
        assert not other.is_like(segment, 1)


@pytest.mark.parametrize("key", sorted(hf_sparse.PATTERNS))
@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_no_tokens_give_no_output(key: str, backend: str) -> None:
    empty = torch.zeros(1, 2, 0, 4)
    out = hf_sparse.sparse_attention(empty, empty, empty, hf_sparse.pattern(key), backend=backend)
    assert out.shape == (1, 2, 0, 4)
