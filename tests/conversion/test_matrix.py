"""One matrix: every family that is named in the documentation, against everything a converted checkpoint has to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    pipeline,
)

import hf_sparse
from hf_sparse.integration.auto import sparse_model_class
from tests.support.checkpoints import tree
from tests.support.masked_models import under_a_mask
from tests.support.rounding import assert_within_rounding
from tests.support.zoo import inputs_of, said_of, tiny_of_type

pytestmark = pytest.mark.usefixtures("one_thread")

# wider than the sliding windows of those that have some
RADIUS = 10
BAND = hf_sparse.pattern("band", radius=RADIUS)
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
ENCODERS: dict[str, dict[str, Any]] = {
    **{
        name: {} for name in ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "albert", "electra", "ernie")
    },
    # as it is published, without norms, the numbers of a random model grow, and rounding with them
    "mobilebert": {"normalization_type": "layer_norm"},
    "modernbert": _WINDOWS,
}
DECODERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("gpt2", "gpt_neox", "opt", "llama", "qwen2", "qwen3", "olmo2")},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "gemma2": _WINDOWS,
    "gemma3_text": _WINDOWS,
}
PAIRS: dict[str, dict[str, Any]] = {name: {} for name in ("bart", "mbart", "pegasus", "t5", "mt5", "umt5", "whisper")}
IMAGES: dict[str, dict[str, Any]] = {
    name: {} for name in ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model")
}
# its attention has a bias for every pair unless its config says otherwise
IMAGES["beit"] = {"use_absolute_position_embeddings": True, "use_relative_position_bias": False}
FAMILIES = {**ENCODERS, **DECODERS, **PAIRS, **IMAGES}
# what a model holds and this pass does not use, or never learns
UNUSED = ("pooler", "post_layernorm", "mask_token", "embed_positions")
# their code is that of another, and other tests convert them as well
KIN = ("camembert", "xlm-roberta", "mt5", "qwen3", "dinov2_with_registers")
every_family = pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=pytest.mark.slow if name in KIN else ()) for name in FAMILIES]
)


@dataclass(frozen=True)
class Made:
    """A tiny checkpoint, converted."""

    dense: PreTrainedModel
    sparse: Path
    inputs: dict[str, Tensor]
    report: hf_sparse.ConversionReport

    def load(self, *, opened: bool = False) -> PreTrainedModel:
        """Return the sparse model, its pattern wide open on demand."""
        config = AutoConfig.from_pretrained(self.sparse)
        if opened:
            config.sparse_attention["pattern"] = hf_sparse.pattern("band", radius=100).to_dict()
        model: PreTrainedModel = sparse_model_class(type(self.dense)).from_pretrained(self.sparse, config=config)
        return model.eval()


_MADE: dict[str, Made] = {}


@pytest.fixture
def made(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A family's checkpoint; converted once."""
    if model_type not in _MADE:
        folder = tmp_path_factory.mktemp(model_type)
        dense = tiny_of_type(model_type, **FAMILIES[model_type])
        dense.save_pretrained(folder / "dense")
        report = hf_sparse.convert(folder / "dense", folder / "sparse", BAND)
        _MADE[model_type] = Made(dense, folder / "sparse", inputs_of(dense), report)
    return _MADE[model_type]


def exactly(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a model says in float64."""
    exact = model.double()
    try:
        return said_of(exact, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    finally:
        model.float()


@every_family
def test_wide_open_it_says_what_its_source_says(made: Made, model_type: str) -> None:
    assert made.report.wide_open_difference is not None
    got, plain = said_of(made.load(opened=True), made.inputs), said_of(made.dense, made.inputs)
    assert_within_rounding(got, exactly(made.dense, made.inputs), plain)


@every_family
def test_sparse_it_says_what_its_source_says_under_the_mask(made: Made, model_type: str) -> None:
    got = said_of(made.load(), made.inputs)
    with under_a_mask(made.dense, lambda q, k: abs(q - k) <= RADIUS) as masked:
        plain, exact = said_of(masked, made.inputs), exactly(masked, made.inputs)
    assert_within_rounding(got, exact, plain)
    # and the mask leaves something out
    assert (got - said_of(made.dense, made.inputs)).abs().max() > 1e-3 * got.abs().max()


@every_family
def test_it_takes_a_training_step_and_is_saved_and_loaded_twice(made: Made, model_type: str, tmp_path: Path) -> None:
    model = made.load().train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    said = model(**made.inputs)
    found = said.logits if hasattr(said, "logits") else said.last_hidden_state
    found.square().mean().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert [name for name in lacking if not any(part in name for part in UNUSED)] == []
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "once")
    again = type(model).from_pretrained(tmp_path / "once").eval()
    again.save_pretrained(tmp_path / "twice")
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")
    assert torch.equal(said_of(again, made.inputs), said_of(model, made.inputs))


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many words as the models have."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{number}" for number in range(59))]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    roles = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **roles)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_the_pipeline_fills_a_mask(made: Made, model_type: str) -> None:
    fill = pipeline("fill-mask", model=made.load(), tokenizer=tokenizer())
    text = " ".join(["w3 <mask>", *(f"w{number}" for number in range(30))])
    said = fill(text, top_k=1)[0]
    logits = made.load()(**tokenizer()(text, return_tensors="pt", return_token_type_ids=False)).logits
    assert said["token"] == logits[0, 1].argmax()


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_pipeline_writes_on(made: Made, model_type: str) -> None:
    model = made.load()
    model.generation_config.update(eos_token_id=None, pad_token_id=1)
    text = " ".join(f"w{number}" for number in range(30))
    ids = tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer())
    settings = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(**ids, **settings, use_cache=False)
    assert write(text, return_tensors=True, **settings)[0]["generated_token_ids"] == wanted[0].tolist()


@pytest.mark.parametrize("model_type", [name for name in IMAGES if name != "clip_vision_model"])
def test_the_pipeline_says_what_an_image_shows(made: Made, model_type: str) -> None:
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    image = Image.new("RGB", (20, 20), (200, 30, 90))
    classify = pipeline("image-classification", model=made.load(), image_processor=processor)
    logits = made.load()(**processor(image, return_tensors="pt")).logits
    assert classify(image, top_k=1)[0]["label"] == made.load().config.id2label[logits.argmax().item()]


def test_the_pipeline_gives_features_of_an_image(tmp_path: Path) -> None:
    model = hf_sparse.sparsify_(tiny_of_type("clip_vision_model"), BAND).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    image = Image.new("RGB", (20, 24), (200, 30, 90))
    found = pipeline("image-feature-extraction", model=model, image_processor=processor)(image)
    with torch.no_grad():
        wanted = model(**processor(image, return_tensors="pt")).last_hidden_state
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "bart", "mbart"])
def test_the_pipeline_gives_features_of_a_text(made: Made, model_type: str) -> None:
    text = " ".join(f"w{number}" for number in range(30))
    model = made.load()
    found = pipeline("feature-extraction", model=model, tokenizer=tokenizer())(text)
    with torch.no_grad():
        wanted = model(**tokenizer()(text, return_tensors="pt", return_token_type_ids=False))[0]
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-6)


# peft takes seconds to import
@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in ("gpt2", "t5") else pytest.mark.slow) for name in FAMILIES]
)
# peft 0.21 under transformers 5.23
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_is_saved_reloaded_and_merged(made: Made, model_type: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs hf-sparse[peft]")
    base = made.load()
    targets = hf_sparse.lora_targets(base)
    assert {name.rpartition(".")[0] for name in targets} == {
        name for name, module in base.named_modules() if hasattr(module, "_sparse") and module._sparse.stack != "cross"
    }
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=model_type == "gpt2")
    model = peft.get_peft_model(base, config).train()
    before = said_of(model.eval(), made.inputs)
    optimizer = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=1.0)
    for _ in range(2):
        said = model(**made.inputs)
        (said.logits if hasattr(said, "logits") else said.last_hidden_state).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = said_of(model, made.inputs)
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(made.load(), tmp_path).eval()
    assert torch.equal(said_of(again, made.inputs), trained)
    merged = again.merge_and_unload()
    assert type(merged) is type(made.load())
    # a product that is added to a weight is rounded once more
    assert (said_of(merged, made.inputs) - trained).abs().max() <= 1e-4 * trained.abs().max()
