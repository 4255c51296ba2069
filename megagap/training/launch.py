"""How a process starts and ends: device, threads, process groups, messages, exit codes."""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megagap.errors import MegagapError

GROUP_TIMEOUT = timedelta(minutes=10)
"""How long a collective may take before its process gives up."""

LINGER_SECONDS = 5.0
"""How long the other ranks wait before leaving, so that torchrun's SIGTERM does not swallow the message."""

_PR_SET_PDEATHSIG = 1

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
        get = lambda name, default: int(os.environ.get(name, default))  # noqa: E731
        return cls(get("RANK", 0), get("WORLD_SIZE", 1), get("LOCAL_RANK", 0), get("LOCAL_WORLD_SIZE", 1))


def end_with_parent() -> None:
    """Have the kernel end this process when its launcher dies: torchrun starts workers in sessions of their own."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died in between
            os._exit(1)


def start(process: Process) -> torch.device:
    """Choose device and threads, and join the process group. Returns the device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", process.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.local_world_size))
    if process.world_size > 1:
        # gloo beside NCCL carries the small objects that checkpoints exchange.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=GROUP_TIMEOUT)
    return device


def finish() -> NoReturn:
    """Leave together, with 0."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    _exit(0)


def run(process: Process, main: Callable[[], None], on_failure: Callable[[str], None]) -> NoReturn:
    """Run ``main`` and end the process: 0 when done; 2 with a message on a user's fault; 1 with a traceback on ours."""
    try:
        main()
    except MegagapError as error:
        on_failure(str(error))
        _say(process, str(error))
        _exit(2)
    except BaseException as error:
        on_failure(f"{type(error).__name__}: {error}")
        log.exception("rank %d failed", process.rank)
        if process.rank != 0 or not log.hasHandlers():  # rank 0's log goes to the console too
            import traceback

            traceback.print_exc()
        _exit(1)
    finish()


def _say(process: Process, message: str) -> None:
    """Print a fault once: ranks that meet the same one leave the word to rank 0."""
    if process.rank == 0:
        print(message, file=sys.stderr, flush=True)
        return
    time.sleep(LINGER_SECONDS if dist.is_initialized() is False else 1.0)
    print(f"rank {process.rank}: {message}", file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    # Interpreter shutdown can abort in gloo's threads after a clean destroy_process_group.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
