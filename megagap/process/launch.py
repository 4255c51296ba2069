"""How a process starts and ends: device, threads, process groups, messages, exit codes."""

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
    HangError,
    LostPeerError,
    MegagapError,
    file_system_error,
)
from megagap.observe.run_directory import RunDirectory
from megagap.observe.watchdog import Watchdog
from megagap.ops.arithmetic import sum_half_precision_in_fp32
from megagap.process.allocator import keep_freed_memory
from megagap.process.interrupt import watch_interrupts
from megagap.process.parent import UNDER_TORCHRUN, handle_interrupts
from megagap.process.rendezvous import Process, join, warn_of_several_runs, warn_of_shared_store
from megagap.resume.next_start import next_start

GROUP_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before its process gives up."""


def group_timeout(hang_seconds: float) -> timedelta:
    """That of collectives in a run with this ``run.hang_seconds``: a report of a hang comes first."""
    return max(GROUP_TIMEOUT, timedelta(seconds=2.5 * hang_seconds))


LINGER_SECONDS = 5.0
"""How long the other ranks wait before exiting, so that torchrun's SIGTERM does not swallow the message."""

SPEAK_SECONDS = 0.5
"""How long the others leave the rank that prints why a run hangs, before torchrun ends all."""

ABORT_SECONDS = 3.0
"""How long recording an abort or a hang may take, as where a file system hangs, before the process ends without it."""

log = logging.getLogger(__name__)


def start(process: Process, timeout: timedelta = GROUP_TIMEOUT) -> torch.device:
    """Choose device and threads, and join the process group, whose collectives give up after ``timeout``. Returns the
    device."""
    threads = chosen_threads()
    if process.rank == 0:
        warn_of_several_runs()
        warn_of_shared_store()
    if torch.cuda.is_available():
        device = torch.device("cuda", choose_gpu(process, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        sum_half_precision_in_fp32()
    else:
        if process.rank == 0:
            _warn_of_invisible_gpus()
        device = torch.device("cpu")
        keep_freed_memory()
        if threads is None:
            torch.set_num_threads(max(1, available_cores() // process.local_world_size))
    if process.world_size > 1:
        join(process, device, timeout)
    return device


def choose_gpu(process: Process, visible: int) -> int:
    """The index of this process's GPU among those that are ``visible`` to it, at least one.

    Where only one is, as with ``srun --gpus-per-task=1``, it is taken to be this process's own. Raises
    :class:`DistributedError` if there are several, but not one for each process of this machine.
    """
    if visible == 1:
        return 0
    if process.local_rank >= visible:
        raise DistributedError(
            f"{process.local_world_size} processes on {socket.gethostname()}, where {visible} GPUs are visible\n"
            f"  start one per GPU: torchrun --nproc-per-node {visible}"
            " (CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES may hide others)."
        )
    return process.local_rank


def _warn_of_invisible_gpus() -> None:
    """If the user chose GPUs but torch sees none, the run would silently be on the CPU."""
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        chosen = os.environ.get(name, "")
        if chosen not in ("", "-1", "NoDevFiles"):  # the last is Slurm's for none
            log.warning("%s=%s, but torch finds no GPU: computing on the CPU", name, chosen)


def available_cores() -> int:
    """Cores that this process may use; fewer than the machine's under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chosen_threads() -> int | None:
    """OMP_NUM_THREADS, if the user set it. torchrun sets it to 1 itself: its own environment tells.

    Raises :class:`ConfigError` if it is not a number of threads.
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


@dataclass
class Ending:
    """What the last words of a process need to know of its run."""

    process: Process
    run: RunDirectory | None = None
    """Once it is open: failures are recorded there."""
    load: str = "latest"
    """The run's ``checkpoint.load``."""
    watchdog: Watchdog | None = None
    """Once the run is watched."""

    def next_start(self) -> str:
        """How to continue, as a sentence; nothing where there is no run."""
        return next_start(self.run, self.load) if self.run is not None else ""

    def record(self, message: str) -> None:
        """Record a failure in the run directory, where that is possible."""
        if self.run is None:
            return
        try:
            self.run.fail(message)
        except (MegagapError, OSError) as error:  # a full disk, perhaps the cause itself: the message is still printed
            log.error("cannot record the failure: %s", error)

    def interrupted(self, how: str) -> None:
        """Record and print that a signal ended the process; the first rank of each machine prints."""
        if self.run is not None and self.run.has_begun:
            how += f" after step {self.run.step}, without saving"
        message = "; ".join(filter(None, (how, self.next_start())))
        log.error(message)
        self.record(message)
        if self.process.local_rank == 0:
            _print(message)

    def announce_stop(self, number: int) -> None:
        """Answer the first Ctrl-C where it asks a run to stop; before, it ends the process by itself."""
        if number == signal.SIGINT and signal.getsignal(signal.SIGINT) not in (
            signal.default_int_handler,
            signal.SIG_DFL,
            signal.SIG_IGN,
        ):
            with suppress(MegagapError):  # a log on a full disk: the stop will say so
                log.info("Ctrl-C: saving and stopping after this step; press it again to stop at once, without saving")

    def hung(self, error: HangError, speaks: bool) -> NoReturn:
        """End a process that hangs, whatever its main thread is waiting for; called by its watchdog."""
        self._end_soon(error.exit_code)
        error = HangError(f"{error.args[0]}\n  {self.next_start() or 'Run the same command again'}.")
        log.error(error)
        self.record(str(error))
        if speaks:
            _print(str(error))
        else:
            time.sleep(SPEAK_SECONDS)
        _exit(error.exit_code)

    def _end_soon(self, code: int) -> None:
        """End the process even where a file system hangs."""
        deadline = threading.Timer(ABORT_SECONDS, os._exit, (code,))
        deadline.daemon = True
        deadline.start()

    def abort(self, number: int) -> None:
        """Answer the second Ctrl-C or SIGTERM, whichever was first: end the process, even where a file system hangs."""
        self._end_soon(128 + number)
        self.interrupted(f"aborted by a second {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}")
        _exit(128 + number)


@contextmanager
def orderly_exit(process: Process) -> Iterator[Ending]:
    """Ends the process with the block: 0 when done, an error's code and message on a user's fault, 1 with a traceback
    on a bug in megagap. A second Ctrl-C or SIGTERM ends it at once.

    An OSError is not a bug in megagap: it says what the system refused. Yields what to complete once there is a run.
    """
    ending = Ending(process)
    handle_interrupts()
    # Until the run's own log is open, faults are printed here only, not by logging's last resort too.
    logging.getLogger("megagap").addHandler(logging.NullHandler())
    with watch_interrupts(ending.announce_stop, ending.abort):
        try:
            yield ending
            if dist.is_initialized():
                dist.barrier()  # nobody leaves while others still need it
                dist.destroy_process_group()
            code = 0
        except BaseException as caught:
            code = _end_with(caught, ending)
    _exit(code)


def _end_with(caught: BaseException, ending: Ending) -> int:
    """Record and print why the process ends; its exit code."""
    error = _lost_peer(caught, ending) or _refused_by_system(caught) or caught
    if ending.watchdog is not None:
        ending.watchdog.lost(caught) if isinstance(error, LostPeerError) else ending.watchdog.close()
    if isinstance(error, MegagapError):
        ending.record(str(error))
        _print_error(ending.process, error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        ending.interrupted("interrupted")
        return INTERRUPTED
    ending.record(f"{type(error).__name__}: {error}")
    log.exception("rank %d failed", ending.process.rank, exc_info=error)
    traceback.print_exception(error)
    return 1


def _lost_peer(error: BaseException, ending: Ending) -> LostPeerError | None:
    """What a failed collective means: torch reports it by the error types and messages of its backends."""
    text = str(error)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text):
        reason = text.strip().splitlines()[0] if text else repr(error)
        return LostPeerError(
            f"rank {ending.process.rank} lost contact with another rank: {reason}\n"
            "  if that rank could report the cause, it is in its output or log.\n"
            f"  {ending.next_start() or 'Run the same command again'}."
        )
    return None


def _refused_by_system(error: BaseException) -> FileSystemError | None:
    """An OSError that no code nearer to it has explained; the log has where it was."""
    if not isinstance(error, OSError):
        return None
    log.error("refused by the system", exc_info=error)
    return file_system_error(error)


def _print_error(process: Process, error: MegagapError) -> None:
    """Print a fault. Most occur on all ranks: rank 0 prints at once, the others only if that does not end them.

    A lost peer may be rank 0 itself: then the first rank of each machine prints at once.
    """
    message = str(error)
    log.error(message)
    is_lost_peer = isinstance(error, LostPeerError)
    if (process.local_rank if is_lost_peer else process.rank) != 0:
        if not is_lost_peer:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's answer to rank 0's end: nothing is left to print
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
    with suppress(OSError):  # nobody reads standard error, or its disk is full: the exit code still says so
        print(message, file=sys.stderr, flush=True)
