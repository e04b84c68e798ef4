"""The processes that share a run: how many there are, and what is said when one of them is gone."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_sparse.errors import LostProcessError

# what gloo says of a peer that is gone or silent; NCCL's errors have a class
_OF_GLOO = re.compile(r"gloo|connection (closed|reset|refused)|timed out waiting", re.IGNORECASE)


def count_processes() -> int:
    """Return how many processes share the run."""
    is_one_of_many = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_one_of_many else 1


def part() -> None:
    """Part from the other processes, at the end of a program: left to the interpreter, gloo's threads may abort it."""
    if count_processes() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def mean_of_all(total: Tensor, count: Tensor | int, *, is_training: bool) -> Tensor:
    """Return the mean of what all processes have: what each returns, averaged over processes, is that.

    Args:
        total: what this process adds up, a scalar.
        count: of how many.
        is_training: whether others are at the same batch; if not, the mean is of this process.
    """
    own = torch.as_tensor(count, dtype=total.dtype, device=total.device)
    processes = count_processes()
    if not is_training or processes == 1:
        return total / own.clamp(min=1)
    torch.distributed.all_reduce(own)
    return processes * total / own.clamp(min=1)


@contextlib.contextmanager
def telling_of_lost_processes(folder: Path) -> Iterator[None]:
    """Say in one line that another process is gone, and how to go on, where the backend would tell of a connection.

    Args:
        folder: that the run writes to.

    Raises:
        LostProcessError: in the place of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not tells_of_a_peer(error):
            raise
        # a bar of progress leaves its line open
        print(file=sys.stderr)
        raise LostProcessError(
            f"another of the {count_processes()} processes has ended or does not answer, and what it said itself tells why; "
            f"go on from the last checkpoint in {folder} with --resume"
        ) from error


def tells_of_a_peer(error: Exception) -> bool:
    """Say whether an error is a backend's, of a connection to another process of the run."""
    if count_processes() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.distributed.DistError) or bool(_OF_GLOO.search(str(error)))
