"""Real launches: torchrun in a process of its own, and ways to end it."""

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from pathlib import Path

from tests.warm_start import python
from tests.warm_start import torchrun as warm_torchrun
from tools.processes import descendants, kill_tree

__all__ = ["descendants", "finish", "free_port", "interrupt_torchrun", "is_alive", "is_training", "kill_all"]
__all__ += ["launch", "start_ranks", "wait_until"]

SECONDS = 900.0
"""Upper bound of every wait, only to end what hangs: a busy machine takes many times as long as a free one."""

_launched: list[subprocess.Popen[str]] = []


def launch(
    recipe: Path,
    ranks: int,
    *overrides: str,
    stall_after: int | str = 0,
    dies: tuple[int, str] | None = None,
    hangs: tuple[int, str] | None = None,
    cold: bool = False,
) -> subprocess.Popen[str]:
    """``torchrun --nproc-per-node RANKS -m megagap.train RECIPE OVERRIDES``; one rank runs without torchrun.

    They are forks of a Python that has torch (:mod:`tests.warm_start`), unless ``cold``: then they import it, and are
    children of who starts them.

    ``stall_after``: the run stands still once it has made so many steps, to be killed there at leisure; with ``N:RANK``
    that rank only. ``dies``: this rank is killed at this place of the third step (``tests/dying_train.py``). ``hangs``:
    it stands still there (``tests/hanging_train.py``).
    """
    if ranks == 1:
        launcher = [sys.executable if cold else python()]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run"] if cold else [warm_torchrun()]
        launcher = [*torchrun, "--standalone", "--nproc-per-node", str(ranks)]
    return _start([*launcher, *_program(stall_after, dies, hangs), str(recipe), *overrides])


def start_ranks(
    recipe: Path,
    ranks: int,
    *overrides: str,
    stall_after: int | str = 0,
    dies: tuple[int, str] | None = None,
    hangs: tuple[int, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """The processes that :func:`launch` starts, without torchrun: by rank, each with its own end."""
    command = [python(), *_program(stall_after, dies, hangs), str(recipe), *overrides]
    run = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    places = [run | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {} for rank in range(ranks)]
    return [_start(command, **{name: str(value) for name, value in place.items()}) for place in places]


def _program(stall_after: int | str, dies: tuple[int, str] | None, hangs: tuple[int, str] | None = None) -> list[str]:
    if hangs is not None:
        return ["-m", "tests.hanging_train", *map(str, hangs)]
    if dies is not None:
        return ["-m", "tests.dying_train", *map(str, dies)]
    return ["-m", "tests.stalling_train", str(stall_after)] if stall_after else ["-m", "megagap.train"]


def _start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=Path(__file__).parents[1],
    )
    _launched.append(process)
    return process


def kill_what_is_left() -> None:
    """End every launched process that its test has not."""
    while _launched:
        if (process := _launched.pop()).poll() is None:
            kill_all(process)


PORTS, BLOCK = range(20_100, 30_000), 100
"""Below those that the system hands out by itself, above those of the first jobs' numbers in train.sbatch."""


def free_port() -> int:
    """A port that nobody listens at, and that no other process of tests on this machine is about to."""
    for port in _own_ports():
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise AssertionError("ports are taken in turn without end")


@cache
def _own_ports() -> Iterator[int]:
    """A block of ports, in turn. It is this process's as long as its file is locked: a run listens seconds after its
    port was chosen, so that ports chosen at random by several processes now and then met."""
    folder = Path(tempfile.gettempdir()) / f"megagap-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for first in random.sample(PORTS[::BLOCK], len(PORTS[::BLOCK])):
        lock = os.open(folder / str(first), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return cycle(range(first, first + BLOCK))  # the file stays open
    raise RuntimeError(f"all {len(PORTS[::BLOCK])} blocks of ports are taken by other tests: see {folder}")


def finish(process: subprocess.Popen[str], timeout: float = SECONDS) -> tuple[int, str]:
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
    return _state(pid) not in ("", "Z")


def _state(pid: int) -> str:
    """Of a process's main thread, as ps has it; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def interrupt_torchrun(process: subprocess.Popen[str]) -> None:
    """Ctrl-C for a torchrun of its own (``cold``), while it sleeps between two looks at its workers.

    One that comes as it calls a function makes it pass SIGTERM on instead: in torch 2.13's ``elastic/metrics/api.py``
    the wrapper of functions then raises an UnboundLocalError, in the place of what tells of the signal.
    """
    wait_until(lambda: _state(process.pid) == "S", process)
    process.send_signal(signal.SIGINT)


def is_training(run: Path) -> bool:
    """Whether a step has its record in this run directory: every rank has begun then, and answers signals."""
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | None = None, seconds: float = SECONDS
) -> None:
    """Wait for a condition; fail with the output if ``process`` ends before, or when ``seconds`` are over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
