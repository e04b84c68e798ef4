"""What the errors of the Hub mean, and that the words of a server are not repeated."""

from pathlib import Path

import pytest
from huggingface_hub import constants

import hf_sparse
from hf_sparse.errors import PushError
from hf_sparse.integration.hub import clean_token, said_by_hub
from tests.support.models import tiny_model


class Refused(Exception):
    """What the client raises: with the answer that came."""

    def __init__(self, status: int) -> None:
        super().__init__("the server repeats hf_secret")
        self.response = type("Response", (), {"status_code": status})


def wrapped(cause: Exception) -> Exception:
    """Return an error that came from another one, as the client wraps those of uploads."""
    try:
        raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from cause
    except RuntimeError as error:
        return error


@pytest.fixture(autouse=True)
def _asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a Hub that is asked: the tests themselves may run offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (
            401,
            "it takes no token from here, or not this one (status 401); log in with `hf auth login`, or set HF_TOKEN",
        ),
        (403, "the token may not do this (status 403); take one that may write, and a place of your own"),
        (404, "there is no such model for this token (status 404); check the spelling"),
        (500, "it answers with status 500; try again later"),
    ],
)
def test_a_status_is_put_in_words_and_the_server_s_are_left_out(status: int, says: str) -> None:
    assert said_by_hub(Refused(status)) == says
    assert said_by_hub(wrapped(Refused(status))) == says


def test_what_is_no_answer_is_told_in_one_line_without_signatures() -> None:
    said = said_by_hub(wrapped(OSError("cannot reach 'https://a.b/c?X-Signature=secret' now\nsecond line")))
    assert said == "cannot reach 'https://a.b/c' now"
    assert said_by_hub(TimeoutError()) == "TimeoutError"


BROKEN = "hf_SECRET\x0bmore"


def test_a_token_that_is_none_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("band", radius=2))
    pattern = hf_sparse.pattern("band", radius=2)
    (tmp_path / "text").write_text("a word")
    calls = {
        "push": lambda token: model.push_to_hub("ada/model", token=token),
        "convert": lambda token: hf_sparse.convert("ada/model", tmp_path / "to", pattern, token=token),
        "account": lambda token: hf_sparse.convert("ada/model", tmp_path / "to", pattern, push_to="a/b", token=token),
        "export": lambda token: hf_sparse.export("ada/model", tmp_path / "to", "longformer", token=token),
        "inspect": lambda token: hf_sparse.inspect_fidelity("ada/model", [pattern], tmp_path / "text", token=token),
        "config": lambda token: hf_sparse.sparse_config("ada/model", pattern, token=token),
    }
    for name, call in calls.items():
        for given in (BROKEN, None):
            monkeypatch.setenv("HF_TOKEN", BROKEN if given is None else "")
            with pytest.raises(ValueError, match="the token for the Hub holds characters that no token has") as caught:
                call(given)
            assert "SECRET" not in str(caught.value), name
            assert caught.value.__cause__ is None
    # a line break behind it is none of its own
    assert clean_token("hf_good\n") == "hf_good"
    monkeypatch.setenv("HF_TOKEN", "hf_good\n")
    assert clean_token(None) is None


def test_what_a_client_says_of_a_header_is_left_out() -> None:
    said = said_by_hub(wrapped(ValueError("Illegal header value b'Bearer hf_SECRET\\n'")))
    assert said == "Illegal header value b'***'"


def test_a_model_is_not_pushed_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("band", radius=2))
    with pytest.raises(
        PushError, match=r"ada/model could not be read from .*HF_HUB_OFFLINE forbids asking the Hub; unset it"
    ):
        model.push_to_hub("ada/model")
