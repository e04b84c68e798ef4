"""What the errors of the Hub mean, and that the words of a server are not repeated."""

import pytest
from huggingface_hub import constants

import hf_sparse
from hf_sparse.errors import PushError
from hf_sparse.integration.hub import said_by_hub
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


def test_a_model_is_not_pushed_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("band", radius=2))
    with pytest.raises(
        PushError, match=r"ada/model could not be read from .*HF_HUB_OFFLINE forbids asking the Hub; unset it"
    ):
        model.push_to_hub("ada/model")
