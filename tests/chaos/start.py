"""One start of a run that is going to be harmed: its processes, and what can be done to them."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.launching import free_port, is_alive
from tests.warm_start import python
from tools.processes import descendants

ROOT = Path(__file__).parents[2]

OWN_TRACEBACK = re.compile(r'File "[^"]*/megagap/[^"]*", line')
"""torchrun prints tracebacks of its own whenever a worker fails."""


class Start:
    """The processes of one start: torchrun's, or ranks without a launcher, forks of a warm Python."""

    def __init__(
        self, folder: Path, recipe: Path, ranks: int, overrides: list[str], place: str, torchrun: bool
    ) -> None:
        """``folder``: of this start alone. ``place``: where to pause (:mod:`tests.chaos.subject`)."""
        folder.mkdir(parents=True)
        self.folder, self.ranks, self.under_torchrun = folder, ranks, torchrun
        program = ["-m", "tests.chaos.subject", str(folder), place, str(recipe), *overrides]
        if torchrun:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            self.processes = [self._start([*launcher, *program], "output", {})]
            return
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = [
            self._start(
                [python(), *program],
                f"output_{rank}",
                meeting | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {},
            )
            for rank in range(ranks)
        ]

    def _start(self, command: list[str], output: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(self.folder / output, "wb") as file:
            surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=surroundings
            )

    @property
    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("output*")))

    @property
    def has_own_traceback(self) -> bool:
        return "Traceback" in self.output and OWN_TRACEBACK.search(self.output) is not None

    @property
    def has_ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    @property
    def exit_codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def reached(self) -> int | None:
        """A rank that got to the place to pause at."""
        for marker in self.folder.glob("reached_*"):
            return int(marker.name.removeprefix("reached_"))
        return None

    def pid(self, rank: int) -> int | None:
        """The process of a rank; None before it has come to say so."""
        try:
            return int((self.folder / f"pid_{rank}").read_text())
        except FileNotFoundError:
            return None

    def signal_rank(self, rank: int, number: int) -> None:
        pid = self.pid(rank)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        elif not self.under_torchrun:
            self.processes[rank].send_signal(number)

    def signal_all(self, number: int) -> None:
        for rank in range(self.ranks):
            self.signal_rank(rank, number)

    def signal_launcher(self, number: int) -> None:
        assert self.under_torchrun
        self.processes[0].send_signal(number)

    def limit_files(self, size: int) -> None:
        """No rank can write more than so many bytes to a file from now on."""
        for pid in filter(None, map(self.pid, range(self.ranks))):
            with suppress(ProcessLookupError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    def wait(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait for a condition; False if the start ended before, or the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.has_ended or time.monotonic() > deadline:
                return bool(condition())
            time.sleep(0.003)
        return True

    def wait_for_end(self, seconds: float) -> bool:
        """Whether all processes ended in time, workers of a dead launcher included."""
        deadline = time.monotonic() + seconds
        while not self.has_ended or self.left():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def left(self) -> list[int]:
        """Ranks' processes that are alive."""
        return [pid for pid in map(self.pid, range(self.ranks)) if pid is not None and is_alive(pid)]

    def kill(self) -> None:
        """End everything, whatever state it is in."""
        everything = self.left()
        for process in self.processes:
            if process.poll() is None:
                everything += [*descendants(process.pid), process.pid]
        for pid in everything:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        while self.left():  # a killed process ends when it is scheduled
            time.sleep(0.02)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of ``size`` bytes at ``folder``, where this process may mount one; yields whether it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "megagap-chaos", str(folder)]
        is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, name: str = "ballast") -> Path:
    """A file beside the run that takes all the space that is left."""
    path = folder / name
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    return path
