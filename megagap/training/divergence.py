"""A run whose updates are skipped: how many in a row, which weights may become a checkpoint, and how the run ends.

Which steps are skipped says ``guard.py``. One such step may be due to its data; many in a row mean that the weights are
ruined. Until an update is made again no checkpoint is written
or removed, so that the run keeps the last weights that were known to work.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from megagap.checkpoint.index import INDEX_NAME
from megagap.checkpoint.save import step_folder_name, step_folders, step_of
from megagap.config import Settings
from megagap.data.loader import Batch
from megagap.data.skipping import SampleNumbers
from megagap.errors import DivergedError
from megagap.observe.evidence import Reason
from megagap.observe.run_directory import RunDirectory
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.collectives import all_reduce
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.resume.next_start import newest_checkpoint, start_over
from megagap.run_files import EVENTS
from megagap.timeline import Timeline
from megagap.training.datasets import skipped_ranges
from megagap.training.step import TrainState, next_step_is_finite

SKIPPED, RESUMED = "skipped_step", "updates_resumed"
"""Events of a step without an update, and of the first one with an update after such steps."""


class SkippedSteps:
    """Counts the steps in a row without an update, over restarts too.

    A restart makes the steps after its checkpoint again. What earlier starts counted is therefore kept until one of the
    steps that they skipped, or a later one, is no longer skipped: a run that is restarted again and again before it has
    skipped enough steps still ends, and one whose settings were corrected starts a new count.
    """

    def __init__(self, before: int = 0, first: int = 0) -> None:
        """``before``: how many steps earlier starts skipped in a row, the first of them step ``first``."""
        self.before, self.first_before = before, first
        self.in_a_row = 0
        """Of this start."""
        self.reasons: set[Reason] = set()
        """Why they were skipped, as far as this start knows."""

    @classmethod
    def of_run(cls, run: RunDirectory, step: int, mesh: Mesh) -> "SkippedSteps":
        """From the run's events, for a start after ``step``; the same on every rank."""
        found = DistributedCommunicator(mesh).broadcast(_read_events(run) if run.is_writer else None)
        assert isinstance(found, tuple)
        before, first, last = found
        return cls(before, first) if last > step else cls()

    @property
    def total(self) -> int:
        """Steps in a row without an update."""
        return self.before + self.in_a_row if self.in_a_row else 0

    @property
    def problem(self) -> str:
        """Why the last steps were skipped, in words."""
        return " or ".join(reason for reason in Reason if reason in self.reasons) or "their updates were refused"

    @property
    def are_spikes(self) -> bool:
        """Whether all of the last skipped steps were: the weights gave finite losses and gradients."""
        return self.reasons == {Reason.SPIKE}

    @property
    def are_overflows(self) -> bool:
        """Whether all of the last skipped steps were: what happens now and then in fp16, whatever the weights."""
        return self.reasons == {Reason.OVERFLOW}

    def count(
        self,
        step: int,
        accepted: bool,
        run: RunDirectory,
        reason: Reason | None = None,
        details: Mapping[str, Any] = {},
    ) -> None:
        """Count a step; they come in order. ``reason``: why it was not accepted; ``details``: for its event."""
        if not accepted:
            self.in_a_row += 1
            self.reasons |= set() if reason is None else {reason}
            run.event(SKIPPED, **{"step": step, "in_a_row": self.total, "reason": reason, **details})
            return
        self.reasons = set()
        if (self.in_a_row or self.before) and step >= self.first_before:
            self.before = self.first_before = self.in_a_row = 0
            run.event(RESUMED, step=step)
        else:
            self.in_a_row = 0


def _read_events(run: RunDirectory) -> tuple[int, int, int]:
    """Steps skipped in a row as of the last event, the first and the last of them; zeros if updates were made since.

    Events that cannot be read, such as one that a full disk has cut short, are ignored.
    """
    try:
        lines = (run.path / EVENTS).read_bytes().splitlines()
    except OSError:
        return 0, 0, 0
    count, first, last = 0, 0, 0
    for line in reversed(lines):
        try:
            event = json.loads(line)
            name = event["event"]
            if name == RESUMED:
                break
            if name == SKIPPED:
                in_a_row, step = int(event["in_a_row"]), int(event["step"])
                count, first, last = count or in_a_row, min(first or step, step), max(last, step)
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return count, first, last


def unfit(state: TrainState, batch: Batch, skipped: SkippedSteps, validation: Mapping[str, float]) -> str | None:
    """Why the weights after a step must not become a checkpoint; None if they may.

    ``batch``: this rank's part of the step's batch, part of which the updated weights are tried on: an update can be
    made of finite numbers and yet ruin them. ``validation``: losses of an evaluation after the step, if there was one.
    The same on every rank.
    """
    is_last = state.step == state.settings.train.steps
    if skipped.total and not skipped.are_overflows and not (skipped.are_spikes and is_last):
        count = skipped.total
        which = "update of the last step was" if count == 1 else f"updates of the last {count} steps were"
        return f"the {which} skipped: {skipped.problem}"
    if any_not_finite(state.optimizer, state.mesh):
        return "weights or moments are not finite"
    if not next_step_is_finite(state, batch):
        return "the updated weights give a loss or gradients that are not finite, or no gradients"
    bad = [name for name, loss in validation.items() if not math.isfinite(loss)]
    return f"the validation loss of {', '.join(bad)} is not finite" if bad else None


def any_not_finite(optimizer: DistributedOptimizer, mesh: Mesh) -> bool:
    """Whether a master weight or a moment of any rank is infinite or NaN."""
    finite = [part.read().isfinite().all() for part in optimizer.slices(owned_only=True)]
    bad = (~torch.stack(finite)).any().float() if finite else torch.zeros((), device=mesh.device)
    return bool(all_reduce(bad, mesh.world) > 0)


def diverged(
    problem: str, settings: Settings, timeline: Timeline, run: RunDirectory, first: int, last: int, start: int = 0
) -> DivergedError:
    """The error that ends a run at step ``last``, whose loss, gradients or weights are not finite since step ``first``.

    ``start``: the step that this start of the run began at.
    """
    samples = ", ".join(f'"{text}"' for text in _samples_to_skip(settings, timeline, run, first, last, start))
    return DivergedError(
        f"{problem}\n  {_where_to_resume(settings, run, first)}\n"
        "  Change what made it diverge: a lower optim.lr or a longer optim.warmup_steps; or skip the samples of "
        f"these steps with --train.skip_samples '[{samples}]'."
    )


def _samples_to_skip(
    settings: Settings, timeline: Timeline, run: RunDirectory, first: int, last: int, start: int
) -> list[str]:
    """``train.skip_samples`` with the samples of the steps ``first`` to ``last`` added, and of the step before: its
    update may have ruined the weights. What comes before the checkpoint to resume from cannot be left out any more."""
    good = newest_checkpoint(run)
    made = max(start, first - 2, 0 if good is None else step_of(good))
    numbers = SampleNumbers(skipped_ranges(settings.train))
    begin, end = timeline.at(made).consumed_samples, timeline.at(last).consumed_samples
    added = f"{numbers.number(begin)}:{numbers.number(end - 1) + 1}"
    return [*settings.train.skip_samples, added]


def _where_to_resume(settings: Settings, run: RunDirectory, first: int) -> str:
    good, load = newest_checkpoint(run), settings.checkpoint.load
    if good is None:
        return f"The run has no checkpoint of its own: the same command {start_over(load)}."
    option = "" if load else ", with --checkpoint.load latest,"
    text = f"The last good checkpoint is {good}: the same command{option} resumes from it."
    whole = [folder for folder in step_folders(run.checkpoints) if (folder / INDEX_NAME).is_file()]
    older = [folder for folder in whole if folder.name < good.name]
    if good.name == step_folder_name(first - 1) and older:
        text += f"\n  If that fails at once again, resume from {older[-1]}: move {good.name} out of {good.parent}."
    return text
