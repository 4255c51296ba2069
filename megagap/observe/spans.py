"""Recordings of spans: what a process did from when to when, as JSON lines for each rank in RUN/spans/.

Off by default (``run.spans``); collectives, and what evaluations and checkpoints consist of, are left out. A file
begins each start of its process with a line that describes it (:func:`describe_start`); every other line is one span:
``name``, ``rank``, ``step``, ``start`` and ``end`` in seconds since 1970 by the host's clock, and what else it was
given. Lines are buffered, and written when a step is over.

On a GPU a span is timed by events on the stream, which are read when they have passed: nothing waits for the device.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megagap.config import Settings
from megagap.errors import DataError
from megagap.files import LineFile, make_folder, reading
from megagap.parallel import spans

if TYPE_CHECKING:  # recordings are read without torch
    from torch.cuda import Event

    from megagap.parallel.mesh import Mesh

FOLDER = "spans"
BUFFERED_LINES = 2000
"""Written at once: some hundred KiB."""
UNDIVIDED = ("evaluation", "checkpoint")
"""Spans that are recorded without those inside of them."""


def span_file(run: Path, rank: int) -> Path:
    return run / FOLDER / f"rank_{rank:05}.jsonl"


class Clock(Protocol):
    """Takes the time when it is asked to, and tells it later."""

    def mark(self) -> Any: ...

    def has_passed(self, mark: Any) -> bool:
        """Whether :meth:`seconds` knows the time without waiting."""
        ...

    def seconds(self, mark: Any) -> float:
        """Since 1970. Marks are asked for in the order in which they were made."""
        ...


class HostClock:
    """The host's, which does not jump while the process runs."""

    def __init__(self) -> None:
        self._offset = time.time() - time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def has_passed(self, mark: float) -> bool:
        return True

    def seconds(self, mark: float) -> float:
        return self._offset + mark


class DeviceClock:
    """Events on the GPU's current stream, tied once to the host's clock, when it is made: that waits for the device.

    The time between two events is a float32 of milliseconds: exact enough only between near ones, so each is told from
    the last one before it.
    """

    def __init__(self) -> None:
        from torch.cuda import Event

        self._event = partial(Event, enable_timing=True)
        self._last = self.mark()
        self._last.synchronize()
        self._seconds = time.time()

    def mark(self) -> "Event":
        event = self._event()
        event.record()
        return event

    def has_passed(self, mark: "Event") -> bool:
        return mark.query()

    def seconds(self, mark: "Event") -> float:
        mark.synchronize()
        self._seconds += self._last.elapsed_time(mark) / 1000
        self._last = mark
        return self._seconds


@dataclass
class _Open:
    """A span under way or over, on whose marks the clock has not been read yet."""

    name: str
    step: int
    fields: dict[str, int]
    start: Any
    end: Any = None
    seconds: list[float] = field(default_factory=list)


class Recording:
    """Spans of one process, written to ``path``; a :class:`megagap.parallel.spans.Listener`. Every method raises
    :class:`DataError` if that cannot be written."""

    def __init__(self, path: Path, rank: int, clock: Clock, start: dict[str, Any]) -> None:
        """``start``: the line that describes this start of the process."""
        make_folder(path.parent)
        self._file, self._rank, self._clock = LineFile(path), rank, clock
        self._file.append(json.dumps(start))
        self._step = 0
        self._under_way: list[tuple[spans.Span, _Open]] = []
        self._marks: deque[tuple[_Open, Any]] = deque()
        """Starts and ends in the order in which they were made, until they are read."""
        self._lines: list[str] = []

    def begin(self, span: spans.Span) -> None:
        outermost = span.spans.open[0]
        if span.axis or (outermost is not span and outermost.name in UNDIVIDED):
            return
        if span.spans.step != self._step:
            self._begin_step(span.spans.step)
        fields = span.fields if span.peer is None else span.fields | {"peer": span.peer}
        opened = _Open(span.name, self._step, fields, self._clock.mark())
        self._under_way.append((span, opened))
        self._marks.append((opened, opened.start))

    def end(self, span: spans.Span) -> None:
        if not self._under_way or self._under_way[-1][0] is not span:
            return
        _, opened = self._under_way.pop()
        opened.end = self._clock.mark()
        self._marks.append((opened, opened.end))

    def _begin_step(self, step: int) -> None:
        self._step = step
        self._read(wait=False)
        if len(self._lines) >= BUFFERED_LINES:
            self._write()

    def close(self) -> None:
        self._read(wait=True)
        self._write()
        self._file.close()

    def _read(self, wait: bool) -> None:
        """Turn marks into lines, up to the first that the device has not reached yet."""
        while self._marks and (wait or self._clock.has_passed(self._marks[0][1])):
            opened, mark = self._marks.popleft()
            opened.seconds.append(self._clock.seconds(mark))
            if mark is opened.end:
                start, end = opened.seconds
                line = {"name": opened.name, "rank": self._rank, "step": opened.step, "start": start, "end": end}
                self._lines.append(json.dumps(line | opened.fields))

    def _write(self) -> None:
        if self._lines:
            self._file.append("\n".join(self._lines))
            self._lines = []


@contextmanager
def recorded_spans(settings: Settings, run: Path, mesh: "Mesh", first_step: int) -> Iterator[None]:
    """Record the spans of the block, if ``run.spans`` is set."""
    if not settings.run.spans:
        yield
        return
    rank = mesh.world.rank
    recording = Recording(span_file(run, rank), rank, clock_of(mesh), describe_start(settings, mesh, first_step))
    with closing(recording), mesh.spans.heard_by(recording):
        yield


def clock_of(mesh: "Mesh") -> Clock:
    """Of what the mesh's device does."""
    return DeviceClock() if mesh.device.type == "cuda" else HostClock()


def describe_start(settings: Settings, mesh: "Mesh", first_step: int) -> dict[str, Any]:
    """The layout in which a start's spans are recorded, of this rank."""
    return {
        "first_step": first_step,
        "rank": mesh.world.rank,
        "processes": mesh.world.size,
        "place": mesh.layout.coordinates(mesh.world.rank),
        "pipeline": list(mesh.pp.ranks),
        "schedule": settings.parallel.schedule,
        "chunks": settings.placement.chunks,
        "device": mesh.device.type,
    }


# ------------------------------------------------------------------------------------------------------------- reading


Number = Annotated[int, Field(ge=0, lt=2**31)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]


class Start(BaseModel):
    """What a file says of a start, of :func:`describe_start`: the line before its spans."""

    model_config = ConfigDict(strict=True, frozen=True)

    first_step: Number
    processes: Number
    pipeline: Annotated[list[Number], Field(min_length=1)]
    """Global ranks of the pipeline that this rank is in."""
    schedule: str
    chunks: Annotated[Number, Field(ge=1)]


class Span(BaseModel):
    """One line of a file; what else it was given is in ``fields``."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Number]

    name: str
    step: Number
    start: Seconds
    end: Seconds

    @property
    def fields(self) -> dict[str, int]:
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> "Span":
        if self.end < self.start:
            raise ValueError("it ends before it starts")
        return self


@dataclass(frozen=True)
class MeasuredStep:
    """The spans of one step on the ranks of one pipeline."""

    step: int
    start: Start
    ranks: list[list[Span]]
    """By pipeline rank, in the order in which they ended."""


def read_step(run: Path, step: int | None = None) -> MeasuredStep:
    """The spans of a step of the pipeline that the first rank is in; None: of the last one.

    Of a step that was made again after a restart, the last time counts. Raises :class:`DataError` naming the file if
    there are none, and if a rank's are missing or damaged.
    """
    first = _read_file(span_file(run, 0), run)
    if not first:
        raise DataError(f"{span_file(run, 0)} has no spans yet: they are written every few steps and at the end")
    step = max(first) if step is None else step
    if step not in first:
        raise DataError(f"{span_file(run, 0)} has no step {step}; it has steps {min(first)} to {max(first)}")
    start, spans = first[step]
    rows = [spans]
    for rank in start.pipeline[1:]:
        path = span_file(run, rank)
        other = _read_file(path, run).get(step)
        if other is None or other[0].pipeline != start.pipeline:
            raise DataError(
                f"{path} lacks step {step} of the start with {start.processes} processes: it is still running, or "
                "was killed\n  ask for an earlier --step."
            )
        rows.append(other[1])
    return MeasuredStep(step, start, rows)


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()


def _read_file(path: Path, run: Path) -> dict[int, tuple[Start, list[Span]]]:
    """By step: the start in which it was made last, and its spans."""
    with reading(path):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DataError(
                f"{run} has no {FOLDER}/{path.name}: no spans were recorded\n  train it with --run.spans true."
            ) from None
    steps: dict[int, tuple[Start, list[Span]]] = {}
    start: Start | None = None
    for number, line in enumerate(lines, start=1):
        try:
            if '"first_step"' in line:
                start = Start.model_validate_json(line)
                continue
            span = Span.model_validate_json(line)
            if start is None:
                raise ValueError("no start is described before it")
        except ValueError as error:
            if number == len(lines):
                break  # cut short by a kill
            raise DataError(f"{path}:{number} is not a span: {_reason(error)}") from None
        if span.step not in steps or steps[span.step][0] is not start:
            steps[span.step] = (start, [])
        steps[span.step][1].append(span)
    return steps
