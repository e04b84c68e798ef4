"""A conversion that does not get to its end leaves nothing at the destination, and what was there where it replaces."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

import pytest
import torch

import hf_sparse
from hf_sparse.conversion import shards, verify
from hf_sparse.errors import ConversionError, UnfinishedConversionError
from tests.support.checkpoints import tree

BAND = hf_sparse.pattern("band", radius=8)


def at_second_shard(act: Callable[[], None]) -> Callable[[BinaryIO, bytes], None]:
    """Return a writer that acts once it comes to the second shard."""

    def write(file: BinaryIO, chunk: bytes) -> None:
        if "00002-of" in file.name:
            act()
        file.write(chunk)

    return write


def disk_is_full() -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def ctrl_c() -> NoReturn:
    raise KeyboardInterrupt


def failing(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error", "/disk")


@pytest.fixture(params=[False, True], ids=["new", "overwrite"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, bytes]:
    """What stands at the destination ``tmp_path / "sparse"``: nothing, or a file."""
    if not request.param:
        return {}
    (tmp_path / "sparse").mkdir()
    (tmp_path / "sparse/old.txt").write_bytes(b"old")
    return {"old.txt": b"old"}


def assert_untouched(folder: Path, held: dict[str, bytes]) -> None:
    """Check that a folder holds the source, and at most what the destination held before."""
    assert sorted(path.name for path in folder.iterdir()) == (["bert", "sparse"] if held else ["bert"])
    assert tree(folder / "sparse") == held


def test_a_disk_that_fills_up_in_the_middle(
    bert: Path, tmp_path: Path, held: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "write_bytes", at_second_shard(disk_is_full))
    with pytest.raises(ConversionError, match=r"filled up.*nothing was left at .*sparse; free some space") as caught:
        hf_sparse.convert(bert, tmp_path / "sparse", BAND, overwrite=True)
    assert isinstance(caught.value, UnfinishedConversionError)
    assert_untouched(tmp_path, held)


def test_ctrl_c_in_the_middle(
    bert: Path, tmp_path: Path, held: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "write_bytes", at_second_shard(ctrl_c))
    with pytest.raises(KeyboardInterrupt):
        hf_sparse.convert(bert, tmp_path / "sparse", BAND, overwrite=True)
    assert_untouched(tmp_path, held)


def test_a_progress_that_raises(bert: Path, tmp_path: Path, held: dict[str, bytes]) -> None:
    def raises(done: int, total: int) -> None:
        raise RuntimeError(f"{done} of {total}")

    with pytest.raises(RuntimeError, match=" of "):
        hf_sparse.convert(bert, tmp_path / "sparse", BAND, overwrite=True, progress=raises)
    assert_untouched(tmp_path, held)


def test_a_rename_that_fails(
    bert: Path, tmp_path: Path, held: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refuse_the_new(source: Path, place: Path) -> None:
        failing() if Path(source).name == "files" else rename(source, place)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    with pytest.raises(UnfinishedConversionError, match=r"nothing was left at .*Input/output error \(/disk\)"):
        hf_sparse.convert(bert, tmp_path / "sparse", BAND, overwrite=True)
    assert_untouched(tmp_path, held)


def test_a_destination_that_someone_else_fills_meanwhile(bert: Path, tmp_path: Path) -> None:
    def fill(done: int, total: int) -> None:
        (tmp_path / "sparse").mkdir(exist_ok=True)
        (tmp_path / "sparse/theirs.txt").write_bytes(b"theirs")

    with pytest.raises(UnfinishedConversionError, match="was filled by someone else"):
        hf_sparse.convert(bert, tmp_path / "sparse", BAND, progress=fill, verify=False)
    assert_untouched(tmp_path, {"theirs.txt": b"theirs"})


def test_a_result_that_does_not_agree_with_its_source(
    bert: Path, tmp_path: Path, held: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shards.StoredTensor.chunks

    def spoiled(tensor: shards.StoredTensor) -> object:
        is_spoiled = tensor.name.endswith("layer.1.output.dense.weight")
        return (bytes(len(chunk)) if is_spoiled else chunk for chunk in real(tensor))

    monkeypatch.setattr(shards.StoredTensor, "chunks", spoiled)
    with pytest.raises(UnfinishedConversionError, match=r"differs from its source by \d.*nothing was kept"):
        hf_sparse.convert(bert, tmp_path / "sparse", BAND, overwrite=True)
    assert_untouched(tmp_path, held)


def test_a_result_that_is_not_a_number_does_not_agree(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.outputs
    seen: list[bool] = []

    def spoiled(*args: object) -> tuple[dict[str, torch.Tensor], bool]:
        outputs, is_whole = real(*args)  # type: ignore[arg-type]
        seen.append(True)
        return {name: value * float("nan") if len(seen) > 1 else value for name, value in outputs.items()}, is_whole

    monkeypatch.setattr(verify, "outputs", spoiled)
    with pytest.raises(UnfinishedConversionError, match="differs from its source by nan"):
        hf_sparse.convert(bert, tmp_path / "sparse", BAND)
    assert_untouched(tmp_path, {})
