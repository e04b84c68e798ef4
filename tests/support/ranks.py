"""Programs that run in several processes, started by torchrun; nothing here knows hf_sparse."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ON_TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a launcher at the root of the repository, each of its processes on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def finish(launcher: subprocess.Popen[str], *, seconds: float) -> tuple[int, str, str]:
    """Return a launcher's exit code, what it printed and what it complained of.

    One that takes longer is ended, with what it started: to SIGTERM torchrun ends its processes, to SIGKILL it would leave
    them behind.

    Raises:
        TimeoutError: if it took longer.
    """
    try:
        said, complained = launcher.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        launcher.send_signal(signal.SIGTERM)
        try:
            _, complained = launcher.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            launcher.kill()
            complained = "it did not end by SIGTERM"
        raise TimeoutError(f"took longer than {seconds} s: {complained[-2000:]}") from error
    return launcher.returncode, said, complained


def run_on_two(module: str, *arguments: str, seconds: float = 300) -> None:
    """Run a module of the tests in two processes, which must succeed."""
    code, said, complained = finish(start([*ON_TWO, "-m", module, *arguments]), seconds=seconds)
    assert code == 0, said[-1000:] + complained[-4000:]
