"""When a run's checkpoints are written, and when old ones are removed."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megagap.checkpoint import Retention
from megagap.checkpoint.background import BackgroundSaver
from megagap.checkpoint.lineage import Lineage
from megagap.checkpoint.local import LocalTier
from megagap.checkpoint.save import step_folder_name
from megagap.data.loader import Batch
from megagap.data.samples import TrainingData
from megagap.errors import NotWrittenError
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.spans import WRITER
from megagap.resume.next_start import next_start
from megagap.resume.persistence import save, saved_state
from megagap.training.corruption import require_equal_replicas
from megagap.training.divergence import SkippedSteps, unfit
from megagap.training.step import TrainState
from megagap.training.stop_requests import STEPS_TO_JUDGE, warn_of_short_grace

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Writes a run's checkpoints and removes old ones; neither while the weights are not fit to be kept.

    A checkpoint that the system refuses to write, on a full disk for example, is one less: training goes on, and tries
    again when the next is due. Only the last one of a start must be written.
    """

    def __init__(
        self,
        state: TrainState,
        run: RunDirectory,
        data: TrainingData,
        skipped: SkippedSteps,
        background: BackgroundSaver | None = None,
        tier: LocalTier | None = None,
    ) -> None:
        """``tier``: of checkpoints on the nodes' disks, if the run has such."""
        self.state, self.run, self.data, self.skipped, self.background = state, run, data, skipped, background
        self.tier = tier
        if run.is_writer:
            Lineage.record_start(run.path, state.step)
        if tier is not None:
            tier.begin(state.step)
        self.withheld: str | None = None
        """Why the last due checkpoint has not been written yet."""
        self._writing: int | None = None
        """The step whose checkpoint is being written in the background."""
        self._untried: int | None = None
        """The step of a checkpoint that no update has followed yet: older ones are kept beside it."""
        self._step_seconds: Sequence[float] = ()
        self._stall = 0.0
        """What the last save kept training waiting."""
        self._has_warned = False
        asked = state.settings.checkpoint
        self.retention = Retention(run.checkpoints, asked.keep, asked.keep_every, asked.keep_best)
        self._remover = ThreadPoolExecutor(1, "removal")
        self._removal: Future[None] | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint was not written in the background. If any rank knows of that, all must
        :meth:`settle`."""
        return self.background is not None and self.background.has_failed

    def step_done(self, step_seconds: Sequence[float]) -> None:
        """Remove old checkpoints once an update has followed the newest. Numbers may be known a step late.

        ``step_seconds``: as for :meth:`save_if_fit`; steps that alone take too long are warned of before any save.
        """
        if len(step_seconds) == STEPS_TO_JUDGE and not self._has_warned:
            self._has_warned = warn_of_short_grace(step_seconds, None, self.state.mesh.device.type)
        if self.background is not None and self.background.is_idle:
            self.settle()
        if self._untried is not None and self._untried < self.state.step - 1 and not self.skipped.in_a_row:
            self.drop_old()

    def save_if_fit(
        self, batch: Batch, validation: Mapping[str, float], step_seconds: Sequence[float], is_final: bool = False
    ) -> bool:
        """Write the checkpoint of this step unless :func:`unfit`; whether that was tried. All numbers must be known.

        In the background, unless it is the last one of this start (``is_final``).
        ``step_seconds``: what the last steps took. With the time of the save they tell whether a SIGTERM can be
        answered in time; if not, a warning says so, once.
        Raises :class:`DataError` if the run directory is gone, :class:`CorruptionError` if replicas of parameters
        differ, and :class:`CheckpointError` if it cannot be written: where the system refused, only for the last one.
        """
        start, self._step_seconds = time.monotonic(), step_seconds
        self.settle()
        reason = self._why_unfit(batch, validation)
        if reason is None:
            if self._untried is not None:
                self.drop_old()
            self.await_removal()  # what it removes may be the space that this one needs
            try:
                save(self.state, self.run, self.data, validation, self.background, start)
                self._writing, self._stall = self.state.step, time.monotonic() - start
                if self.background is None or is_final:
                    self._finish()
            except NotWrittenError as error:
                if is_final:
                    raise NotWrittenError(f"{error.args[0]}\n  {self._next_start()}.") from None
                self._go_on_without(self.state.step, error)
        elif self.withheld is None:
            self.run.event("checkpoint_withheld", reason=reason)
            log.warning("no checkpoint at step %d: %s", self.state.step, reason)
        self.withheld = reason
        return reason is None

    def save_locally_if_fit(self, batch: Batch) -> None:
        """Write this step's checkpoint to the nodes' disks unless :func:`unfit`: the next one is soon due. All numbers
        must be known. Raises :class:`DataError` if the run directory is gone."""
        assert self.tier is not None
        reason = self._why_unfit(batch, {})
        if reason is None:
            slices = self.state.optimizer.slices(owned_only=True)
            self.tier.save_or_warn(self.state.step, slices, saved_state(self.state, self.data), self.run)
        else:
            log.warning("no local checkpoint at step %d: %s", self.state.step, reason)

    def _why_unfit(self, batch: Batch, validation: Mapping[str, float]) -> str | None:
        """Why no checkpoint may take this state; None: one may. Raises :class:`DataError` if the run directory is gone,
        and :class:`CorruptionError` if replicas of parameters differ."""
        self.run.require_in_place()
        if self.state.settings.guard.replicas_every >= 0:
            require_equal_replicas(self.state, self.run)
        return unfit(self.state, batch, self.skipped, validation)

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Collective where it may have failed.

        Raises :class:`CheckpointError` if it was not written, unless the system refused: then a warning says so.
        """
        step = self._writing
        if step is not None:
            try:
                self._finish()
            except NotWrittenError as error:
                self._go_on_without(step, error)

    def _finish(self) -> None:
        step, self._writing = self._writing, None
        seconds = self._stall
        if self.background is not None:
            with self.state.mesh.spans.wait(WRITER):
                self.background.wait()
            seconds += 2 * self.background.write_seconds  # a stop may have to wait for the save before its own
        self._untried = step
        if step is not None:
            self.retention.written(self.run.checkpoints / step_folder_name(step))
        if not self._has_warned:
            self._has_warned = warn_of_short_grace(self._step_seconds, seconds, self.state.mesh.device.type)

    def _go_on_without(self, step: int, error: NotWrittenError) -> None:
        self.run.event("checkpoint_failed", step=step, reason=error.args[0])
        if self.run.is_writer:
            next_due = "the next one that is due is tried again"
            log.warning("%s\n  training goes on; earlier checkpoints are intact, and %s.", error.args[0], next_due)

    def _next_start(self) -> str:
        return next_start(self.run, self.state.settings.checkpoint.load)

    def drop_old(self) -> None:
        """Remove all but those that the settings keep, while training goes on: a file system may take long."""
        if self.run.is_writer:
            self.await_removal()
            self._removal = self._remover.submit(self.retention.apply)
        self._untried = None

    def await_removal(self) -> None:
        """Until old checkpoints are gone, or what cannot be removed has been logged."""
        removal, self._removal = self._removal, None
        if removal is not None:
            with self.state.mesh.spans.span("removal_of_old_checkpoints"):
                removal.result()
