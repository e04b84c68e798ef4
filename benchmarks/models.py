"""Whole models and layers of RoBERTa-base width beside the in-tree ones of transformers, on the same weights."""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModel,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerModel,
    ReformerConfig,
    RobertaConfig,
    RobertaModel,
)
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

import hf_sparse
from hf_sparse.benchmarks.attention import BOTH, FORWARD
from hf_sparse.benchmarks.timing import Cell
from hf_sparse.patterns import Pattern

LAYERS, HIDDEN = 2, 768
WINDOW, BLOCK, RANDOM = 512, 64, 3
FREE = "no_attention"

OURS_LONGFORMER, THEIRS_LONGFORMER = "hf_sparse longformer", "HF LongformerModel"
OURS_BIGBIRD, THEIRS_BIGBIRD = "hf_sparse bigbird", "HF BigBirdModel (training mode)"
DENSE_MODEL = "dense RoBERTa, SDPA"
FREE_ROBERTA, FREE_BERT = "RoBERTa, attention removed", "BERT, attention removed"
FLEX_MODEL = "dense RoBERTa, FlexAttention as transformers ships it"


class Models:
    """The models that are timed, with equal weights where they are compared.

    Args:
        n: tokens.
        device: "cpu" or "cuda".
    """

    def __init__(self, n: int, device: str) -> None:
        self.n, self.device = n, device
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": 1000,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": n + 2,
            "pad_token_id": 1,
        }
        roberta = RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False)
        # the in-tree random plan is drawn for as many positions as the config has
        bert = BertModel(BertConfig(**{**sizes, "max_position_embeddings": max(4096, n)}), add_pooling_layer=False)
        longformer = hf_sparse.pattern("longformer", window=WINDOW, global_tokens=(0,))
        bigbird = hf_sparse.pattern("bigbird", block_size=BLOCK, num_random_blocks=RANDOM)
        self.ids = torch.randint(5, 1000, (1, n), device=device)
        self.first = torch.zeros_like(self.ids)
        self.first[:, 0] = 1
        self.models: dict[str, Any] = {
            DENSE_MODEL: roberta,
            FREE_ROBERTA: without_attention(roberta),
            FREE_BERT: without_attention(bert),
            OURS_LONGFORMER: converted(roberta, longformer),
            THEIRS_LONGFORMER: in_tree_longformer(roberta, n),
            OURS_BIGBIRD: converted(bert, bigbird),
            THEIRS_BIGBIRD: in_tree_bigbird(bert),
        }
        if device == "cuda":
            self.models[FLEX_MODEL] = _with_attention(roberta, "flex_attention")
        for name, model in self.models.items():
            model.to(device=device, dtype=self.dtype)
            # outside of training the in-tree BigBird is another pattern; without dropout training changes nothing else
            model.train(name == THEIRS_BIGBIRD)

    def outputs(self, name: str) -> Tensor:
        """Run a model forward and return its last hidden state ``[1, n, hidden]``."""
        marks = {"global_attention_mask": self.first} if name == THEIRS_LONGFORMER else {}
        hidden: Tensor = self.models[name](input_ids=self.ids, **marks).last_hidden_state
        return hidden

    def differences(self) -> dict[str, float]:
        """Return the largest difference of our models to the in-tree ones, which have to do the same."""
        with torch.no_grad():
            return {
                ours: (self.outputs(ours) - self.outputs(theirs)).abs().max().item()
                for ours, theirs in ((OURS_LONGFORMER, THEIRS_LONGFORMER), (OURS_BIGBIRD, THEIRS_BIGBIRD))
            }

    def cells(self) -> Iterator[Cell]:
        """Yield the models forward, and forward and backward."""
        for what in (FORWARD, BOTH):
            for name, model in self.models.items():
                run = functools.partial(_run, functools.partial(self.outputs, name), model, what)
                yield Cell(name, what, run, {"section": "model", "n": self.n, "layers": LAYERS})

    def layer_cells(self) -> Iterator[Cell]:
        """Yield one attention layer of each model with its projections, and the LSH layer of the in-tree Reformer."""
        hidden = torch.randn(1, self.n, HIDDEN, device=self.device, dtype=self.dtype, requires_grad=True)
        layers: dict[str, tuple[nn.Module, Callable[[], Any]]] = {}
        for name in (DENSE_MODEL, OURS_LONGFORMER, OURS_BIGBIRD):
            layers[name.replace("RoBERTa", "layer")] = self._layer(name, hidden)
        layers["HF Longformer layer"] = self._longformer_layer(hidden)
        layers["HF BigBird layer (training mode)"] = self._bigbird_layer(hidden)
        # four times as long, where hashing pays
        long = torch.randn(1, 4 * self.n, HIDDEN, device=self.device, dtype=self.dtype, requires_grad=True)
        said = f"layer, chunk 64, 1 hash, {4 * self.n} tokens"
        layers[f"hf_sparse reformer {said}"] = self._reformer_layer(long)
        layers[f"HF Reformer LSH {said}"] = self._lsh_layer(long)
        for what in (FORWARD, BOTH):
            for name, (module, attend) in layers.items():
                run = functools.partial(_run, functools.partial(_first, attend), module, what)
                yield Cell(name, what, run, {"section": "layer", "n": self.n})

    def _layer(self, name: str, hidden: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
        module = self.models[name].encoder.layer[0].attention.self
        return module, lambda: module(hidden)

    def _longformer_layer(self, hidden: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
        module = self.models[THEIRS_LONGFORMER].encoder.layer[0].attention.self
        mask = torch.zeros(1, self.n, device=self.device, dtype=self.dtype)
        mask[:, 0] = 10000.0
        settings = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": True}
        return module, lambda: module(hidden, attention_mask=mask, **settings)

    def _bigbird_layer(self, hidden: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
        model = self.models[THEIRS_BIGBIRD]
        module = model.encoder.layer[0].attention.self
        ones = torch.ones(1, self.n, device=self.device, dtype=self.dtype)
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(ones, BLOCK)
        masks = {"band_mask": band, "from_mask": rows, "to_mask": columns}
        masks |= {"from_blocked_mask": blocked, "to_blocked_mask": blocked}
        return module, lambda: module(hidden, **masks)

    def _reformer_layer(self, hidden: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
        module = SharedKeyLayer().to(device=self.device, dtype=self.dtype)
        return module, lambda: (module(hidden),)

    def _lsh_layer(self, hidden: Tensor) -> tuple[nn.Module, Callable[[], Any]]:
        config = ReformerConfig(
            hidden_size=HIDDEN,
            num_attention_heads=12,
            attention_head_size=64,
            attn_layers=["lsh"],
            lsh_attn_chunk_length=64,
            num_hashes=1,
            num_buckets=2 * hidden.shape[1] // 64,
            lsh_attention_probs_dropout_prob=0.0,
            axial_pos_embds=False,
            is_decoder=False,
            hash_seed=0,
        )
        module = LSHSelfAttention(config).to(device=self.device, dtype=self.dtype).eval()
        return module, lambda: module(hidden)


class SharedKeyLayer(nn.Module):
    """Our Reformer with the two projections that the in-tree layer has: queries are keys."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern = hf_sparse.pattern("reformer", num_hashes=1, chunk_length=64, shared_query_key=True)
        self.query, self.value = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[B, N, HIDDEN]`` for hidden states of that shape."""
        query, value = (layer(hidden).unflatten(2, (12, 64)).transpose(1, 2) for layer in (self.query, self.value))
        out: Any = hf_sparse.sparse_attention(query, query, value, self.pattern)
        attended: Tensor = out.transpose(1, 2).flatten(2)
        return attended


def converted(model: Any, pattern: Pattern) -> Any:
    """Return a model that was saved, converted and loaded, as a user would."""
    with tempfile.TemporaryDirectory() as folder:
        source, destination = Path(folder, "dense"), Path(folder, "sparse")
        model.save_pretrained(source)
        hf_sparse.convert(source, destination, pattern, verify=False, progress=lambda done, total: None)
        return AutoModel.from_pretrained(destination, add_pooling_layer=False)


def in_tree_longformer(model: Any, n: int) -> Any:
    """Return HF's Longformer with the weights of a RoBERTa, also in its projections of global tokens."""
    config = LongformerConfig(**_fields(model), attention_window=[WINDOW] * LAYERS)
    state = dict(model.state_dict())
    for key in [key for key in state if ".attention.self." in key]:
        part = key.split(".")[-2]
        state[key.replace(f".{part}.", f".{part}_global.")] = state[key]
    return _filled(LongformerModel(config, add_pooling_layer=False), state)


def in_tree_bigbird(model: Any) -> Any:
    """Return HF's BigBird with the weights of a BERT."""
    config = BigBirdConfig(**_fields(model), block_size=BLOCK, num_random_blocks=RANDOM, attention_type="block_sparse")
    return _filled(BigBirdModel(config, add_pooling_layer=False), model.state_dict())


class _OwnValues(torch.autograd.Function):
    """Attention that takes no time; queries and keys get a gradient all the same, so that their projections have their work."""

    @staticmethod
    def forward(_ctx: Any, _query: Tensor, _key: Tensor, value: Tensor) -> Tensor:
        return value.transpose(1, 2).contiguous()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad.transpose(1, 2)
        return grad, grad, grad


def without_attention(model: Any) -> Any:
    """Return a model whose attention gives each token its own value: what free attention would cost."""

    def give_values(_module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _OwnValues.apply(query, key, value), None

    AttentionInterface.register(FREE, give_values)
    AttentionMaskInterface.register(FREE, lambda **_: None)
    return _with_attention(model, FREE)


def _with_attention(model: Any, name: str) -> Any:
    made = copy.deepcopy(model)
    made.set_attn_implementation(name)
    return made


def _fields(model: Any) -> dict[str, Any]:
    left = ("model_type", "architectures", "transformers_version")
    return {key: value for key, value in model.config.to_dict().items() if key not in left}


def _filled(model: Any, state: dict[str, Tensor]) -> Any:
    missing, _ = model.load_state_dict(state, strict=False)
    if missing:
        raise RuntimeError(f"{type(model).__name__} was left without {', '.join(missing)}")
    return model


def _first(attend: Callable[[], Any]) -> Any:
    return attend()[0]


def _run(outputs: Callable[[], Tensor], module: nn.Module, what: str) -> None:
    if what == FORWARD:
        with torch.no_grad():
            outputs()
        return
    module.zero_grad(set_to_none=True)
    out = outputs()
    out.backward(torch.ones_like(out))
