"""What a run evaluates and when: validation losses by source, and tasks."""

import logging
from typing import Any, cast

from megagap.data.validation import ValidationData
from megagap.inference.run_tasks import TaskRows, score_rows
from megagap.parallel.communicator import DistributedCommunicator
from megagap.timeline import due
from megagap.training.evaluate import EvaluationStoppedError, evaluate
from megagap.training.recorder import Recorder
from megagap.training.step import TrainState
from megagap.training.stop_requests import Requests

log = logging.getLogger(__name__)


class Evaluations:
    """Evaluates what is due at the step that the state is at, and records it. Every rank calls each method alike."""

    def __init__(
        self, state: TrainState, held_out: ValidationData, tasks: TaskRows, recorder: Recorder, requests: Requests
    ) -> None:
        """``held_out`` and ``tasks`` may be empty."""
        self.state, self.held_out, self.tasks = state, held_out, tasks
        self.recorder, self.requests = recorder, requests

    def at_start(self) -> bool:
        """Before the first step what the settings ask for; where a run goes on, what a stop has cut short at that step.
        Returns whether a stop was asked for meanwhile."""
        windows, tasks = self._due()
        if self.state.step and (windows or tasks):
            communicator = DistributedCommunicator(self.state.mesh)
            record = cast("dict[str, Any] | None", communicator.broadcast(self.recorder.resumed_at))
            # Without a record, the checkpoint is another run's.
            windows = windows and record is not None and "validation_loss" not in record
            tasks = tasks and record is not None and not any(key.startswith("task_") for key in record)
        return self._evaluate(windows, tasks)[1]

    def after_step(self) -> tuple[dict[str, float], bool]:
        """The validation losses, empty where there are none, and whether a stop was asked for meanwhile, which leaves
        no numbers of what it cut short."""
        return self._evaluate(*self._due())

    def _due(self) -> tuple[bool, bool]:
        """Whether validation is, and tasks are."""
        train, step = self.state.settings.train, self.state.step
        asked = (
            train.evaluate_first if step == 0 else due(every, step, step == train.steps)
            for every in (train.evaluate_every, train.evaluate_tasks_every)
        )
        windows, tasks = asked
        return windows and bool(self.held_out.windows), tasks and bool(self.tasks.rows)

    def _evaluate(self, windows: bool, tasks: bool) -> tuple[dict[str, float], bool]:
        losses: dict[str, float] = {}
        numbers: dict[str, float] = {}
        if not windows and not tasks:
            return losses, False
        cut_short = ""
        with self.recorder.pause(), self.state.mesh.spans.span("evaluation"):
            try:
                if windows:
                    cut_short = "validation loss"
                    losses = evaluate(self.state, self.held_out, self._is_stop_asked)
                if tasks:
                    cut_short = "scores of tasks"
                    numbers = self.tasks.numbers(score_rows(self.state, self.tasks.rows, self._is_stop_asked))
                cut_short = ""
            except EvaluationStoppedError:
                log.info("the evaluation at step %d was stopped: it has no %s", self.state.step, cut_short)
            if losses or numbers:
                self.recorder.add_evaluation(losses, numbers)
        return losses, bool(cut_short)

    def _is_stop_asked(self) -> bool:
        return self.requests.poll()[0]
