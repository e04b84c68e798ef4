"""The README of a sparse model: front matter that stays true, who reads whom, and a place for fidelity."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.integration import card as module
from hf_sparse.integration.card import PICTURE, Card, draw
from hf_sparse.integration.entry import make_entry
from hf_sparse.integration.pushing import model_card
from tests.support.decoders import tiny_decoder
from tests.support.models import tiny_vision_model

BAND = hf_sparse.pattern("band", radius=2)


def made(pattern: hf_sparse.patterns.Pattern = BAND, **fields: object) -> Card:
    """Return a card of a pattern."""
    return Card(make_entry(pattern), "It was made here.", **fields)  # type: ignore[arg-type]


def front(text: str) -> object:
    """Return the front matter of a README."""
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_of_its_own() -> None:
    text = made(base_model="ada/dense").text()
    assert front(text) == {"base_model": "ada/dense", "library_name": "hf_sparse", "tags": ["sparse-attention", "band"]}
    assert "It was made here." in text
    assert 'Its attention follows `{"key": "band", "radius": 2}`.' in text


def test_a_section_is_written_anew_and_what_stands_around_it_stays() -> None:
    held = (
        made(fidelity="| a |")
        .text("---\nlicense: mit\n---\n# Mine\n")
        .replace("<!-- end of hf_sparse -->", "<!-- end of hf_sparse -->\nBelow.")
    )
    again = made(hf_sparse.pattern("strided", stride=3)).text(held)
    assert front(again) == {
        "license": "mit",
        "library_name": "hf_sparse",
        "tags": ["sparse-attention", "strided"],
    }
    assert again.count("## Sparse attention") == 1
    assert "# Mine" in again
    assert "Below." in again
    assert "| a |" not in again
    assert '"key": "strided"' in again


def test_fidelity_has_its_place() -> None:
    text = made(fidelity="| layer | kept |\n| --- | --- |\n| 0 | 0.9 |").text()
    assert "### How near it stays to the dense model\n\n| layer | kept |" in text
    assert "How near" not in made().text()


def test_results_of_the_dense_model_go_and_what_lasts_comes_from_the_source() -> None:
    source = "---\nlicense: mit\nlanguage: en\nbase_model: ada/dense\ndatasets: [x]\n---\n"
    text = made().text("---\nlicense: other\nmodel-index:\n- name: a\n  results: []\n---\n", source=source)
    held = front(text)
    assert isinstance(held, dict)
    assert (held["license"], held["language"], held["base_model"]) == ("other", "en", "ada/dense")
    assert held.keys() == {"license", "language", "base_model", "library_name", "tags"}


@pytest.mark.parametrize("matter", ["license: [", "- a\n- b", "1: 2"])
def test_front_matter_that_is_none_stays_as_text(matter: str) -> None:
    held = f"---\n{matter}\n---\n# Mine\n"
    text = made().text(held)
    assert front(text) == {"library_name": "hf_sparse", "tags": ["sparse-attention", "band"]}
    assert held.strip() in text


def test_patterns_of_unions_heads_and_layers_are_tags() -> None:
    pattern = hf_sparse.by_head({0: BAND | hf_sparse.pattern("global"), 1: hf_sparse.pattern("dilated")})
    entry = make_entry(pattern, {1: hf_sparse.pattern("strided"), 0: "dense"})
    text = Card(entry, "Here.").text()
    held = front(text)
    assert isinstance(held, dict)
    assert held["tags"] == ["sparse-attention", "band", "global", "dilated", "strided"]
    assert 'Some layers differ: `{"1": {"key": "strided"' in text


def test_a_picture_stands_beside_the_readme(tmp_path: Path) -> None:
    said = draw(tmp_path, make_entry(BAND), length=5000, heads=2, is_causal=True)
    assert said.endswith(f"]({PICTURE})")
    assert "the first 1024 tokens" in said
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_drawing_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    said = draw(tmp_path, make_entry(hf_sparse.pattern("band", radius=0)), length=2, heads=2, is_causal=False)
    assert said.splitlines()[2:] == ["```text", "│██  │", "│  ██│", "```"]
    assert list(tmp_path.iterdir()) == []


def test_heads_that_differ_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    by_head = hf_sparse.by_head({0: hf_sparse.pattern("band", radius=0), 1: hf_sparse.pattern("band", radius=1)})
    assert "head 1" in draw(tmp_path, make_entry(by_head), length=4, heads=2, is_causal=False)


def test_a_pattern_that_looks_at_the_content_has_no_picture(tmp_path: Path) -> None:
    assert draw(tmp_path, make_entry(hf_sparse.pattern("routing")), length=8, heads=2, is_causal=False) == ""
    assert list(tmp_path.iterdir()) == []


def edges(n: int, *, is_causal: bool) -> int:
    """Return how many pairs at most 2 apart n tokens have, counted one by one."""
    return sum(k <= q or not is_causal for q in range(n) for k in range(n) if abs(q - k) <= 2)


@pytest.mark.parametrize(
    ("make", "name", "density"),
    [
        (lambda: tiny_decoder("Llama"), "Llama", edges(64, is_causal=True) / 64**2),
        # the mean of both stacks
        (
            lambda: tiny_decoder("Bart", "ForConditionalGeneration"),
            "Bart",
            (edges(64, is_causal=True) + edges(64, is_causal=False)) / 2 / 64**2,
        ),
        (lambda: tiny_vision_model("ViT"), "ViT", edges(17, is_causal=False) / 17**2),
    ],
    ids=["Llama", "Bart", "ViT"],
)
def test_models_of_every_kind_have_a_card(
    make: Callable[[], PreTrainedModel], name: str, density: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    sparse = hf_sparse.sparsify_(make(), BAND)
    text = model_card(sparse, tmp_path, place="ada/model", tags=["mine"]).text()
    assert f"This `{type(sparse).__name__}` is a `{name.lower()}` model with sparse attention" in text
    length = 17 if name == "ViT" else 64
    assert f"It reads up to {length} tokens, and of all pairs at that length {density:.2%}." in text
    assert front(text) == {"library_name": "hf_sparse", "tags": ["sparse-attention", "band", "mine"]}
    assert 'AutoModel.from_pretrained("ada/model")' in text
    assert "```text" in text
