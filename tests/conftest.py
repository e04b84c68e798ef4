"""Fixtures for all tests."""

import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from hf_sparse import cli, console

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run a module on one thread: for tensors as small as most tests have, a second one only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hf_sparse_command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Return a function that runs ``hf-sparse`` here: its exit code, stdout and stderr."""
    held = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # a process that was started in the background inherits that it is to ignore this one
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def command(*args: str) -> tuple[int, str, str]:
        # bars of the models that a test saved
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            console.run(cli.app, "hf-sparse", args)
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, said.out, said.err

    yield command
    for number, handler in held.items():
        signal.signal(number, handler)
