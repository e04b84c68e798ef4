"""The folder a conversion writes: checked first, filled beside its place, renamed at the end."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_sparse.errors import ConversionError, UnfinishedConversionError


def check_destination(destination: str | os.PathLike[str], *, source: Path, overwrite: bool) -> Path:
    """Return the folder that will be written, links resolved.

    Args:
        destination: what the caller asked for.
        source: folder of the source.
        overwrite: whether a folder that is not empty is replaced.

    Raises:
        ConversionError: if it cannot be written, or would touch the source.
    """
    wanted = Path(destination).expanduser().resolve()
    source = source.resolve()
    if wanted == source or source in wanted.parents:
        raise ConversionError(f"destination {wanted} lies in the source {source}; choose a folder outside of it")
    if wanted in source.parents:
        raise ConversionError(f"destination {wanted} holds the source {source}; choose another folder")
    if wanted.exists() and not wanted.is_dir():
        raise ConversionError(f"destination {wanted} is a file; choose a folder")
    if wanted.is_dir() and any(wanted.iterdir()):
        if not overwrite:
            raise ConversionError(
                f"destination {wanted} exists and is not empty; choose another, or pass overwrite=True (--overwrite)"
            )
        here = Path.cwd()
        if wanted in (here, *here.parents, Path.home()):
            raise ConversionError(f"destination {wanted} is not replaced: it holds the current folder or is your home")
    parent = wanted.parent
    if not parent.is_dir():
        raise ConversionError(f"{parent}, the folder that is to hold the destination, does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{parent}, the folder that is to hold the destination, may not be written")
    return wanted


def check_space(destination: Path, size: int) -> None:
    """Check that a number of bytes fits beside the destination.

    Raises:
        ConversionError: if it does not.
    """
    free = shutil.disk_usage(destination.parent).free
    if size > free:
        raise ConversionError(
            f"the conversion will write {_megabytes(size)} and {destination.parent} has {_megabytes(free)} free; free some, or "
            "choose a destination on another disk"
        )


@contextlib.contextmanager
def partial_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder beside the destination, which takes its place at the end.

    Whatever is raised inside, the folder is removed and the destination is as it was. A killed process (``kill -9``) may
    leave the folder ``<destination>.partial-...`` behind, and nothing at the destination.

    Raises:
        UnfinishedConversionError: if the disk refuses to be written.
    """
    tag = f"{os.getpid()}-{secrets.token_hex(3)}"
    partial = destination.with_name(f"{destination.name}.partial-{tag}")
    try:
        partial.mkdir()
        yield partial
        _put_in_place(partial, destination, destination.with_name(f"{destination.name}.replaced-{tag}"), overwrite)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UnfinishedConversionError(_explain(error, destination)) from error
        raise


def _put_in_place(partial: Path, destination: Path, aside: Path, overwrite: bool) -> None:
    if not overwrite or not destination.exists():
        # rename takes the place of an empty folder, and of no other
        os.rename(partial, destination)
        return
    os.rename(destination, aside)
    try:
        os.rename(partial, destination)
    except BaseException:
        os.rename(aside, destination)
        raise
    shutil.rmtree(aside, ignore_errors=True)


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
