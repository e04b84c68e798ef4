"""Pushing to the Hub, and what its errors mean."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants, get_token

from hf_sparse.errors import PushError

# weights of an earlier push under other names, which would be loaded in the place of the new ones
_WEIGHTS = tuple(
    name
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin"))
    for name in (f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}", f"{stem}.{suffix}.index.json")
)

# what a token may be made of
_TOKEN = re.compile(r"[!-~]+")


def clean_token(token: str | bool | None) -> str | bool | None:
    """Return a token without the line break behind it.

    Raises:
        ValueError: if it, or the one that was logged in with, holds what no token does: the client's error would repeat it.
    """
    held = get_token() if token in (None, True) else token
    if isinstance(held, str) and held.strip() and not _TOKEN.fullmatch(held.strip()):
        raise ValueError(
            "the token for the Hub holds characters that no token has, such as a break in its middle; copy it anew "
            "(`hf auth login`, or HF_TOKEN)"
        )
    return token.strip() if isinstance(token, str) else token


def check_account(token: str | bool | None = None) -> None:
    """Check that the Hub knows who asks, before anything is done that is to be pushed.

    Args:
        token: None takes the one that was logged in with.

    Raises:
        PushError: if it does not, or cannot be reached.
        ValueError: if the token is none.
    """
    token = clean_token(token)
    try:
        HfApi(token=token).whoami()
    # errors of a connection belong to whatever HTTP client the Hub's library uses
    except Exception as error:
        raise PushError(f"nothing can be pushed to {constants.ENDPOINT}: {said_by_hub(error)}") from None


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    leave_out: Sequence[str] = (),
) -> CommitInfo:
    """Push the files of a folder to a model on the Hub, which is made if it is not there.

    Args:
        folder: what to push.
        repository: id of the model.
        message: of the commit.
        description: of the commit.
        private: whether a new model is for its owner alone; None takes the Hub's default.
        token: None takes the one that was logged in with.
        revision: branch, which is made if it is not there; None takes the main one.
        create_pr: whether to open a pull request in the place of a commit.
        leave_out: patterns of paths in the folder that are not pushed.

    Raises:
        PushError: if the Hub cannot be reached or refuses; in one line, without the token.
        ValueError: if the token is none.
    """
    api = HfApi(token=clean_token(token))
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(name, branch=revision, exist_ok=True)
        found: CommitInfo = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=list(leave_out),
            delete_patterns=list(_WEIGHTS),
        )
    # as above
    except Exception as error:
        raise PushError(f"{repository} could not be pushed to {constants.ENDPOINT}: {said_by_hub(error)}") from None
    return found


def said_by_hub(error: BaseException) -> str:
    """Return in one line why the Hub could not be used, and what to do.

    The words of the server, which may repeat a token, are left out.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the Hub; unset it"
    status = next((held for held in map(_status, _chain(error)) if held is not None), None)
    if status == 401:
        return "it takes no token from here, or not this one (status 401); log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return "the token may not do this (status 403); take one that may write, and a place of your own"
    if status == 400:
        return "it refuses what it is sent (status 400); look at license and base_model at the top of README.md"
    if status == 404:
        return "there is no such model for this token (status 404); check the spelling"
    if status is not None:
        return f"it answers with status {status}; try again later"
    cause = list(_chain(error))[-1]
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    # an address may be signed, and a header hold the token
    return re.sub(r"Bearer [^'\"]*|hf_\w+", "***", re.sub(r"\?[^\s'\"]*", "", reason))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from; what the client raised stands behind its own wrappings."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
