"""A conversion under way: the folder ``<destination>.partial``, from which a killed one is gone on with."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_sparse.errors import ConversionError, UnfinishedConversionError

try:
    import fcntl
except ImportError:
    # Windows: two conversions to one place are not told apart there
    fcntl = None  # type: ignore[assignment]


class Job:
    """What is known of a conversion, kept beside its destination until it is done.

    ``<destination>.partial`` holds ``job.json`` with what this class knows, ``files``, which takes the place of the destination
    at the end, and for a moment ``replaced``, which stood there before.

    Attributes:
        destination: the folder that is to be written.
        arguments: all that decides what is written, as JSON values.
        done: SHA-256 of the weights files that are whole, by path.
        result: what is to be reported of the files, once all are written; None before.
    """

    def __init__(self, destination: Path, arguments: dict[str, Any]) -> None:
        self.destination = destination
        self.folder = destination.with_name(f"{destination.name}.partial")
        self.files = self.folder / "files"
        self.arguments: dict[str, Any] = json.loads(json.dumps(arguments, default=str))
        self.done: dict[str, str] = {}
        self.result: dict[str, Any] | None = None

    @property
    def held_bytes(self) -> int:
        """Length of the weights files that are whole."""
        return sum((self.files / path).stat().st_size for path in self.done if (self.files / path).is_file())

    @property
    def is_in_place(self) -> bool:
        """Whether the destination is what this job made."""
        return self.result is not None and not self.files.exists() and self.destination.is_dir()

    def find(self) -> None:
        """Take over what a killed conversion left, if one did.

        Raises:
            ConversionError: if it had other arguments, or the folder holds something else.
        """
        if not self.folder.exists():
            return
        try:
            held = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
            arguments, done, result = held["arguments"], held["done"], held["result"]
        except (OSError, ValueError, KeyError, TypeError):
            # killed before anything was written
            if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {"job.json.new"}:
                return
            raise ConversionError(
                f"{self.folder} is in the way, and holds no conversion to go on with; remove it"
            ) from None
        differ = [key for key in self.arguments if arguments.get(key) != self.arguments[key]]
        if differ:
            with self._locked():
                # one that runs is no leftover
                pass
            said = "; ".join(
                f"{key} was {_short(arguments.get(key))}, now {_short(self.arguments[key])}" for key in differ
            )
            raise ConversionError(
                f"{self.folder} was left by a conversion with other arguments ({said}); give the same ones to go on with it, "
                "or remove that folder to start anew"
            )
        self.done, self.result = done, result
        if result is not None and not self.files.exists():
            whole = (_is_whole(self.destination / path, digest) for path, digest in done.items())
            if not self.destination.is_dir() or not all(whole):
                # what had been made was removed, or is another thing by now
                self.done, self.result = {}, None

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Hold the folder while the conversion runs.

        At the end the folder is removed. So it is when something is raised, Ctrl-C included, and the destination is as it was;
        but not when the process is told to end (SIGTERM) or killed, or the destination stands: then the same call goes on.

        Raises:
            ConversionError: if another process holds it.
            UnfinishedConversionError: if the disk refuses to be written.
        """
        with self._locked():
            try:
                self._restore()
                yield
            except BaseException as error:
                if self.is_in_place:
                    raise
                if not isinstance(error, SystemExit) and not (self.folder / "replaced").exists():
                    shutil.rmtree(self.folder, ignore_errors=True)
                if isinstance(error, OSError):
                    raise UnfinishedConversionError(_explain(error, self.destination)) from error
                raise
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UnfinishedConversionError(_explain(error, self.destination)) from error
        with contextlib.ExitStack() as stack:
            if fcntl is not None:
                handle = os.open(self.folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                try:
                    # ends with the process, however that ends
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ConversionError(
                        f"another conversion is writing {self.folder}; wait for it, or choose another destination"
                    ) from error
                except OSError:
                    # a file system without locks
                    pass
            yield

    def _restore(self) -> None:
        """Bring the folder into the state of the record: of a killed process there may be more."""
        aside = self.folder / "replaced"
        if aside.exists() and not self.destination.exists():
            os.rename(aside, self.destination)
        if self.result is None:
            self.files.mkdir(exist_ok=True)
            self.done = {path: digest for path, digest in self.done.items() if _is_whole(self.files / path, digest)}
            for path in self.files.rglob("*"):
                if path.is_file() and path.relative_to(self.files).as_posix() not in self.done:
                    path.unlink()
        self._record()

    def note(self, path: str, digest: str) -> None:
        """Note that a weights file is whole."""
        self.done[path] = digest
        self._record()

    def finish(self, result: dict[str, Any]) -> None:
        """Note that all files are written, and what is to be reported of them."""
        self.result = result
        self._record()

    def _record(self) -> None:
        new = self.folder / "job.json.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump({"arguments": self.arguments, "done": self.done, "result": self.result}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / "job.json")

    def put_in_place(self, *, overwrite: bool) -> None:
        """Let the files take the place of the destination, if they have not yet."""
        if self.is_in_place:
            return
        aside = self.folder / "replaced"
        if not overwrite or not self.destination.exists():
            # rename takes the place of an empty folder, and of no other
            os.rename(self.files, self.destination)
            return
        try:
            os.rename(self.destination, aside)
            os.rename(self.files, self.destination)
        except BaseException:
            if aside.exists() and not self.destination.exists():
                os.rename(aside, self.destination)
            raise


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain(error: OSError, destination: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk that holds {destination.parent} filled up during the conversion; nothing was left at {destination}; "
            "free some space, or choose a destination on another disk"
        )
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
        return f"destination {destination} was filled by someone else during the conversion; choose another"
    reason = error.strerror or str(error)
    return (
        f"the conversion stopped, and nothing was left at {destination}: {reason} ({error.filename or 'no file named'})"
    )
