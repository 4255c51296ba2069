"""How a process takes signals, and the end of its launcher, from its first moment on.

Imports nothing heavy: this runs before torch, whose import takes seconds.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Set in the environment of torchrun's workers."""

NOTICE = signal.SIGUSR1
"""A scheduler's notice that the time is nearly over, as Slurm's ``--signal`` asks for it."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Have the kernel end this process when torchrun dies, which starts workers in sessions of their own.

    Not without torchrun: a run under ``nohup`` is meant to outlive the shell that started it.
    """
    if sys.platform == "linux" and UNDER_TORCHRUN in os.environ:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if _is_orphan(Path(f"/proc/{os.getppid()}")):
            print("torchrun, which started this process, has died", file=sys.stderr)
            os._exit(1)


def end_on_interrupt() -> None:
    """Have Ctrl-C end the process as it does programs in C, until the run handles it: while torch is imported, Python
    would answer with a traceback of it."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # not where it is ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def handle_interrupts() -> None:
    """The opposite of :func:`end_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hold_notices() -> None:
    """Have a scheduler's notice, :data:`NOTICE`, wait until the run can answer it. It comes once, and would end a
    process that loads a model, or be lost where the launcher has it ignored."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [NOTICE])


def take_notices() -> None:
    """The opposite of :func:`hold_notices`, for the main thread: one that waits is handled at once."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [NOTICE])


def end_with_starter() -> None:
    """As ``preexec_fn`` of a process that must not outlive the one that starts it: have the kernel end it then."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _is_orphan(parent: Path) -> bool:
    """Whether torchrun died before the kernel was told, so that init or a subreaper is the ``parent`` now.

    torchrun makes each worker the leader of a session, and has torch in its memory; who adopts orphans has not. Behind
    a wrapper, which leads the session instead, this cannot be determined.
    """
    if os.getsid(0) != os.getpid():
        return False
    try:
        return b"libtorch" not in (parent / "maps").read_bytes()
    except PermissionError:  # init, most likely; what it was started as is no secret
        return b"torch" not in (parent / "cmdline").read_bytes()
    except OSError:
        return False
