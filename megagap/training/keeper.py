"""When a run's checkpoints are written, and when old ones are removed."""

import logging
import time
from collections.abc import Mapping, Sequence

from megagap.data.loader import Batch
from megagap.data.samples import TrainingData
from megagap.observe.run_directory import RunDirectory
from megagap.resume.persistence import drop_old, save
from megagap.training.divergence import SkippedSteps, unfit
from megagap.training.step import TrainState
from megagap.training.stop_requests import STEPS_TO_JUDGE, warn_of_short_grace

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Writes a run's checkpoints and removes old ones; neither while the weights are not fit to be kept."""

    def __init__(self, state: TrainState, run: RunDirectory, data: TrainingData, skipped: SkippedSteps) -> None:
        self.state, self.run, self.data, self.skipped = state, run, data, skipped
        self.withheld: str | None = None
        """Why the last due checkpoint has not been written yet."""
        self._untried: int | None = None
        """The step of a checkpoint that no update has followed yet: older ones are kept beside it."""
        self._has_warned = False

    def step_done(self, step_seconds: Sequence[float]) -> None:
        """Remove old checkpoints once an update has followed the newest. Numbers may be known a step late.

        ``step_seconds``: as for :meth:`save_if_fit`; steps that alone take too long are warned of before any save.
        """
        if len(step_seconds) == STEPS_TO_JUDGE and not self._has_warned:
            self._has_warned = warn_of_short_grace(step_seconds, None, self.state.mesh.device.type)
        if self._untried is not None and self._untried < self.state.step - 1 and not self.skipped.in_a_row:
            self.drop_old()

    def save_if_fit(self, batch: Batch, validation: Mapping[str, float], step_seconds: Sequence[float]) -> bool:
        """Write the checkpoint of this step unless :func:`unfit`; whether it was written. All numbers must be known.

        ``step_seconds``: what the last steps took. With the time of the save they tell whether a SIGTERM can be
        answered in time; if not, a warning says so, once.
        Raises :class:`DataError` if the run directory is gone, and :class:`CheckpointError` if it cannot be written.
        """
        start = time.monotonic()
        self.run.require_in_place()
        reason = unfit(self.state, batch, self.skipped, validation)
        if reason is None:
            if self._untried is not None:
                self.drop_old()
            save(self.state, self.run, self.data)
            self._untried = self.state.step
            device, seconds = self.state.mesh.device.type, time.monotonic() - start
            self._has_warned = self._has_warned or warn_of_short_grace(step_seconds, seconds, device)
        elif self.withheld is None:
            self.run.event("checkpoint_withheld", reason=reason)
            log.warning("no checkpoint at step %d: %s", self.state.step, reason)
        self.withheld = reason
        return reason is None

    def drop_old(self) -> None:
        """All but those that the settings keep."""
        drop_old(self.state.settings, self.run)
        self._untried = None
