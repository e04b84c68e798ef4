"""A plan by layer: the best there is within its budget, what it chooses from, and its way into a checkpoint."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

import hf_sparse
from hf_sparse.conversion import layer_plan
from hf_sparse.conversion.layer_plan import (
    LEVELS,
    LayerPlan,
    best_choice,
    candidates,
    choose,
    pattern_name,
    sized,
    systems,
)
from hf_sparse.conversion.target import Layer
from hf_sparse.integration.layers import self_attention_modules, tag_of

LENGTH = 64
BIDIRECTIONAL = [Layer("", index, 4, False, None) for index in range(3)]
CAUSAL = [Layer("", index, 4, True, None) for index in range(3)]


def by_brute_force(gains: list[list[float]], costs: list[list[int]], budget: int) -> float:
    """Return the most that any assignment within the budget gains."""
    every = itertools.product(*(range(len(held)) for held in gains))
    within = (held for held in every if sum(cost[at] for cost, at in zip(costs, held, strict=True)) <= budget)
    return max(sum(gain[at] for gain, at in zip(gains, held, strict=True)) for held in within)


@pytest.mark.parametrize("seed", range(30))
def test_no_assignment_gains_more_than_the_choice(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(1, 5)
    costs = [[draw.randint(0, 30) for _ in range(draw.randint(1, 6))] for _ in range(layers)]
    # eighths add up without rounding
    gains = [[draw.randint(0, 40) / 8 for _ in held] for held in costs]
    budget = draw.randint(sum(map(min, costs)), sum(map(max, costs)))
    chosen = best_choice(gains, costs, budget)
    assert sum(cost[at] for cost, at in zip(costs, chosen, strict=True)) <= budget
    assert sum(gain[at] for gain, at in zip(gains, chosen, strict=True)) == by_brute_force(gains, costs, budget)
    assert best_choice(gains, costs, budget) == chosen


def test_of_equal_gains_the_cheaper_wins_and_then_the_earlier() -> None:
    assert best_choice([[1.0, 1.0, 1.0]], [[5, 3, 3]], 9) == [1]


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the cheapest choice costs 7, more than the budget of 6"):
        best_choice([[1.0, 2.0], [1.0]], [[3, 9], [4]], 6)


@pytest.mark.parametrize("layer", [BIDIRECTIONAL[0], CAUSAL[0]], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("name", systems(LENGTH))
def test_a_system_is_sized_to_the_largest_that_fits(name: str, layer: Layer) -> None:
    make, sizes = systems(LENGTH)[name]

    def density(pattern: hf_sparse.Pattern) -> float:
        return float(pattern.mask(LENGTH, heads=4, is_causal=layer.is_causal).double().mean())

    found = sized(name, 0.2, layer, LENGTH)
    if found is None:
        assert density(make(sizes[0])) > 0.2
        return
    assert density(found) <= 0.2
    at = next(at for at, size in enumerate(sizes) if make(size) == found)
    assert at + 1 == len(sizes) or density(make(sizes[at + 1])) > 0.2


def test_candidates_stand_about_the_budget_and_may_be_dense() -> None:
    held = candidates(BIDIRECTIONAL[0], 0.1, LENGTH, LENGTH)
    assert held[0] is None
    assert len(set(held)) == len(held) > 3 * len(LEVELS)
    assert {pattern.key for pattern in held if pattern is not None} >= {"band", "longformer", "dilated", "strided"}
    assert not any(pattern is not None and (pattern.is_content_based or pattern.has_nodes) for pattern in held)


def test_inside_a_sliding_window_only_what_stays_inside_is_a_candidate() -> None:
    held = candidates(Layer("", 0, 4, True, 9), 0.1, LENGTH, 4 * LENGTH)
    assert {pattern.key for pattern in held if pattern is not None} <= {"band", "dilated", "block_local"}
    assert len(held) > 1


def plan_of(budget: float, kept: Any = None, layers: list[Layer] = BIDIRECTIONAL) -> LayerPlan:
    options = [candidates(layer, budget, LENGTH, LENGTH) for layer in layers]
    if kept is None:
        # from layer to layer a share of the pairs keeps more
        kept = [
            [1.0 if one is None else one.density(LENGTH) ** (1 / (1 + layer.index)) for one in held]
            for layer, held in zip(layers, options, strict=True)
        ]
    return choose(layers, options, kept, budget=budget, length=LENGTH, texts=1)


@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_a_plan_stays_within_its_budget(budget: float) -> None:
    plan = plan_of(budget)
    assert plan.density <= budget
    assert [choice.layer for choice in plan.choices] == ["0", "1", "2"]
    for choice in plan.choices:
        want = (
            1.0
            if choice.pattern is None
            else choice.pattern.mask(LENGTH, heads=4, layer=int(choice.layer)).double().mean()
        )
        assert choice.density == pytest.approx(float(want), abs=1e-12)


def test_a_budget_for_everything_leaves_all_layers_dense() -> None:
    plan = plan_of(1.0)
    assert [choice.pattern for choice in plan.choices] == [None] * 3
    assert plan.layers == dict.fromkeys("012", "dense")
    assert (plan.density, plan.kept) == (1.0, 1.0)


def test_the_layer_that_needs_it_stays_dense_where_the_budget_pays() -> None:
    options = [candidates(layer, 0.4, LENGTH, LENGTH) for layer in BIDIRECTIONAL]
    # the first layers lose nothing, the last one all that it does not read
    kept = [
        [1.0 if layer.index < 2 or one is None else one.density(LENGTH) / 2 for one in held]
        for layer, held in zip(BIDIRECTIONAL, options, strict=True)
    ]
    plan = plan_of(0.4, kept)
    assert plan.choices[2].pattern is None
    assert all(choice.density < 0.1 for choice in plan.choices[:2])


def test_a_budget_that_nothing_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density 0\.001 is too little for pieces of 64 tokens.*raise density"):
        plan_of(0.001)


def test_a_plan_goes_through_a_checkpoint_unchanged(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_plan, "LEVELS", (0.5, 1.0))
    text = tmp_path / "text.txt"
    text.write_text("every long page of the river reads a stone word " * 60)
    plan = hf_sparse.plan_layers(bert, text, 0.3, length=48)
    assert plan == hf_sparse.plan_layers(bert, text, 0.3, length=48)
    assert plan.density <= 0.3
    hf_sparse.convert(bert, tmp_path / "sparse", plan.pattern, layers=plan.layers, verify=False)
    held = json.loads((tmp_path / "sparse/config.json").read_text())["sparse_attention"]
    assert held == plan.entry.to_dict()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")
    tags = [tag_of(module) for *_, module in self_attention_modules(model)]
    assert [None if tag is None else tag.pattern for tag in tags] == [choice.pattern for choice in plan.choices]
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    with torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("density", [0, -0.1, 1.5, True, "much"])
def test_a_budget_that_is_no_share_is_refused(density: Any, bert: Path) -> None:
    with pytest.raises(ValueError, match=r"density must be above 0 and at most 1, a share of all pairs of tokens; got"):
        hf_sparse.plan_layers(bert, "text.txt", density)


def test_a_pattern_is_named_by_what_differs_from_its_defaults() -> None:
    band = hf_sparse.pattern("band", radius=3)
    assert pattern_name(band) == "band(radius=3)"
    assert pattern_name(band | hf_sparse.pattern("global")) == "band(radius=3) | global()"
    assert pattern_name(hf_sparse.pattern("global", positions=tuple(range(9)))) == "global(positions=[0, ..., 8])"
    assert pattern_name(hf_sparse.by_head({range(2): band, 2: hf_sparse.pattern("strided")})) == (
        "heads 0, 1: band(radius=3); heads 2: strided()"
    )
    assert pattern_name(None) == "dense"
