"""Fetching a checkpoint from the Hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError

from hf_sparse.errors import ConversionError
from hf_sparse.integration.hub import clean_token, said_by_hub

# weights as torch.save wrote them
_PICKLES = [f"{place}pytorch_model*.bin*" for place in ("", "0_*/")]
# weights in other formats and of other runs; a file of a module of sentence-transformers' (2_Dense/...) is none of them
_UNWANTED = [
    *(
        f"{place}{file}"
        for place in ("", "0_*/")
        for file in ("tf_model*.h5", "flax_model*.msgpack", "rust_model*.ot", "*.gguf", "*.onnx")
    ),
    *(f"{folder}/*" for folder in ("onnx", "openvino", "coreml", "original", "metal", "checkpoint-*", "runs")),
    *("*.tflite", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "training_args.bin"),
]


def download(
    repository: str, *, revision: str | None, token: str | bool | None, allow_pickle: bool = False
) -> tuple[Path, str, tuple[str, ...]]:
    """Fetch what a conversion needs of a model on the Hub, into the Hub's own cache.

    Args:
        repository: id of the model.
        revision: branch, tag or commit; None takes the main branch.
        token: None takes the one that was logged in with.
        allow_pickle: whether weights that ``torch.save`` wrote are fetched where there are no others.

    Returns:
        The folder, the id with the commit, and the files that were not fetched.

    Raises:
        ConversionError: if there is no such model, or the Hub cannot be reached and the cache does not hold it.
        ValueError: if the token is none.
    """
    token = clean_token(token)
    folder = _fetch(repository, revision, token, [*_UNWANTED, *_PICKLES])
    # of the transformer: other modules of sentence-transformers have files of their own
    if allow_pickle and not any(path for place in ("", "0_*/") for path in folder.glob(f"{place}model*.safetensors*")):
        folder = _fetch(repository, folder.name, token, _UNWANTED)
    try:
        names = HfApi().list_repo_files(repository, revision=folder.name, token=token)
    # the cache served it without a connection, whose errors belong to whatever HTTP client the Hub's library uses
    except Exception:
        names = _known_files(repository, folder.name)
    unfetched = tuple(sorted(name for name in names if not (folder / name).exists()))
    return folder, f"{repository}@{folder.name}", unfetched


def _known_files(repository: str, commit: str) -> list[str]:
    """Return the files that the cache says a commit has.

    Raises:
        ConversionError: if it does not say: the tokenizer may be among what it lacks.
    """
    try:
        return [file.path for file in get_cached_repo_tree(repository, revision=commit)]
    except CachedRepoTreeNotFoundError:
        raise ConversionError(
            f"the cache may hold {repository} in part, and {constants.ENDPOINT} cannot be asked which files it has; fetch all "
            f"of it once with `hf download {repository}`, or pass a folder"
        ) from None


def _fetch(repository: str, revision: str | None, token: str | bool | None, unwanted: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, token=token, ignore_patterns=unwanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        # what the server says may repeat the token
        raise ConversionError(_explain(repository, revision, error)) from None


def _explain(repository: str, revision: str | None, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    at = f" at revision {revision!r}" if revision else ""
    if status in (401, 403, 404):
        return (
            f"{repository} is no local folder, and {constants.ENDPOINT} gives no model of that id{at} (status {status}); "
            "check the spelling, or pass a token if it is private or gated"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{repository} is no local folder, the cache does not hold it{at}, and HF_HUB_OFFLINE forbids asking the Hub; "
            "pass a folder, or unset HF_HUB_OFFLINE"
        )
    return f"{repository} is no local folder, and it could not be fetched from {constants.ENDPOINT}{at}: {said_by_hub(error)}"
