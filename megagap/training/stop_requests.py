"""What a run can be asked for while it trains: to stop, or to save. The training loop answers at a step boundary."""

import logging
import math
import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType

from torch.distributed.launcher.api import LaunchConfig

from megagap.config import Settings
from megagap.observe.run_directory import RunDirectory
from megagap.process.parent import NOTICE, take_notices
from megagap.process.rendezvous import is_one_of_several_nodes

log = logging.getLogger(__name__)

STOP_SIGNALS = {signal.SIGTERM: "SIGTERM", NOTICE: NOTICE.name, signal.SIGINT: "Ctrl-C (SIGINT)"}
"""What asks to stop, as messages call it."""

STEPS_TO_ANSWER = {"cpu": 2, "cuda": 4}
"""Most steps from a signal to the save, by device type. A rank polls once per step. On a GPU the host is then a step
ahead of the device, reads the sum over all ranks a step later, and has queued another step by then."""

STEPS_TO_JUDGE = 3
"""Steps after which their median is known, be the first one slow."""

GRACE_SECONDS = 30.0
"""What torchrun (and Slurm, by default) leaves between SIGTERM and SIGKILL."""

OWN_SIGNAL_SECONDS = 3.0
"""How much later than another node torchrun may signal this one: its agents look for each other ten times a second."""

GRACE_SETTING = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def grace_seconds(environment: Mapping[str, str] = os.environ) -> float:
    """How long torchrun waits after SIGTERM, as far as its workers can know; older versions cannot be told."""
    text = environment.get(GRACE_SETTING, "").strip()
    can_be_told = "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}
    return float(text) if can_be_told and text.isascii() and text.isdecimal() else GRACE_SECONDS


def warn_of_short_grace(step_seconds: Sequence[float], save_seconds: float | None, device_type: str) -> bool:
    """Log a warning if the answer to a SIGTERM may take longer than :func:`grace_seconds`; returns whether it may.

    ``step_seconds``: of the last steps; ``save_seconds``: of a checkpoint with what precedes it. None: there was none
    yet, and the steps alone are looked at, once there are :data:`STEPS_TO_JUDGE`.
    """
    if len(step_seconds) < (1 if save_seconds is not None else STEPS_TO_JUDGE):
        return False
    grace, steps, step = grace_seconds(), STEPS_TO_ANSWER[device_type], statistics.median(step_seconds)
    needed = steps * step + (save_seconds or 0.0)
    if needed <= grace:
        return False
    enough = math.ceil(1.5 * needed / 10) * 10
    log.warning(
        "a SIGTERM may end this run before it has saved: up to %d steps of %.1f s and a save%s take %.0f s%s, "
        "and the processes may be killed after %.0f s\n"
        "  give them more: torchrun's --shutdown-timeout %d, or %s=%d in its environment (newer torch), Slurm's "
        "--signal=USR1@%d; or have the run stop by itself in time: run.max_minutes.",
        steps,
        step,
        "" if save_seconds is None else f" of {save_seconds:.1f} s",
        needed,
        " or more" if save_seconds is None else "",
        grace,
        enough,
        GRACE_SETTING,
        enough,
        enough,
    )
    return True


class Requests:
    """Looks for requests once per step. :data:`STOP_SIGNALS`, ``max_minutes`` and ``stop_after`` ask to stop; a file
    ``save_file`` asks for a checkpoint, and is removed once that is written.

    ``reason`` says what asked for the stop on this rank, or is empty.
    """

    def __init__(self, save_file: Path | None = None, max_minutes: float = 0, last_step: int | None = None) -> None:
        """``save_file``: where to look, on one rank only. ``max_minutes`` from now; 0: no limit. ``last_step``: of this
        start; None: no limit."""
        self.reason = ""
        self._save_file = save_file
        self._is_stuck = False
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self._last_step = last_step
        for number in STOP_SIGNALS:
            # A shell starts commands in the background with Ctrl-C ignored: it is not meant for them.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        take_notices()

    @classmethod
    def of_run(cls, settings: Settings, run: RunDirectory, step: int) -> "Requests":
        """What the settings and a file SAVE in the run directory can ask for, in a start after ``step``."""
        limit = settings.run.stop_after
        return cls(
            run.path / "SAVE" if run.is_writer else None, settings.run.max_minutes, step + limit if limit else None
        )

    def poll(self) -> tuple[bool, bool]:
        """(stop, save) as seen by this rank."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or "run.max_minutes"
        asks_to_save = self._save_file is not None and os.path.lexists(self._save_file)
        self._is_stuck = self._is_stuck and asks_to_save
        return bool(self.reason), asks_to_save and not self._is_stuck

    def ends_at(self, step: int) -> bool:
        """Whether ``stop_after`` steps are made with this ``step``: every rank knows without being asked."""
        is_last = self._last_step is not None and step >= self._last_step
        if is_last:
            self.reason = self.reason or "run.stop_after"
        return is_last

    def await_own(self) -> None:
        """After a stop that processes of another node asked for: wait for the same signal. torchrun, which restarts all
        nodes when one joins them, would take the end of a node that it has not signalled yet for the end of the run."""
        deadline = time.monotonic() + OWN_SIGNAL_SECONDS
        while is_one_of_several_nodes() and not self.poll()[0] and time.monotonic() < deadline:
            time.sleep(0.05)

    def saved(self) -> None:
        """A checkpoint was written. A request that cannot be removed is not answered again at every step."""
        if self._save_file is None or not os.path.lexists(self._save_file):
            return
        try:
            if self._save_file.is_dir() and not self._save_file.is_symlink():
                self._save_file.rmdir()
            else:
                self._save_file.unlink(missing_ok=True)
        except OSError as error:
            if not self._is_stuck:
                reason = error.strerror or str(error)
                log.warning("cannot remove %s: %s; it is ignored until it is gone", self._save_file, reason)
            self._is_stuck = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.reason = STOP_SIGNALS[signal.Signals(number)]
