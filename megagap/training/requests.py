"""What a run can be asked for while it goes: to stop, or to save. The training loop answers at a step boundary."""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType

from megagap.config import Settings
from megagap.observe.run_directory import RunDirectory

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """Looks for requests once a step. SIGTERM, SIGUSR1 (a scheduler's notice) and ``max_minutes`` ask to stop; a file
    ``save_file`` asks for a checkpoint, and is removed once it is written.

    ``reason`` tells what asked for the stop on this rank, or is empty.
    """

    def __init__(self, save_file: Path | None = None, max_minutes: float = 0) -> None:
        """``save_file``: where to look, on one rank only. ``max_minutes`` from now; 0: no limit."""
        self.reason = ""
        self._save_file = save_file
        self._is_stuck = False
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    @classmethod
    def of_run(cls, settings: Settings, run: RunDirectory) -> "Requests":
        """What the settings and the run directory, where a file SAVE may appear, can ask for."""
        return cls(run.path / "SAVE" if run.is_writer else None, settings.run.max_minutes)

    def poll(self) -> tuple[bool, bool]:
        """(stop, save) as seen by this rank."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or "run.max_minutes"
        asks_to_save = self._save_file is not None and os.path.lexists(self._save_file)
        self._is_stuck = self._is_stuck and asks_to_save
        return bool(self.reason), asks_to_save and not self._is_stuck

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
        self.reason = signal.Signals(number).name
