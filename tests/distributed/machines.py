"""Two machines for tests: network namespaces joined by a cable, or two loopback addresses where none can be made."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.launching import SECONDS, descendants, free_port

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    """A place to start commands in."""

    address: str
    enter: tuple[str, ...] = ()
    """What to put before a command."""
    options: tuple[str, ...] = ()
    """What launch.sh cannot find out here."""


@dataclass
class Started:
    """A command under way, in its own session. Its output goes to a file, so that nobody need read it in time."""

    process: subprocess.Popen[bytes]
    log: Path
    children: list[int] = field(default_factory=list)
    """Its descendants when it was killed, which may outlive it."""

    @property
    def output(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        """SIGKILL for the command alone, not for what it started."""
        self.children = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()


@dataclass
class Machines:
    """Two machines, and what was started on them."""

    machines: tuple[Machine, Machine]
    started: list[Started] = field(default_factory=list)

    def launch(self, folder: Path, recipe: Path, *overrides: str, **environment: str) -> tuple[Started, Started]:
        """``examples/multi_node/launch.sh``, the same on both, with two processes each; output in ``folder``."""
        launch = self.launcher(folder, recipe, *overrides, **environment)
        return launch(0), launch(1)

    def launcher(
        self,
        folder: Path,
        recipe: Path,
        *overrides: str,
        nodes: str = "2",
        options: Sequence[str] = (),
        **environment: str,
    ) -> Callable[[int], Started]:
        """What does that on the machine of a number, also when it has failed. ``DISK`` is a folder of each."""
        script = str(ROOT / "examples/multi_node/launch.sh")
        first = f"{self.machines[0].address}:{free_port()}"
        arguments = ["--first", first, "--nodes", nodes, "--processes", "2", *options]

        def launch(number: int) -> Started:
            machine = self.machines[number]
            return self.start(
                [*machine.enter, script, *arguments, *machine.options, str(recipe), *overrides],
                folder / f"output_of_{machine.address}.log",
                **environment,
                DISK=str(folder / f"disk{number}"),
            )

        return launch

    def start(self, command: list[str], log: Path, **environment: str) -> Started:
        """A command in the surroundings of the tests' own; ``environment`` is added."""
        surroundings = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
        surroundings |= {"OMP_NUM_THREADS": "1", "MEGAGAP_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=surroundings | environment,
                start_new_session=True,
            )
        self.started.append(Started(process, log))
        return self.started[-1]

    def kill_all(self) -> None:
        """End what is left of everything started."""
        for one in self.started:
            left = [pid for pid in one.children if _is_training(pid)]
            if one.process.poll() is None:
                left += [*descendants(one.process.pid), one.process.pid]
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            one.process.wait()


def finish(started: tuple[Started, ...], seconds: float = SECONDS) -> list[int]:
    """Wait for the end of all; their exit codes. Fails with the outputs when ``seconds`` are over."""
    wait_until(lambda: all(one.process.poll() is not None for one in started), started, seconds)
    return [one.process.returncode for one in started]


def wait_until(condition: Callable[[], object], started: tuple[Started, ...], seconds: float = SECONDS) -> None:
    """Wait for a condition. Fails with the outputs if a command ends unsuccessfully before, or in time-out."""
    deadline = time.monotonic() + seconds
    while not condition():
        outputs = "\n".join(one.output for one in started)
        assert not any(one.process.poll() for one in started), outputs
        assert time.monotonic() < deadline, f"waited in vain for {seconds} s\n{outputs}"
        time.sleep(0.05)


@cache
def can_make_namespaces() -> bool:
    """Whether this process may make network namespaces (as root, with iproute2); tried out."""
    try:
        with namespaces():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def namespaces() -> Iterator[Machines]:
    """Two network namespaces with a cable between them and no other interface."""
    names = [f"megagap-{os.getpid()}-{number}" for number in (1, 2)]
    addresses = ["10.71.0.1", "10.71.0.2"]
    first, second = (
        Machine(address, enter=("ip", "netns", "exec", name)) for name, address in zip(names, addresses, strict=True)
    )
    machines = Machines((first, second))
    with ExitStack() as cleanup:
        for name in names:
            _ip("netns", "add", name)
            cleanup.callback(_remove_namespace, name)
        cleanup.callback(machines.kill_all)
        _ip("link", "add", "cable1", "netns", names[0], "type", "veth", "peer", "name", "cable2", "netns", names[1])
        for number, (name, address) in enumerate(zip(names, addresses, strict=True), start=1):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            _ip("-n", name, "link", "set", f"cable{number}", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield machines


@contextmanager
def loopback_addresses() -> Iterator[Machines]:
    """This machine twice, under two of its loopback addresses."""
    first, second = (Machine(address, options=("--address", address)) for address in ("127.0.0.1", "127.0.0.2"))
    machines = Machines((first, second))
    try:
        yield machines
    finally:
        machines.kill_all()


def _remove_namespace(name: str) -> None:
    """With all that still runs in it, whoever its parents are."""
    for pid in _ip("netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "delete", name)


def _is_training(pid: int) -> bool:
    """Whether it is a process of ours, not another that got its number meanwhile."""
    try:
        return b"megagap.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
