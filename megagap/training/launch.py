"""How a process starts and ends: device, threads, process groups, messages, exit codes."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from megagap.errors import INTERRUPTED, DistributedError, LostPeerError, MegagapError
from megagap.training.allocator import keep_freed_memory
from megagap.training.parent import UNDER_TORCHRUN

GROUP_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before its process gives up."""

LINGER_SECONDS = 5.0
"""How long the other ranks wait before leaving, so that torchrun's SIGTERM does not swallow the message."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Process:
    """This process's place, from torchrun's environment; a run of one without it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> "Process":
        """Raises :class:`DistributedError` if the environment holds only a part of what torchrun sets."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        values = {name: os.environ.get(name, default) for name, default in names.items()}
        torchruns = [*names, "MASTER_ADDR", "MASTER_PORT"]
        if not all(value.isdecimal() for value in values.values()) or (
            values["WORLD_SIZE"] != "1" and any(name not in os.environ for name in torchruns)
        ):
            found = ", ".join(f"{name}={os.environ[name]}" for name in torchruns if name in os.environ)
            raise DistributedError(
                f"the environment does not say where this process belongs: {found}\n"
                "  start with torchrun, which sets it, or unset these variables for a run of one process."
            )
        return cls(*map(int, values.values()))


def start(process: Process) -> torch.device:
    """Choose device and threads, and join the process group. Returns the device."""
    if torch.cuda.is_available():
        if process.local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"{process.local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs\n"
                "  start one a GPU: torchrun --nproc-per-node."
            )
        device = torch.device("cuda", process.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
        if not _threads_are_chosen():
            torch.set_num_threads(max(1, available_cores() // process.local_world_size))
    if process.world_size > 1:
        # gloo beside NCCL carries the small objects that checkpoints exchange.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    return device


def available_cores() -> int:
    """Cores that this process may use; fewer than the machine's under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads_are_chosen() -> bool:
    """Whether the user set OMP_NUM_THREADS. torchrun sets it to 1 by itself: what it was started with tells."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if UNDER_TORCHRUN not in os.environ:
        return True
    try:
        return b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True


@contextmanager
def orderly_exit(process: Process) -> Iterator[list[Callable[[str], None]]]:
    """Ends the process with the block: 0 when done, an error's code and message on a fault that is not ours, 1 with a
    traceback on one of ours.

    Yields a list of functions to be told why the run failed.
    """
    on_failure: list[Callable[[str], None]] = []
    # Until the run's own log is open, faults are printed here only, not by logging's last resort too.
    logging.getLogger("megagap").addHandler(logging.NullHandler())
    try:
        yield on_failure
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while others still need it
            dist.destroy_process_group()
        code = 0
    except BaseException as caught:
        error = _lost_peer(process, caught) or caught
        if isinstance(error, MegagapError):
            _tell(on_failure, str(error))
            _say(process, error)
            code = error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            _tell(on_failure, "interrupted")
            print("interrupted: start the same command again to go on from the last checkpoint", file=sys.stderr)
            code = INTERRUPTED
        else:
            _tell(on_failure, f"{type(error).__name__}: {error}")
            log.exception("rank %d failed", process.rank)
            traceback.print_exc()
            code = 1
    _exit(code)


def _lost_peer(process: Process, error: BaseException) -> LostPeerError | None:
    """What a failed collective means: torch reports it by types and texts of its back ends."""
    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        return LostPeerError(
            f"rank {process.rank} lost contact with another rank: {text.strip().splitlines()[0] if text else error!r}\n"
            "  the cause stands in that rank's output or log, if it left word. Start the same command again to go on "
            "from the last checkpoint."
        )
    return None


def _tell(listeners: list[Callable[[str], None]], message: str) -> None:
    for listener in listeners:
        try:
            listener(message)
        except OSError as error:  # a full disk, perhaps the very fault: the message is still printed
            log.error("cannot leave word of the failure: %s", error)


def _say(process: Process, error: MegagapError) -> None:
    """Print a fault. Most meet all ranks alike: rank 0 speaks at once, the others only if that does not end them.

    A lost peer may be rank 0 itself: then the first rank of each machine speaks at once.
    """
    message = str(error)
    log.error(message)
    is_lost_peer = isinstance(error, LostPeerError)
    if (process.local_rank if is_lost_peer else process.rank) != 0:
        if not is_lost_peer:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's answer to rank 0's end: nothing is left to say
        time.sleep(LINGER_SECONDS)
        message = f"rank {process.rank}: {message}"
    print(message, file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    # Interpreter shutdown can abort in gloo's threads even after a clean destroy_process_group.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
