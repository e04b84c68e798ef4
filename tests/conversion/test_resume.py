"""A conversion that is killed leaves nothing at the destination, and the same call goes on with what it had written."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hf_sparse
from hf_sparse.errors import ConversionError, PushError
from tests.support.checkpoints import tree, write_checkpoint, write_tokenizer

BAND = hf_sparse.pattern("band", radius=8)
# where, and how many of the two weights files are whole by then
POINTS = {"first shard": 0, "second shard": 1, "comparison": 2, "before the renaming": 2, "between the renamings": 2}
# forks, so that what is imported is imported once
KILLING = """
import json, os, signal, sys
import torch
import hf_sparse
from hf_sparse.conversion import convert, job

torch.set_num_threads(1)
source, room, points = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at(share):
    return lambda done, total: die() if done > share * total else None

def renaming(times):
    rename, seen = os.rename, []
    def second(*places):
        seen.append(places)
        die() if len(seen) == times else rename(*places)
    return second

for place, point in points.items():
    child = os.fork()
    if not child:
        progress = {"first shard": at(0.25), "second shard": at(0.75)}.get(point)
        if point == "comparison":
            sys.modules["hf_sparse.conversion.convert"].compared = die
        if point.endswith("renaming"):
            job.os.rename = renaming(1)
        if point.endswith("renamings"):
            job.os.rename = renaming(2)
        convert(source, f"{room}/{place}", hf_sparse.pattern("band", radius=8), progress=progress, overwrite=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def record_of(destination: Path) -> Any:
    """Return what a killed conversion noted."""
    return json.loads((destination.with_name(f"{destination.name}.partial") / "job.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT in two shards."""
    folder = tmp_path_factory.mktemp("source") / "bert"
    write_checkpoint(folder, "Bert", "ForMaskedLM", max_shard_size="60KB")
    write_tokenizer(folder, "Bert")
    return folder


@pytest.fixture(scope="module")
def killed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what conversions left that were killed, named by the points; the last had something to replace."""
    room = tmp_path_factory.mktemp("killed")
    (room / "between the renamings").mkdir()
    (room / "between the renamings/old.txt").write_text("old")
    (room / "room").mkdir()
    points = {**{point: point for point in POINTS}, "room/left": "second shard"}
    program = [sys.executable, "-c", KILLING, str(source), str(room), json.dumps(points)]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(-signal.SIGKILL)] * len(points), ran.stderr
    return room


@pytest.mark.several_processes
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_nothing_half_written_and_the_same_call_goes_on(
    killed: Path, source: Path, tmp_path: Path, point: str
) -> None:
    made = killed / point
    assert not made.exists()
    assert len(record_of(made)["done"]) == POINTS[point]
    report = hf_sparse.convert(source, made, BAND, overwrite=True)
    unbroken = hf_sparse.convert(source, tmp_path / "unbroken", BAND)
    assert tree(made) == tree(tmp_path / "unbroken")
    assert report.checksums == unbroken.checksums
    assert report.wide_open_difference == unbroken.wide_open_difference
    assert len(report.files_resumed) == POINTS[point]
    assert [path.name for path in killed.iterdir() if path.name.startswith(f"{point}.")] == []


@pytest.mark.several_processes
def test_what_was_written_is_gone_on_with_by_the_same_arguments_alone(
    killed: Path, source: Path, tmp_path: Path
) -> None:
    room, made = killed / "room", killed / "room/left"
    before = tree(room)

    def refused(says: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ConversionError, match=says):
            hf_sparse.convert(*args, **options)
        assert tree(room) == before

    refused("other arguments .max_length was null, now 300.; give the same", source, made, BAND, max_length=300)
    refused(r'other arguments .pattern was \{"key": "band"', source, made, hf_sparse.pattern("band", radius=9))
    refused("remote_code was false, now true", source, made, BAND, remote_code=True)
    shard = sorted(source.glob("*.safetensors"))[0]
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    os.utime(shard)
    refused("weights was", source, made, BAND)
    os.utime(shard, ns=times)
    # a file that changed meanwhile is written again, and what stands beside is not taken for a part of it
    files = made.with_name(f"{made.name}.partial") / "files"
    (whole,) = record_of(made)["done"]
    (files / whole).write_bytes(b"x")
    (files / "stray.txt").write_bytes(b"x")
    report = hf_sparse.convert(source, made, BAND, verify=False)
    assert report.files_resumed == ()
    assert report.checksums == hf_sparse.convert(source, tmp_path / "anew", BAND, verify=False).checksums
    assert tree(made) == tree(tmp_path / "anew")


def test_two_conversions_to_one_place_do_not_meet(source: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def meet(done: int, total: int) -> None:
        if seen:
            return
        with pytest.raises(ConversionError, match=r"another conversion is writing .*partial; wait for it") as caught:
            hf_sparse.convert(source, tmp_path / "sparse", BAND)
        seen.append(str(caught.value))

    hf_sparse.convert(source, tmp_path / "sparse", BAND, progress=meet, verify=False)
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_a_folder_that_is_in_the_way_is_named_and_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sparse.partial").mkdir()
    (tmp_path / "sparse.partial/theirs.txt").write_bytes(b"theirs")
    with pytest.raises(
        ConversionError, match=r"sparse\.partial is in the way, and holds no conversion to go on with; remove it"
    ):
        hf_sparse.convert(source, tmp_path / "sparse", BAND)
    assert tree(tmp_path) == {"sparse.partial/theirs.txt": b"theirs"}
    (tmp_path / "sparse.partial/theirs.txt").unlink()
    hf_sparse.convert(source, tmp_path / "sparse", BAND, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


def test_checksums_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    report = hf_sparse.convert(source, tmp_path / "sparse", BAND)
    program = ["sha256sum", *report.checksums]
    lines = subprocess.run(program, cwd=tmp_path / "sparse", capture_output=True, text=True, check=True).stdout
    assert dict(reversed(line.split("  ", 1)) for line in lines.splitlines()) == report.checksums
    assert report.checksums.keys() == tree(tmp_path / "sparse").keys()


def test_a_push_that_failed_is_repeated_alone_or_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["hf_sparse.conversion.convert"]
    made, answers = tmp_path / "sparse", [PushError("down"), PushError("down"), None]

    def push(folder: Path, repository: str, **_: Any) -> Any:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return SimpleNamespace(commit_url=f"hub/{repository}")

    monkeypatch.setattr(module, "check_account", lambda token: None)
    monkeypatch.setattr(module, "push_folder", push)

    def convert(**options: Any) -> hf_sparse.ConversionReport:
        return hf_sparse.convert(source, made, BAND, **options)

    with pytest.raises(
        PushError, match=r"down; .*sparse is whole, and the same call pushes it without converting again"
    ):
        convert(push_to="ada/a")
    before = tree(made)
    # without a push there is nothing left to do
    assert convert().checksums.keys() == tree(made).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]
    with pytest.raises(ConversionError, match="exists and is not empty"):
        convert()
    with pytest.raises(PushError, match="down"):
        convert(push_to="ada/a", overwrite=True)
    times = {path: path.stat().st_mtime_ns for path in made.glob("model*")}
    report = convert(push_to="ada/b", overwrite=True)
    assert report.pushed_to == "hub/ada/b"
    assert report.wide_open_difference is not None
    assert {path: path.stat().st_mtime_ns for path in made.glob("model*")} == times
    assert 'from_pretrained("ada/b")' in (made / "README.md").read_text()
    assert before.keys() == tree(made).keys()
    assert report.checksums == {name: hashlib.sha256(held).hexdigest() for name, held in tree(made).items()}
    assert answers == []
