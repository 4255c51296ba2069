"""How a process starts and ends: device, threads, process groups, messages, exit codes."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from megagap.errors import (
    INTERRUPTED,
    ConfigError,
    DistributedError,
    FileSystemError,
    LostPeerError,
    MegagapError,
    file_system_error,
)
from megagap.training.allocator import keep_freed_memory
from megagap.training.parent import UNDER_TORCHRUN
from megagap.training.rendezvous import Process, join, warn_of_several_runs

GROUP_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before its process gives up."""

LINGER_SECONDS = 5.0
"""How long the other ranks wait before leaving, so that torchrun's SIGTERM does not swallow the message."""

log = logging.getLogger(__name__)


def start(process: Process) -> torch.device:
    """Choose device and threads, and join the process group. Returns the device."""
    threads = chosen_threads()
    if process.rank == 0:
        warn_of_several_runs()
    if torch.cuda.is_available():
        if process.local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"{process.local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs\n"
                "  start one per GPU: torchrun --nproc-per-node."
            )
        device = torch.device("cuda", process.local_rank)
        torch.cuda.set_device(device)
    else:
        if process.rank == 0:
            _warn_of_invisible_gpus()
        device = torch.device("cpu")
        keep_freed_memory()
        if threads is None:
            torch.set_num_threads(max(1, available_cores() // process.local_world_size))
    if process.world_size > 1:
        # gloo beside NCCL carries the small objects that checkpoints exchange.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        join(process, backend, GROUP_TIMEOUT)
    return device


def _warn_of_invisible_gpus() -> None:
    """Where the user chose GPUs of which torch sees none, the run would silently be on the CPU."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        chosen = os.environ.get(name, "")
        if chosen not in ("", "-1", "NoDevFiles"):  # the last is Slurm's for none
            log.warning("%s=%s, but torch finds no GPU: computing on the CPU", name, chosen)


def available_cores() -> int:
    """Cores that this process may use; fewer than the machine's under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_threads() -> int | None:
    """OMP_NUM_THREADS, if the user set it. torchrun sets it to 1 by itself: what it was started with tells.

    Raises :class:`ConfigError` if it is no number of threads.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    if not given.strip():
        return None
    levels = [level.strip() for level in given.split(",")]  # one number for each level of nested regions
    if not all(level.isascii() and level.isdecimal() and 0 < int(level) < 2**31 for level in levels):
        raise ConfigError(
            f"OMP_NUM_THREADS={given} in the environment: must be a number of threads, such as 4\n"
            "  unset, each process takes its share of the cores."
        )
    return int(levels[0]) if _is_the_users() else None


def _is_the_users() -> bool:
    """Whether OMP_NUM_THREADS was set before torchrun started."""
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

    An OSError is not a bug in megagap: it says what the system refused. Yields a list of functions to be told why the
    run failed.
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
        error = _lost_peer(process, caught) or _refused_by_system(caught) or caught
        if isinstance(error, MegagapError):
            _notify(on_failure, str(error))
            _print_error(process, error)
            code = error.exit_code
        elif isinstance(error, KeyboardInterrupt):
            _notify(on_failure, "interrupted")
            _print("interrupted: start the same command again to go on from the last checkpoint")
            code = INTERRUPTED
        else:
            _notify(on_failure, f"{type(error).__name__}: {error}")
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


def _refused_by_system(error: BaseException) -> FileSystemError | None:
    """What an OSError means that no code nearer to it has named; where it was is in the log."""
    if not isinstance(error, OSError):
        return None
    log.error("refused by the system", exc_info=error)
    return file_system_error(error)


def _notify(listeners: list[Callable[[str], None]], message: str) -> None:
    for listener in listeners:
        try:
            listener(message)
        except (MegagapError, OSError) as error:  # a full disk, perhaps the very fault: the message is still printed
            log.error("cannot record the failure: %s", error)


def _print_error(process: Process, error: MegagapError) -> None:
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
    _print(message)


def _exit(code: int) -> NoReturn:
    # Interpreter shutdown can abort in gloo's threads even after a clean destroy_process_group.
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _print(message: str) -> None:
    with suppress(OSError):  # nobody reads standard error, or its disk is full: the exit code still tells
        print(message, file=sys.stderr, flush=True)
