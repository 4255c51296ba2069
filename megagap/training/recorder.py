"""Turns step results into metrics, TensorBoard and console lines."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megagap.config import Settings
from megagap.data.text_bytes import PredictedText
from megagap.errors import DivergedError
from megagap.model.flops import flops_per_token
from megagap.observe.curves import EVALUATED
from megagap.observe.evidence import Evidence, Numbers, Reason, reason_of
from megagap.observe.insight import insight_record
from megagap.observe.metrics import MetricsFile, TensorBoard, console_line
from megagap.observe.pace import SlowRanks
from megagap.observe.run_directory import RunDirectory
from megagap.observe.utilisation import peak_memory_bytes, peak_tflops
from megagap.optim.gradient_hash import as_text
from megagap.optim.precision import PRECISIONS
from megagap.parallel.mesh import Mesh
from megagap.timeline import Timeline, due
from megagap.training.corruption import require_equal
from megagap.training.divergence import SkippedSteps, diverged
from megagap.training.step import StepResult

log = logging.getLogger(__name__)


class Recorder:
    """Turns step results into metrics, one step late, and keeps the clock.

    ``step_seconds`` runs from the end of a step to the end of the next, without what happens inside :meth:`pause`.
    """

    def __init__(
        self,
        settings: Settings,
        timeline: Timeline,
        mesh: Mesh,
        run: RunDirectory,
        step: int,
        skipped: SkippedSteps | None = None,
        evidence: Evidence | None = None,
        texts: Mapping[str, PredictedText] | None = None,
    ) -> None:
        """``evidence``: collects that of bad steps for the events; None: only their numbers are recorded. ``texts``: by
        validation source, the text that evaluations predict, as far as it is known."""
        self.settings, self.timeline, self.mesh, self.run, self.start = settings, timeline, mesh, run, step
        self.evidence, self.texts = evidence, texts or {}
        self.metrics: MetricsFile | None = None
        self.tensorboard: TensorBoard | None = None
        if run.is_writer:
            self.metrics = MetricsFile(run.metrics, step)
            if settings.run.tensorboard:
                self.tensorboard = TensorBoard(run.path / "tensorboard", step)
        self.resumed_at = None if self.metrics is None else self.metrics.resumed_at
        """On the writer, the record of the step from which this start goes on, if a former one has written it."""
        self.sources = [source.name for source in timeline.sources]
        self.peak = peak_tflops(mesh.device, PRECISIONS[settings.train.precision].compute)
        self.pending: tuple[StepResult, dict[str, Any]] | None = None
        self.skipped = skipped or SkippedSteps()
        self.slow_ranks = SlowRanks(mesh.layout, run)
        self.last_end = time.perf_counter()
        self.seconds: list[float] = []

    def step_done(self, step: int, result: StepResult) -> float:
        """Write the step before, and hold this one back until its numbers are known. Returns its seconds."""
        self.flush()
        end = time.perf_counter()
        seconds, self.last_end = end - self.last_end, end
        self.seconds = [*self.seconds[-49:], seconds]
        moment = self.timeline.at(step)
        per_token = flops_per_token(self.settings.model, moment.sequence_length).full
        flops = per_token * moment.tokens / self.mesh.world.size
        tflops = flops / seconds / 1e12
        self.pending = (
            result,
            {
                "step": step,
                "consumed_samples": moment.consumed_samples,
                "consumed_tokens": moment.consumed_tokens,
                "lr": result.lr,
                "step_seconds": seconds,
                "tokens_per_second": moment.tokens / seconds,
                "tflops_per_device": tflops,
                "mfu": None if self.peak is None else tflops / self.peak,
                "memory_bytes": peak_memory_bytes(self.mesh.device),
            },
        )
        return seconds

    def add_evaluation(self, losses: Mapping[str, float], tasks: Mapping[str, float]) -> None:
        """Put an evaluation into the record of the step just done; before the first step, into one of step 0. Before a
        start's first step, into the record that a former start has written of the step before.

        ``losses``: by validation source; ``tasks``: by key of the record. Either may be empty, where it was not due.
        """
        record = dict(tasks)
        if losses:
            record["validation_loss"] = sum(losses.values()) / len(losses)
            record |= {f"validation_loss/{name}": loss for name, loss in losses.items()}
            record |= {f"validation_bpb/{name}": text.bits_per_byte(losses[name]) for name, text in self.texts.items()}
        step = self.start if self.pending is None else self.pending[1]["step"]
        if self.pending is not None:
            self.pending[1].update(record)
        elif step == 0:
            self._write({"step": 0, "consumed_samples": 0, "consumed_tokens": 0, **record})
        elif self.metrics is not None:
            self.metrics.add_to_last(record)
            if self.tensorboard is not None:
                self.tensorboard.write({"step": step, **record})
        for kind, numbers in (("validation", losses), ("tasks", tasks)):
            if numbers:
                shown = " | ".join(f"{name.removeprefix('task_')} {value:.3f}" for name, value in numbers.items())
                log.info("%s at step %d | %s", kind, step, shown)

    def flush(self) -> None:
        """Read and write the record held back. Raises :class:`DivergedError` after too many skipped steps."""
        if self.pending is None:
            return
        result, rest = self.pending
        self.pending = None
        with self.mesh.spans.wait("wait for the device"):
            numbers = result.host.read()
        step, accepted = rest["step"], bool(numbers["accepted"][0])
        # Not strict: a benchmark of a recipe that names no data has one nameless source.
        by_source = {
            f"loss/{name}": value
            for name, value in zip(self.sources, numbers["source_losses"], strict=False)
            if math.isfinite(value)  # not if the batch had nothing from the source
        }
        (loss,), (norm,) = numbers["loss"], numbers["grad_norm"]
        z_loss = {"z_loss": numbers["z_loss"][0]} if self.settings.train.z_loss else {}
        losses = {"loss": loss, **by_source, **z_loss}
        record = {"step": step, **losses, "grad_norm": norm, **rest, "skipped": not accepted}
        if numbers["loss_scale"]:
            (record["loss_scale"],) = numbers["loss_scale"]
        record |= guard_record(numbers)
        insight = numbers.get("insight")
        if insight is not None:
            record |= insight_record(insight, self.settings.model)
        if numbers["own_seconds"]:
            record |= self.slow_ranks.judge(step, numbers["own_seconds"])
        self._report(step, accepted, numbers)
        steps = self.settings.train.steps
        shown = step == 1 or due(self.settings.run.log_every, step, step == steps)
        self._write(record, to_tensorboard=insight is not None)
        if shown or not accepted:
            mean_seconds = sum(self.seconds) / len(self.seconds)
            log.info(console_line(record, steps, (steps - step) * mean_seconds))
        require_equal(numbers["replicas"], step, self.run, self.settings.checkpoint.load)
        if self.skipped.total > self.settings.guard.max_skipped:
            raise self.too_many_skipped(step)

    def _report(self, step: int, accepted: bool, numbers: Numbers) -> None:
        """Count a step, and record an event if it is a bad one."""
        reason = reason_of(numbers)
        details: dict[str, Any] = {}
        if self.evidence is not None and reason is not Reason.OVERFLOW and (reason is not None or not accepted):
            details = self.evidence.of_step(step, numbers)
        if reason is Reason.SPIKE and accepted:
            self.run.event("spike", step=step, **details)
        self.skipped.count(step, accepted, self.run, reason, details)

    def _write(self, record: dict[str, Any], to_tensorboard: bool = False) -> None:
        """``to_tensorboard``: whether TensorBoard gets it, whatever its interval."""
        if self.metrics is not None:
            self.metrics.write(record)
        last = record["step"] == self.settings.train.steps
        if self.tensorboard is not None and (
            to_tensorboard
            or due(self.settings.run.tensorboard_every, record["step"], last)
            or any(key.startswith(EVALUATED) for key in record)
        ):
            self.tensorboard.write(record)

    def too_many_skipped(self, step: int) -> DivergedError:
        """The error that ends a run whose last updates, up to ``step``, were all skipped."""
        count, here = self.skipped.total, self.skipped.in_a_row
        starts = f" ({count - here} of them in earlier starts)" if count > here else ""
        length = "1 step" if count == 1 else f"{count} steps in a row"
        problem = f"{self.skipped.problem} for {length}{starts}, up to step {step}"
        if Reason.SPIKE in self.skipped.reasons:
            problem += '\n  If the loss has risen for good, raise guard.zscore, or set guard.spikes = "report".'
        return diverged(problem, self.settings, self.timeline, self.run, step - here + 1, step, self.start)

    def sync(self) -> None:
        """Write all records so far and sync them to disk."""
        self.flush()
        if self.metrics is not None:
            self.metrics.sync()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block belongs to no step."""
        if self.pending is not None:
            self.pending[0].host.wait()  # the device must be done with the step before the clock stops
        start = time.perf_counter()
        try:
            yield
        finally:
            self.last_end += time.perf_counter() - start

    def close(self) -> None:
        self.flush()
        if self.metrics is not None:
            self.metrics.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def guard_record(numbers: Numbers) -> dict[str, Any]:
    """What ``[guard]`` adds to a step's record, where it was computed."""
    record: dict[str, Any] = {}
    if numbers["zscores"]:
        record["loss_zscore"], record["grad_norm_zscore"] = numbers["zscores"]
        record["spike"] = bool(numbers["spike"][0])
    if numbers["differing"]:
        record["repeated"] = not any(numbers["differing"])
    if numbers["gradient_hash"]:
        record["gradient_hash"] = as_text(numbers["gradient_hash"])
    return record
