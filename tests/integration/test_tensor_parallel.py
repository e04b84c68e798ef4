"""Tensor parallelism: each rank holds some heads of a layer, and their patterns are those of these heads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse.integration.attention import attend
from hf_sparse.integration.layers import share_heads_
from tests.support.models import tiny_model
from tests.support.ranks import run_on_two
from tests.support.zoo import tiny_of_type

pytestmark = pytest.mark.usefixtures("one_thread")
BY_HEAD = hf_sparse.by_head(
    {
        0: hf_sparse.pattern("band", radius=1),
        range(1, 4): hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=1),
    }
)


class _Mesh:
    """What transformers keeps of the ranks, on the second of two."""

    ndim = 1

    def get_local_rank(self) -> int:
        return 1


def on_second_rank(model: Any) -> Any:
    model._tp_size, model._device_mesh = 2, _Mesh()
    return model


def test_the_second_rank_has_the_patterns_of_its_heads() -> None:
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), BY_HEAD)
    module = model.encoder.layer[1].attention.self
    torch.manual_seed(0)
    states = torch.randn(3, 2, 4, 40, 8).unbind()
    whole, _ = attend(module, *states, None, is_causal=False)
    share_heads_(on_second_rank(model))
    half, _ = attend(module, *(held[:, 2:] for held in states), None, is_causal=False)
    torch.testing.assert_close(half, whole[:, :, 2:])
    # a plan that leaves attention whole
    again, _ = attend(module, *states, None, is_causal=False)
    assert torch.equal(again, whole)


def test_weights_of_patterns_are_not_spread() -> None:
    model = on_second_rank(tiny_model("Bert"))
    with pytest.raises(hf_sparse.UnsupportedModelError, match=r"owns weights \(GlobalProjections\).*without tp_plan"):
        hf_sparse.sparsify_(model, hf_sparse.pattern("longformer", window=8))


@pytest.mark.several_processes
@pytest.mark.slow
def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    hf_sparse.sparsify_(tiny_of_type("llama"), BY_HEAD).save_pretrained(tmp_path / "sparse")
    run_on_two("tests.ranks.heads", str(tmp_path))
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["size"] == 2
    assert said["off"] < 1e-5
    assert "4 heads are on this rank" in said["named"]
