"""Real launches: torchrun in a process of its own, and ways to end it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools.processes import descendants, kill_tree

__all__ = ["descendants", "finish", "is_alive", "kill_all", "launch", "wait_until"]


def launch(recipe: Path, ranks: int, *overrides: str) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node RANKS -m megagap.train RECIPE OVERRIDES``; one rank runs without torchrun."""
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    return subprocess.Popen(
        [*launcher, "-m", "megagap.train", str(recipe), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str]:
    """Wait for the end; exit code and all output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    return process.returncode, output


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher and all its descendants, which are in sessions of their own."""
    kill_tree(process.pid)
    process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = 180
) -> None:
    """Wait for a condition; fail with the output if ``process`` ends before, or when ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
