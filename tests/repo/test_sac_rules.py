"""The oracle of SAC's picks, on examples small enough to work out by hand."""

import math

import pytest
import torch
from torch import Tensor

from tests.support import sac_rules


def weights_of(bias: dict[int, float]) -> dict[str, Tensor]:
    """Return a predictor of width 1 that looks at nothing but the distance."""
    shapes = {"enter.weight": (1, 1), "enter.bias": (1,), "pointer.weight": (1, 1), "pointer.bias": (1,)}
    shapes |= {"lstm.weight_ih": (4, 1), "lstm.weight_hh": (4, 1), "lstm.bias_ih": (4,), "lstm.bias_hh": (4,)}
    shapes |= {"start": (2, 1, 1), "distance_bias": (1, 32), "distance_code": (32, 1)}
    held = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for place, value in bias.items():
        held["distance_bias"][0, place] = value
    return held


@pytest.mark.parametrize(
    ("distance", "want"),
    [(0, 0), (-1, 1), (1, 17), (-7, 7), (-8, 8), (-11, 8), (-12, 9), (16, 26), (22, 26), (23, 27), (-90, 14), (91, 31)],
)  # fmt: skip
def test_buckets_by_hand(distance: int, want: int) -> None:
    assert sac_rules.bucket(distance) == want


def test_the_nearest_are_picked_first_where_distance_decides() -> None:
    nodes = torch.zeros(4, 1, dtype=torch.float64)
    weights = weights_of({0: 3.0, 1: 2.0, 17: 1.0})
    settings = (weights, nodes, nodes, 0)
    assert sac_rules.greedy(*settings, 1, 3, is_causal=False) == [1, 0, 2]
    assert sac_rules.greedy(*settings, 1, 3, is_causal=True) == [1, 0]
    # e^3 of e^3 + e^2 + e + 1, then e^2 of what is left
    want = math.log(math.e**3 / (math.e**3 + math.e**2 + math.e + 1) * math.e**2 / (math.e**2 + math.e + 1))
    assert sac_rules.log_probability(*settings, 1, [1, 0], is_causal=False).item() == pytest.approx(want)


def test_a_step_of_the_lstm_by_hand() -> None:
    weights = weights_of({})
    # the new value alone depends on the vector; gates stand half open
    weights["lstm.weight_ih"][2] = 1.0
    weights["enter.weight"][0, 0] = weights["pointer.weight"][0, 0] = 1.0
    weights["start"][1] = 0.6
    nodes = torch.tensor([[2.0], [-3.0]], dtype=torch.float64)
    cell = 0.5 * 0.6 + 0.5 * math.tanh(2.0)
    output = 0.5 * math.tanh(cell)
    got = sac_rules.logits(weights, nodes, nodes, 0, 0, [], is_causal=False)
    assert got.tolist() == pytest.approx([2.0 * output, -3.0 * output])


def test_causal_blocks_ask_with_what_came_before_them() -> None:
    hidden = torch.arange(1.0, 6.0, dtype=torch.float64)[:, None]
    asked, offered = sac_rules.nodes_of(hidden, 2, is_causal=True, is_token=False)
    assert asked[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert offered[:, 0].tolist() == [1.5, 3.5, 5.0]


def test_edges_drawn_by_hand() -> None:
    got = sac_rules.edges([[1], [1], [0]], 5, 2, 0, is_causal=False)
    want = ["x.xx.", ".xxx.", "..xx.", "..xx.", "xx..x"]
    assert torch.equal(got, torch.tensor([[mark == "x" for mark in row] for row in want]))
    assert torch.equal(sac_rules.edges([[1], [1], [0]], 5, 2, 0, is_causal=True), got.tril())
