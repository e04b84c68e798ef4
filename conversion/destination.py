"""The folder a conversion writes, checked before anything is written."""

import os
import shutil
from pathlib import Path

from hf_sparse.errors import ConversionError


def check_destination(destination: str | os.PathLike[str], *, source: Path) -> Path:
    """Return the folder that will be written, links resolved.

    Args:
        destination: what the caller asked for.
        source: folder of the source.

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
    if source == wanted.with_name(f"{wanted.name}.partial"):
        raise ConversionError(
            f"the source {source} has the name that a conversion to {wanted} writes to meanwhile; choose another destination"
        )
    if os.path.ismount(wanted):
        raise ConversionError(
            f"destination {wanted} is a disk of its own, which no folder can take the place of; choose a folder in it"
        )
    parent = wanted.parent
    if not parent.is_dir():
        raise ConversionError(f"{parent}, the folder that is to hold the destination, does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConversionError(f"{parent}, the folder that is to hold the destination, may not be written")
    return wanted


def check_free(wanted: Path, *, overwrite: bool) -> None:
    """Check that a folder may be written, as far as what it holds goes.

    Args:
        wanted: the folder.
        overwrite: whether a folder that is not empty is replaced.

    Raises:
        ConversionError: if it holds something that is not to be replaced.
    """
    if wanted == Path.cwd():
        raise ConversionError(f"destination {wanted} is the current folder, which would be replaced; choose one in it")
    if not wanted.is_dir() or not any(wanted.iterdir()):
        return
    if not overwrite:
        raise ConversionError(
            f"destination {wanted} exists and is not empty; choose another, or pass overwrite=True (--overwrite)"
        )
    here = Path.cwd()
    if wanted in (here, *here.parents, Path.home()):
        raise ConversionError(f"destination {wanted} is not replaced: it holds the current folder or is your home")


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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
