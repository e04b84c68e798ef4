"""Nodes for segments that come with the call: padded and packed rows against loops that number the nodes themselves."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns.labels import RelativeLabels
from tests.pattern_cases import BACKENDS, HEADS, attention
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH, ROOM, RADIUS = 4, 6, 2
both_backends = pytest.mark.parametrize("backend", BACKENDS)
HARD = {
    "soft": {},
    "hard_g2l": {"hard_global_to_long": True},
    "hard_l2g": {"hard_long_to_global": True},
    "hard": {"hard_global_to_long": True, "hard_long_to_global": True},
}


@dataclass(frozen=True)
class Row:
    """A row written as three strings: a letter for each token's segment, a digit for its document, a dot for none."""

    segments: str
    documents: str
    real: str

    @property
    def nodes(self) -> list[set[int]]:
        """The tokens of each node, in order."""
        found: list[set[int]] = []
        for t, name in enumerate(self.segments):
            if name == "." or self.real[t] == "." or self.documents[t] == ".":
                continue
            goes_on = t and name == self.segments[t - 1] and self.documents[t] == self.documents[t - 1]
            if goes_on:
                found[-1].add(t)
            else:
                found.append({t})
        return found

    def document(self, position: int) -> str:
        """Return the document of a token or node; a dot for padding and for nodes that are not there."""
        tokens = len(self.segments)
        if position >= tokens:
            nodes = self.nodes
            return self.documents[min(nodes[position - tokens])] if position - tokens < len(nodes) else "."
        return self.documents[position] if self.real[position] != "." else "."

    def reads(self, q: int, k: int, *, hard_global_to_long: bool = False, hard_long_to_global: bool = False) -> bool:
        """Say whether a token or node reads another."""
        n = len(self.segments)
        if self.document(q) != self.document(k) or self.document(q) == ".":
            return False
        if q < n and k < n:
            return abs(q - k) <= RADIUS
        if q < n:
            return not hard_long_to_global or q in self.nodes[k - n]
        return k >= n or not hard_global_to_long or k in self.nodes[q - n]


ROWS = {
    "sentences": (
        Row(".aaabbbbbcc.", "000000000000", "xxxxxxxxxxxx"),
        Row("aaaaaaaaaaaa", "000000000000", "xxxxxxxxxxxx"),
    ),
    "padded": (
        Row(".aabbbb.....", "000000000000", "xxxxxxxx...."),
        Row("..aabbbccdd.", "000000000000", "..xxxxxxxxxx"),
    ),
    "packed": (
        Row(".aabb.aab.aa", "000000111222", "xxxxxxxxxxxx"),
        Row("aaaaaaaaaa..", "000111222...", "xxxxxxxxx..."),
    ),
    "one_token_each": (Row("abcdef", "000000", "xxxxxx"), Row("......", "000000", "xxxxxx")),
    "a_document_without": (Row("aab...cc", "00011122", "xxxxxxxx"), Row("....aabb", "00001111", "xxxxxxxx")),
}
all_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def ids_of(texts: Iterable[str]) -> Tensor:
    """Return letters and digits as numbers, dots as -1, with room for nodes behind that nobody reads."""
    return torch.tensor([[-1 if c == "." else ord(c) for c in text] + [99] * ROOM for text in texts])


def settings_of(rows: tuple[Row, ...]) -> dict[str, Any]:
    is_real = torch.tensor([[c != "." for c in row.real] + [True] * ROOM for row in rows])
    return {
        "key_padding_mask": None if is_real.all() else is_real,
        "document_ids": ids_of(row.documents for row in rows),
        "segment_ids": ids_of(row.segments for row in rows),
    }


def mask_of(rows: tuple[Row, ...], **hard: bool) -> Tensor:
    total = len(rows[0].segments) + ROOM
    return torch.tensor([[[row.reads(q, k, **hard) for k in range(total)] for q in range(total)] for row in rows])[
        :, None
    ].expand(-1, HEADS, -1, -1)


def given(**fields: Any) -> hf_sparse.Pattern:
    return hf_sparse.pattern("etc", radius=RADIUS, num_global=ROOM, segments="given", **fields)


@both_backends
@pytest.mark.parametrize("hard", HARD.values(), ids=HARD)
@all_rows
def test_outputs_and_gradients_equal_the_loops(rows: tuple[Row, ...], hard: dict[str, bool], backend: str) -> None:
    tensors = random_tensors(batch=2, tokens=len(rows[0].segments) + ROOM, key_heads=2, width=WIDTH)
    mask = mask_of(rows, **hard)
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask), tensors)
    attend = attention(given(**hard), backend=backend, return_lse=True, **settings_of(rows))
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=mask.shape[-1] + WIDTH)


def label(row: Row, q: int, k: int, most: int) -> int:
    """Return the label of a pair: of rows of tokens and of nodes; a distance, or whether the token is of the node."""
    n = len(row.segments)
    if (q < n) == (k < n):
        lag = k - q
        kind = min(lag, most) if lag >= 0 else most + min(-lag, most)
    else:
        kind = 2 * most + 1 + (min(q, k) in row.nodes[max(q, k) - n])
    return kind + (2 * most + 3) * (q >= n)


@both_backends
@all_rows
def test_labels_tell_the_tokens_of_a_node(rows: tuple[Row, ...], backend: str) -> None:
    most, pattern = 3, given(max_relative_distance=3)
    state: Any = pattern.make_state(hidden_size=8, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    assert isinstance(state, RelativeLabels)
    torch.manual_seed(1)
    for parameter in state.double().parameters():
        torch.nn.init.normal_(parameter)
    mask = mask_of(rows)
    total = mask.shape[-1]
    # what is no edge has any label
    labels = torch.tensor(
        [
            [[label(row, q, k, most) if row.reads(q, k) else 0 for k in range(total)] for q in range(total)]
            for row in rows
        ]
    )

    def looped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        added = torch.einsum("bhqd,bqkhd->bhqk", query, state.keys.detach()[labels])
        added = (added + state.bias.detach()[labels].permute(0, 3, 1, 2)) * WIDTH**-0.5
        return attend_by_rows(query, key, value, mask, bias=added)[0]

    tensors = random_tensors(batch=2, tokens=total, width=WIDTH)
    ours = attention(pattern, backend=backend, state=state, **settings_of(rows))
    for actual, oracle in zip(with_gradients(ours, tensors), with_gradients(looped, tensors), strict=True):
        assert_same_maths(actual, oracle, terms=total + WIDTH)


@both_backends
def test_many_segments_of_uneven_length_equal_the_loops(backend: str) -> None:
    """More nodes than have their lists made together, and lengths from one token to a hundred."""
    torch.manual_seed(0)
    lengths = [100, *torch.randint(1, 6, (50,)).tolist()]
    n, room = sum(lengths), 60
    row = Row("".join("ab"[i % 2] * size for i, size in enumerate(lengths)), "0" * n, "x" * n)
    nodes = row.nodes
    assert len(nodes) == len(lengths)
    owner = {token: node for node, held in enumerate(nodes) for token in held}
    mask = torch.zeros(n + room, n + room, dtype=torch.bool)
    for q in range(n):
        mask[q, max(q - RADIUS, 0) : min(q + RADIUS + 1, n)] = True
        mask[q, n + owner[q]] = mask[n + owner[q], q] = True
    mask[n : n + len(nodes), n : n + len(nodes)] = True
    pattern = hf_sparse.pattern("etc", radius=RADIUS, num_global=room, segments="given", **HARD["hard"])
    tensors = random_tensors(tokens=n + room, heads=1, width=WIDTH)
    ids = torch.tensor([[ord(c) for c in row.segments] + [0] * room])
    attend = attention(pattern, backend=backend, segment_ids=ids)
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask[None, None])[0], tensors)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + room + WIDTH)


def test_rows_and_documents_do_not_touch_each_other() -> None:
    rows = ROWS["packed"]
    tensors = random_tensors(batch=2, tokens=12 + ROOM, width=WIDTH)
    attend = attention(given(), **settings_of(rows))
    before = attend(*tensors)
    # the second document of the first row: tokens 6 to 8, whose nodes are 2 and 3
    changed = [tensor.clone() for tensor in tensors]
    at = torch.tensor([6, 7, 8, 12 + 2, 12 + 3])
    for tensor in changed:
        tensor[0, :, at] += 1.0
    is_other = torch.ones(12 + ROOM, dtype=torch.bool)
    is_other[at] = False
    after = attend(*changed)
    assert torch.equal(before[0, :, is_other], after[0, :, is_other])
    assert torch.equal(before[1], after[1])
    assert (before[0, :, at] != after[0, :, at]).any(-1).all()


def test_a_segment_of_nothing_but_padding_has_no_node() -> None:
    tensors = random_tensors(tokens=9 + ROOM, width=WIDTH)
    is_real = torch.ones(1, 9 + ROOM, dtype=torch.bool)
    is_real[0, 3:6] = False
    # the hole has a name of its own
    names = ids_of(["aaabbbccc"])
    out, lse = attention(given(), segment_ids=names, key_padding_mask=is_real, return_lse=True)(*tensors)
    used = lse[0, 0, 9:].isfinite().tolist()
    assert used == [True, True, *[False] * (ROOM - 2)]
    assert not out[:, :, 3:6].any()


def test_opened_wide_segments_need_not_be_given() -> None:
    opened = given(hard_global_to_long=True).wide_open(12)
    assert not opened.takes_segments
    assert opened.mask(12)[0, :12, :12].all()


def test_what_the_segments_must_be_is_said() -> None:
    tensors = random_tensors(tokens=12 + ROOM, width=WIDTH)
    with pytest.raises(ValueError, match=r"needs segment_ids .*hf_sparse.sentence_ids"):
        attention(given())(*tensors)
    with pytest.raises(
        ValueError, match="segment_ids were given, but the nodes of pattern 'etc' stand for no segments"
    ):
        attention(hf_sparse.pattern("etc", num_global=ROOM), segment_ids=ids_of(["a" * 12]))(*tensors)
    with pytest.raises(ValueError, match="row 0 has 7 segments, and the pattern has room for num_global=6"):
        attention(given(), segment_ids=ids_of(["abcdefgggggg"]))(*tensors)
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        attention(given(), segment_ids=ids_of(["a" * 5]))(*tensors)
    with pytest.raises(TypeError, match="segments must be a whole number, 'given' or none, got 'sentences'"):
        hf_sparse.pattern("etc", segments="sentences")


def test_drawn_without_a_call_segments_are_equal_shares() -> None:
    drawn = given(hard_long_to_global=True).mask(12)[0]
    for token in range(12):
        assert drawn[token, 12:].nonzero()[:, 0].tolist() == [token // 2]
