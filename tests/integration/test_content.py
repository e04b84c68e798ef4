"""Content-based patterns in models: saved with their weights, converted, recomputed, trained; and centroids that follow."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoModelForMaskedLM

import hf_sparse
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.edge_predictor import EdgePredictor
from hf_sparse.patterns.routing import Centroids
from hf_sparse.patterns.sinkhorn import SortNet
from tests.support.models import tiny_batch, tiny_model

N = 40
BAND = hf_sparse.pattern("band", radius=2)
ROUTING = hf_sparse.pattern("routing", num_clusters=4, decay=0.5) | BAND
LEARNED = hf_sparse.pattern("sinkhorn", block_size=8, sort_net="learned", max_blocks=32)
PATTERNS = {
    "reformer": hf_sparse.pattern("reformer", chunk_length=8, num_hashes=2) | BAND,
    "reformer_shared": hf_sparse.pattern("reformer", chunk_length=8, num_hashes=2, shared_query_key=True),
    "routing": ROUTING,
    "routing_nearest": hf_sparse.pattern("routing", num_clusters=4, assignment="nearest") | BAND,
    "routing_mean": hf_sparse.pattern("routing", num_clusters=4, merge="mean"),
    "sinkhorn": hf_sparse.pattern("sinkhorn", block_size=8),
    "sinkhorn_learned": LEARNED,
    "sac": hf_sparse.pattern("sac", block_size=8, edges_per_token=16, radius=2),
    "sac_token": hf_sparse.pattern("sac", granularity="token", edges_per_token=3, radius=0) | BAND,
    "some_heads": hf_sparse.by_head({range(2): BAND, range(2, 4): hf_sparse.pattern("routing", num_clusters=4)}),
}
FAMILIES = ("Bert", "DistilBert")
all_patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def sparse(pattern: Pattern, family: str = "Bert", head: str = "Model") -> Any:
    return hf_sparse.sparsify_(tiny_model(family, head), pattern).eval()


def said(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch)[0]
    return found


def states(model: nn.Module, kind: type = Centroids) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def checkpoint(model: Any, use_reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def train_step(model: Any, batch: dict[str, Tensor], *, passes: int = 1) -> dict[str, Tensor]:
    """Return gradients of so many passes, whose losses are added up before the backward pass."""
    model.train()
    model.zero_grad()
    loss = sum(model(**batch, labels=batch["input_ids"]).loss for _ in range(passes))
    loss.backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@all_patterns
def test_padding_and_neighbours_change_nothing(pattern: Pattern, family: str) -> None:
    model, batch = sparse(pattern, family), tiny_batch(N)
    real = batch["attention_mask"][1] != 0
    together = said(model, **batch)[1][real]
    alone = said(model, input_ids=batch["input_ids"][1:, real])[0]
    assert torch.allclose(together, alone, atol=1e-5)
    dense = said(tiny_model(family), **batch)
    assert not torch.allclose(said(model, **batch), dense, atol=1e-3)


@all_patterns
def test_saving_and_loading_twice_keeps_all(pattern: Pattern, tmp_path: Path) -> None:
    model, batch = sparse(pattern, "Roberta", "ForMaskedLM"), tiny_batch(N)
    for state in (*states(model), *states(model, SortNet), *states(model, EdgePredictor)):
        for tensor in (*state.parameters(), *state.buffers()):
            nn.init.normal_(tensor)
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(said(loaded, **batch), said(model, **batch))
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@all_patterns
def test_a_dense_checkpoint_converts_and_each_load_is_the_same(pattern: Pattern, tmp_path: Path) -> None:
    tiny_model("Bert", "ForMaskedLM").save_pretrained(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=256)
    assert 0 < report.density <= 1
    torch.manual_seed(1)
    one = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse").eval()
    torch.manual_seed(2)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse").eval()
    batch = tiny_batch(200)
    assert torch.equal(said(one, **batch), said(other, **batch))
    is_comparable = "shared_query_key=True" not in str(pattern)
    assert (report.wide_open_difference is not None and report.wide_open_difference < 1e-4) == is_comparable


@pytest.mark.parametrize("name", [name for name in PATTERNS if name.split("_")[0] not in ("sinkhorn", "sac")])
def test_training_goes_on_with_the_edges_of_evaluation(name: str) -> None:
    model, batch = sparse(PATTERNS[name]), tiny_batch(N)
    before = said(model, **batch)
    assert torch.equal(said(model.train(), **batch), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["reformer_shared", "routing", "sinkhorn_learned", "sac", "some_heads"])
def test_recomputed_activations_give_equal_gradients_and_centroids(name: str, use_reentrant: bool) -> None:
    plain, batch = sparse(PATTERNS[name], "Bert", "ForMaskedLM"), tiny_batch(N)
    again = copy.deepcopy(plain)
    checkpoint(again, use_reentrant)
    for _ in range(3):
        torch.manual_seed(0)
        wanted = train_step(plain, batch)
        torch.manual_seed(0)
        found = train_step(again, batch)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    for one, other in zip(states(plain), states(again), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.new_sums, other.new_sums)


def test_centroids_follow_in_training_and_rest_in_evaluation() -> None:
    model, batch = sparse(ROUTING, "Bert", "ForMaskedLM"), tiny_batch(N)
    (state, *_) = states(model)
    start = state.weight.clone()
    for _ in range(3):
        said(model, **batch)
    assert torch.equal(state.weight, start)
    assert not state.new_sums.any()
    train_step(model, batch)
    # what was seen moves them when the next pass begins
    assert torch.equal(state.weight, start)
    noted = state.new_sums.clone()
    train_step(model, batch)
    wanted = nn.functional.normalize(0.5 * start + 0.5 * noted, dim=-1)
    assert torch.allclose(state.weight, wanted, atol=1e-6)
    # what is evaluated in between moves nothing
    said(model.eval(), **batch)
    assert torch.allclose(state.weight, wanted, atol=1e-6)


def test_a_pass_that_is_not_finite_does_not_stop_the_centroids() -> None:
    model, batch = sparse(ROUTING, "Bert", "ForMaskedLM"), tiny_batch(N)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().clone()
    embedded[0, 3] = float("nan")
    model.train()
    model(inputs_embeds=embedded, labels=batch["input_ids"]).loss.backward()
    train_step(model, batch)
    held = [state.weight.clone() for state in states(model)]
    train_step(model, batch)
    for state, before in zip(states(model), held, strict=True):
        assert state.sums.isfinite().all()
        assert not torch.equal(state.weight, before)


def test_centroids_note_the_nearest_queries_and_keys() -> None:
    torch.manual_seed(0)
    state = Centroids(2, 3, 4)
    query, key = torch.randn(2, 2, 5, 4), torch.randn(2, 1, 5, 4)
    state.follow(query, key)
    state.settle()
    wanted = torch.zeros(2, 3, 4)
    for row in range(2):
        for head in range(2):
            for vector in (*query[row, head], *key[row, 0]):
                unit = vector / vector.norm()
                wanted[head, int((state.weight[head] @ unit).argmax())] += unit
    assert torch.allclose(state.new_sums, wanted, atol=1e-5)


def test_two_passes_before_one_backward_see_the_same_centroids() -> None:
    plain, batch = sparse(ROUTING, "Bert", "ForMaskedLM"), tiny_batch(N)
    again = copy.deepcopy(plain)
    checkpoint(again, False)
    for _ in range(2):
        wanted, found = (train_step(model, batch, passes=2) for model in (plain, again))
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_training_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    model, batch = sparse(ROUTING, "Bert", "ForMaskedLM"), tiny_batch(N)
    train_step(model, batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert all(state.new_sums.any() for state in states(loaded))
    for gone_on in (model, loaded):
        train_step(gone_on, batch)
    for one, other in zip(states(model), states(loaded), strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.new_sums, other.new_sums)


def test_calibration_is_lloyds_algorithm_on_the_models_own_vectors() -> None:
    model, batch = sparse(ROUTING), tiny_batch(N)
    del batch["attention_mask"]
    (state, *_) = states(model)
    # the first layer's vectors do not depend on centroids
    layer, hidden = model.encoder.layer[0].attention.self, model.embeddings(batch["input_ids"]).detach()
    query, key = (p(hidden).unflatten(-1, (4, -1)).transpose(1, 2).detach() for p in (layer.query, layer.key))
    wanted = state.weight.clone()
    for _ in range(3):
        for head in range(4):
            vectors = torch.cat([query[:, head].flatten(0, 1), key[:, head].flatten(0, 1)])
            vectors = vectors / vectors.norm(dim=1, keepdim=True)
            nearest = (vectors @ wanted[head].t()).argmax(1)
            for cluster in range(4):
                if (nearest == cluster).any():
                    total = vectors[nearest == cluster].sum(0)
                    wanted[head, cluster] = total / total.norm()
    before = said(model, **batch)
    found = hf_sparse.calibrate_(model.train(), [batch], iterations=3)
    assert found is model
    assert model.training
    model.eval()
    assert torch.allclose(state.weight, wanted, atol=1e-5)
    assert not torch.equal(said(model, **batch), before)
    for other in states(model):
        assert not other.new_sums.any()


def test_what_cannot_be_calibrated_is_said() -> None:
    with pytest.raises(ValueError, match="BertModel has no centroids"):
        hf_sparse.calibrate_(tiny_model("Bert"), [tiny_batch(N)])
    with pytest.raises(ValueError, match="needs at least one batch"):
        hf_sparse.calibrate_(sparse(ROUTING), [])
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        hf_sparse.calibrate_(sparse(ROUTING), [tiny_batch(N)], iterations=0)
    with pytest.raises(TypeError, match="a batch is a mapping such as a tokenizer returns, got Tensor"):
        hf_sparse.calibrate_(sparse(ROUTING), tiny_batch(N)["input_ids"])  # type: ignore[arg-type]
    batch = tiny_batch(N)
    batch["attention_mask"].zero_()
    with pytest.raises(ValueError, match="the batches hold no tokens"):
        hf_sparse.calibrate_(sparse(ROUTING), [batch])


def test_a_batch_read_twice_calibrates_as_once() -> None:
    once, twice = sparse(ROUTING), sparse(ROUTING)
    hf_sparse.calibrate_(once, tiny_batch(N))
    hf_sparse.calibrate_(twice, [tiny_batch(N)] * 2)
    for one, other in zip(states(once), states(twice), strict=True):
        assert torch.allclose(one.sums, other.sums, atol=1e-5)


def _train_on_a_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    model = sparse(ROUTING, "Bert", "ForMaskedLM")
    # which sends the buffers of the first rank to all
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    batch = {name: value[rank : rank + 1] for name, value in tiny_batch(N).items()}
    for _ in range(2):
        train_step(wrapped, batch)
    torch.save([(state.weight, state.new_sums) for state in states(model)], folder / f"{rank}.pt")
    torch.distributed.barrier()
    # taking down the group and the wrapped model now and then never ends: gloo's thread and this one wait for each other
    os._exit(0)


@pytest.mark.several_processes
def test_all_ranks_have_the_same_centroids_and_they_are_those_of_one_process(tmp_path: Path) -> None:
    mp.spawn(_train_on_a_rank, (tmp_path,), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = sparse(ROUTING, "Bert", "ForMaskedLM")
    for _ in range(2):
        train_step(model, tiny_batch(N))
    for a, b, alone in zip(one, other, states(model), strict=True):
        for i, wanted in enumerate((alone.weight, alone.new_sums)):
            assert torch.equal(a[i], b[i])
            assert torch.allclose(a[i], wanted, atol=1e-4)


def test_the_sorting_net_learns_through_mixture_and_choice() -> None:
    for hard in (False, True):
        pattern = hf_sparse.pattern("sinkhorn", block_size=8, sort_net="learned", max_blocks=8, hard=hard)
        model = sparse(pattern, "Bert", "ForMaskedLM")
        gradients = train_step(model, tiny_batch(N))
        for part in ("inner", "outer"):
            assert gradients[f"bert.encoder.layer.0.attention.self.sparse_state.{part}.weight"].any()


def test_noise_is_for_training_alone_and_comes_from_the_global_generator() -> None:
    model, batch = sparse(PATTERNS["sinkhorn"]), tiny_batch(N)
    assert torch.equal(said(model, **batch), said(model, **batch))
    model.train()
    torch.manual_seed(0)
    first = said(model, **batch)
    assert not torch.equal(said(model, **batch), first)
    torch.manual_seed(0)
    assert torch.equal(said(model, **batch), first)


def test_a_sorting_net_that_is_too_small_says_so() -> None:
    small = hf_sparse.pattern("sinkhorn", block_size=8, sort_net="learned", max_blocks=8)
    with pytest.raises(ValueError, match="9 blocks are more than max_blocks=8"):
        said(sparse(small), input_ids=tiny_batch(72)["input_ids"])
    with pytest.raises(ValueError, match="less than the 256 tokens of the model; raise it to 32"):
        small.check(num_layers=2, num_heads=4, length=256)


@pytest.mark.parametrize(
    "name", ["reformer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("routing", "sinkhorn", "sac"))]
)
def test_a_compiled_model_says_the_same(name: str) -> None:
    model, batch = sparse(PATTERNS[name]), tiny_batch(N)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(said(compiled, **batch), said(model, **batch), atol=1e-6)
    torch._dynamo.reset()


def test_a_name_serves_a_dense_model() -> None:
    # another test may have heard it
    AttentionInterface._global_mapping["hf_sparse:reformer"].has_warned = False
    model: Any = tiny_model("Bert", attn_implementation="hf_sparse:reformer")
    with pytest.warns(UserWarning, match="lasts for this process only"):
        out = said(model, **tiny_batch(N))
    assert out.isfinite().all()


def test_auto_model_reads_what_was_converted(tmp_path: Path) -> None:
    model = sparse(PATTERNS["sinkhorn_learned"], "DistilBert")
    model.save_pretrained(tmp_path)
    assert torch.equal(said(AutoModel.from_pretrained(tmp_path).eval(), **tiny_batch(N)), said(model, **tiny_batch(N)))
