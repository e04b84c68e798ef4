"""The fidelity report: its numbers are what a person would compute, and its page is whole."""

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

import hf_sparse
from hf_sparse.conversion import costs, fidelity_page, layer_plan
from hf_sparse.conversion.comparison import mean_loss
from hf_sparse.conversion.source import open_checkpoint
from hf_sparse.conversion.texts import Texts, read_texts
from tests.support.checkpoints import write_checkpoint, write_tokenizer
from tests.support.decoders import tiny_decoder

WORDS = ["every", "long", "page", "of", "the", "river", "reads", "a", "stone", "word"]
BAND = hf_sparse.pattern("band", radius=4)
WIDE = hf_sparse.pattern("band", radius=2000)


@pytest.fixture(autouse=True)
def few_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time attention at one length, and choose from few patterns: how long it takes is no matter of these tests."""
    monkeypatch.setattr(costs, "_LONGEST", 256)
    monkeypatch.setattr(layer_plan, "LEVELS", (0.5, 1.0))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two texts of 600 and 150 words."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for count in (600, 150):
        at = torch.randint(len(WORDS), (count,), generator=generator)
        lines.append(json.dumps({"text": " ".join(WORDS[i] for i in at)}))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tiny GPT-2 with a tokenizer: 64 tokens."""
    tiny_decoder("GPT2").save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2", "Bert", max_length=64)
    return tmp_path / "gpt2"


def test_a_pattern_wide_open_keeps_everything_and_says_the_same(bert: Path, text: Path) -> None:
    report = hf_sparse.inspect_fidelity(bert, [WIDE], text)
    (one,) = report.patterns
    assert (report.length, report.pieces, report.objective) == (128, 5, "masked")
    # the longest text fills four lengths of the model
    assert report.lengths == (128, 256, 512)
    assert one.kept == ((1.0,) * 4,) * 2
    assert one.divergence == pytest.approx(0, abs=1e-9)
    assert one.cosine == pytest.approx(1, abs=1e-9)
    assert one.losses[0] == pytest.approx(report.dense.losses[0], abs=1e-5)
    assert (one.density, one.density_longest, one.operations) == (1.0, 1.0, report.dense.operations)


def test_divergence_and_cosine_are_those_of_the_two_models(bert: Path, text: Path) -> None:
    (one,) = hf_sparse.inspect_fidelity(bert, [BAND], text).patterns
    dense = AutoModelForMaskedLM.from_pretrained(bert).eval()
    sparse: Any = hf_sparse.sparsify_(AutoModelForMaskedLM.from_pretrained(bert), BAND).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(bert)
    first, second = (json.loads(line)["text"] for line in text.read_text().splitlines())
    ids = [
        tokenizer(one, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        for one in (first, second)
    ]
    blank = tokenizer("", truncation=False, padding=False)["input_ids"]
    pieces = [ids[0][:126], ids[1][:126], *(ids[0][at : at + 126] for at in (126, 252, 378))]
    divergences, cosines = [], []
    for piece in pieces:
        row = torch.tensor([[blank[0], *piece, blank[1]]])
        with torch.no_grad():
            said = [model(row, output_hidden_states=True) for model in (dense, sparse)]
        want, got = (one.logits[0].double().log_softmax(-1) for one in said)
        divergences.append(float(kl_div(got, want, reduction="batchmean", log_target=True)))
        cosines.append(float(cosine_similarity(*(one.hidden_states[-1][0].double() for one in said)).mean()))
    assert one.divergence == pytest.approx(sum(divergences) / 5, rel=1e-5)
    assert one.cosine == pytest.approx(sum(cosines) / 5, rel=1e-6)
    assert one.divergence > 0.01


def test_a_causal_loss_is_the_model_s_own_on_the_tokens_that_both_predict(gpt2: Path, text: Path) -> None:
    report = hf_sparse.inspect_fidelity(gpt2, [WIDE, BAND], text)
    assert (report.objective, report.lengths) == ("causal", (64, 128, 256, 512))
    model: Any = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(gpt2)
    blank = tokenizer("", truncation=False, padding=False)["input_ids"]
    room = 64 - len(blank)
    losses = []
    for line in text.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False, truncation=False, padding=False)[
            "input_ids"
        ]
        row = torch.tensor([[*blank[:1], *ids[:room], *blank[1:]]])
        labels = row.clone()
        # special tokens are no text, and the first token of a part counts for no model
        labels[0, : len(blank[:1]) + 1] = -100
        labels[0, len(blank[:1]) + room :] = -100
        with torch.no_grad():
            losses.append(float(model(row, labels=labels).loss))
    assert report.dense.losses[0] == pytest.approx(sum(losses) / 2, rel=1e-5)
    wide, band = report.patterns
    assert wide.losses[0] == pytest.approx(report.dense.losses[0], rel=1e-5)
    # at longer lengths the dense model reads in parts, the sparse one whole
    assert wide.losses[1] != pytest.approx(report.dense.losses[1], rel=1e-5)
    assert band.losses[0] != pytest.approx(report.dense.losses[0], rel=1e-5)


def test_hidden_tokens_are_the_same_ones_whoever_reads() -> None:
    shown: list[list[int]] = []

    class Model:
        config = type("Config", (), {"is_encoder_decoder": False, "vocab_size": 9})

        def __call__(self, input_ids: Any, **_: Any) -> Any:
            shown.append(input_ids[0].tolist())
            logits = torch.zeros(1, input_ids.shape[1], 9)
            return {"logits": logits, "hidden_states": (logits,)}

    texts = Texts("t", ((1,) * 40,), (7,), (8,), 0)
    model: Any = Model()
    whole = mean_loss(model, texts, [(1,) * 40], 42, 12, "masked")
    parts = mean_loss(model, texts, [(1,) * 40], 12, 12, "masked")
    assert whole == parts == pytest.approx(torch.tensor(9.0).log().item())
    assert shown[0] == [7, *(token for part in shown[1:] for token in part[1:-1]), 8]
    assert 1 <= shown[0].count(0) <= 14


def test_without_a_head_there_is_no_loss_and_no_divergence(tmp_path: Path, text: Path) -> None:
    write_checkpoint(tmp_path / "bare", "Bert", "Model")
    write_tokenizer(tmp_path / "bare", "Bert")
    report = hf_sparse.inspect_fidelity(tmp_path / "bare", [BAND], text)
    assert (report.objective, report.lengths, report.dense.losses) == (None, (), ())
    assert (report.patterns[0].divergence, report.patterns[0].losses) == (None, ())
    assert 0 < report.patterns[0].cosine < 1


def test_a_head_whose_weights_the_checkpoint_lacks_is_none(tmp_path: Path, text: Path) -> None:
    write_checkpoint(tmp_path / "bare", "Bert", "Model")
    write_tokenizer(tmp_path / "bare", "Bert")
    config = json.loads((tmp_path / "bare/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert hf_sparse.inspect_fidelity(tmp_path / "bare", [BAND], text).patterns[0].divergence is None


@pytest.mark.slow
def test_both_stacks_of_an_encoder_decoder_are_told_apart(tmp_path: Path, text: Path) -> None:
    tiny_decoder("Bart", "ForConditionalGeneration").save_pretrained(tmp_path / "bart")
    write_tokenizer(tmp_path / "bart", "Roberta", max_length=64)
    report = hf_sparse.inspect_fidelity(tmp_path / "bart", [BAND], text)
    assert report.layers == ("encoder.0", "encoder.1", "decoder.0", "decoder.1")
    assert report.patterns[0].kept is not None
    assert len(report.patterns[0].kept) == 4
    assert report.objective is None
    assert report.patterns[0].divergence is not None
    plan = hf_sparse.plan_layers(tmp_path / "bart", text, 0.2)
    assert plan.density <= 0.2


def test_a_broken_head_is_seen(bert: Path, text: Path) -> None:
    broken = hf_sparse.by_head({(0, 1, 3): BAND, 2: hf_sparse.pattern("band", radius=0)})
    whole, one = hf_sparse.inspect_fidelity(bert, [BAND, broken], text).patterns
    assert one.least_kept is not None
    assert whole.kept is not None
    assert one.least_kept[2] == 2
    assert one.least_kept[0] < 0.5 * whole.kept[one.least_kept[1]][2]
    assert one.cosine < whole.cosine


def test_a_pattern_with_nodes_says_why_it_keeps_no_share(bert: Path, text: Path) -> None:
    report = hf_sparse.inspect_fidelity(bert, [hf_sparse.pattern("star", radius=4)], text)
    assert report.patterns[0].kept is None
    assert "reads nodes" in report.patterns[0].kept_note
    assert report.rows()[1][2:4] == ["-", "-"]


def test_operations_are_counted_from_the_shapes(bert: Path, text: Path) -> None:
    report = hf_sparse.inspect_fidelity(bert, [BAND], text, max_length=200)
    assert report.longest == 200
    # 2 layers of width 32 with 37 inside, and the head's own layer and decoder
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 37) + 32 * 32 + 32 * 64
    pairs = int(BAND.mask(200).sum())
    assert report.dense.operations == 2 * 200 * weights + 2 * 4 * 32 * 200 * 200
    assert report.patterns[0].operations == 2 * 200 * weights + 2 * 4 * 32 * pairs


def test_memory_grows_by_what_a_call_holds() -> None:
    held = costs.peak_bytes(lambda: torch.ones(16, 2**20).sum())
    if held is None:
        pytest.skip("this system does not tell the peak memory of a call")
    assert 0.9 * 2**26 < held < 1.5 * 2**26


def test_sparse_is_cheaper_from_the_length_on_at_which_it_stays_so() -> None:
    def timings(*pairs: tuple[float, float]) -> list[costs.Timing]:
        return [costs.Timing(256 * 2**at, dense, sparse) for at, (dense, sparse) in enumerate(pairs)]

    assert costs.cheaper_from(timings((1, 2), (4, 3), (16, 5))) == 512
    assert costs.cheaper_from(timings((3, 2), (4, 5), (16, 5))) == 1024
    assert costs.cheaper_from(timings((1, 2), (4, 5))) is None


def test_a_plan_is_judged_on_pieces_that_it_was_not_chosen_on(bert: Path, text: Path) -> None:
    plan = hf_sparse.plan_layers(bert, text, 0.2)
    report = hf_sparse.inspect_fidelity(bert, [plan, BAND], text)
    assert (plan.texts, report.pieces, report.is_chosen_apart) == (3, 2, True)
    assert report.patterns[0].plan == plan.to_dict()
    assert report.patterns[0].density == pytest.approx(plan.density)
    assert "chosen on other pieces" in report.caption()


def test_converted_weights_are_read_where_they_are_named(bert: Path, text: Path, tmp_path: Path) -> None:
    hf_sparse.convert(bert, tmp_path / "sparse", BAND, max_length=256, verify=False)
    one = hf_sparse.inspect_fidelity(bert, [BAND], text, max_length=256, converted=tmp_path / "sparse")
    other = hf_sparse.inspect_fidelity(bert, [BAND], text, max_length=256)
    costly = {"operations", "peak_bytes", "timings", "cheaper_from"}
    held = [dataclasses.asdict(report.patterns[0]) for report in (one, other)]
    assert all(held[0][name] == held[1][name] for name in held[0] if name not in costly)


class Page(HTMLParser):
    """Counts tags, and fails where they do not close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing_else(bert: Path, text: Path, tmp_path: Path) -> None:
    plan = hf_sparse.plan_layers(bert, text, 0.2)
    report = hf_sparse.inspect_fidelity(bert, [plan, BAND, hf_sparse.pattern("star", radius=4)], text)
    report = dataclasses.replace(report, source="<b>a & b")
    report.write_html(tmp_path / "report.html")
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(written)
    assert page.open == []
    assert not page.attributes & {"src", "href", "srcset", "onclick"}
    assert not re.search(r"https?:|url\(|@import|<script", written)
    assert "&lt;b&gt;a &amp; b" in written
    assert "prefers-color-scheme: dark" in written
    # a map of two layers and four heads for each of two patterns; nodes have none
    shares = re.findall(r'title="layer (\d), head (\d): ([\d.]+)"', written)
    kept = [one.kept for one in report.patterns if one.kept is not None]
    assert [(int(layer), int(head)) for layer, head, _ in shares] == 2 * [(i, j) for i in range(2) for j in range(4)]
    assert [float(share) for *_, share in shares] == [
        pytest.approx(share, abs=5e-5) for one in kept for heads in one for share in heads
    ]
    assert "reads nodes" in written


def luminance(colour: tuple[float, ...]) -> float:
    """Return the relative luminance of red, green and blue, each from 0 to 255, as WCAG 2.1 has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (one / 255 for one in colour)]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_numbers_stand_out_from_the_colour_of_their_cell(scheme: int, share: float) -> None:
    ink, paper = (
        tuple(bytes.fromhex(re.findall(rf"--{name}: #([0-9a-f]{{6}})", fidelity_page._STYLE)[scheme]))
        for name in ("ink", "page")
    )
    *colour, alpha = map(float, re.findall(r"[\d.]+", fidelity_page._cell(share, "0", 0).partition("title")[0]))
    cell = tuple(alpha * over + (1 - alpha) * under for over, under in zip(colour, paper, strict=True))
    low, high = sorted((luminance(ink), luminance(cell)))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_report_is_plain_json(bert: Path, text: Path) -> None:
    report = hf_sparse.inspect_fidelity(bert, [BAND, hf_sparse.plan_layers(bert, text, 0.2)], text)
    held = report.to_dict()
    assert json.loads(json.dumps(held)) == held
    assert held["patterns"][0]["kept"] == [list(heads) for heads in report.patterns[0].kept or ()]


def no_text(path: Path) -> None:
    path.write_text('{"words": 3}\n')


REFUSALS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "missing": (Path.unlink, {}, "texts: there is no file"),
    "empty": (lambda path: path.write_text(" \n"), {}, "is empty; pass a text"),
    "not UTF-8": (lambda path: path.write_bytes("naïve".encode("latin-1")), {}, "is not UTF-8: byte 2 is 0xef"),
    "no text": (no_text, {}, 'line 1 of .* is no JSON object with a "text"'),
    "unknown words": (lambda path: path.write_text('{"text": "нет"}'), {}, "holds no token that the tokenizer of"),
    "too short": (
        lambda path: path.write_text('{"text": "a river"}'),
        {},
        r"pieces of 128 tokens are wanted, and the longest text of .* has 4 \(2 of them special\); pass longer texts",
    ),
    "length too large": (
        lambda path: None,
        {"length": 129},
        "length must be from 1 to the 128 tokens that .* reads, got 129",
    ),
    "length no number": (lambda path: None, {"length": True}, "length must be from 1 to the 128 tokens"),
    "length only special": (lambda path: None, {"length": 2}, "pieces of 2 tokens are wanted"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_texts_that_cannot_be_read_are_refused(name: str, bert: Path, text: Path) -> None:
    change, settings, says = REFUSALS[name]
    change(text)
    with pytest.raises(ValueError, match=says):
        hf_sparse.inspect_fidelity(bert, [BAND], text, **settings)
    with pytest.raises(ValueError, match=says):
        hf_sparse.plan_layers(bert, text, 0.1, **settings)


def test_special_tokens_stand_where_the_tokenizer_puts_them(bert: Path, text: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = read_texts(text, open_checkpoint(bert))
    assert (len(texts.before), len(texts.after)) == (1, 1)
    # as T5's: one behind the text alone
    inner = Tokenizer(models.WordLevel({"<end>": 0, **{word: at for at, word in enumerate(set(WORDS), 1)}}, "<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    for path in bert.glob("tokenizer*"):
        path.unlink()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(bert)
    texts = read_texts(text, open_checkpoint(bert))
    assert (texts.before, texts.after, texts.mask) == ((), (0,), None)
    assert [len(document) for document in texts.documents] == [600, 150]
    assert texts.pieces(50, 3)[0][0, -1] == 0


def test_nothing_to_inspect_and_what_plain_texts_have_not_are_refused(bert: Path, text: Path) -> None:
    with pytest.raises(ValueError, match="give at least one pattern"):
        hf_sparse.inspect_fidelity(bert, [], text)
    with pytest.raises(ValueError, match="needs segment_ids, which plain texts have not"):
        hf_sparse.inspect_fidelity(bert, [hf_sparse.pattern("etc", segments="given")], text)
