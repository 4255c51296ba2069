"""Goodput: how much of a run's wall time went into steps that count, over all its starts, also those that were killed.

Rank 0 adds a line to RUN/accounting.jsonl for each start and for each of its outermost spans (steps, evaluations,
checkpoints) as soon as it has ended. All else follows from these: a step that a later start made again is lost, the
time between the last line of a start and the begin of the next process is downtime (with the step that a kill cut
short).
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from megagap.errors import DataError
from megagap.files import LineFile, reading
from megagap.parallel.spans import Span

ACCOUNTING = "accounting.jsonl"
PARTS = {
    "steps": "steps that count",
    "lost": "steps that a later start made again",
    "evaluation": "evaluations",
    "checkpoint": "checkpoints",
    "start_up": "starting, up to the first step",
    "other": "between these, and ending",
    "down": "between starts, with steps cut short",
}
"""What a run's time goes into, and what each part is called."""


class Ledger:
    """Writes a start's lines; a :class:`megagap.parallel.spans.Listener`. Raises :class:`DataError` if it cannot."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._file = LineFile(run / ACCOUNTING)
        self._begin = 0.0
        self._offset = time.time() - time.perf_counter()
        self._append(name="start", step=first_step, start=process_start(), end=time.time())

    def begin(self, span: Span) -> None:
        if span.spans.open[0] is span:
            self._begin = self._now()

    def end(self, span: Span) -> None:
        if not span.spans.open:
            self._append(name=span.name, step=span.spans.step, start=self._begin, end=self._now())

    def close(self) -> None:
        self._append(name="end", step=0, start=self._now(), end=self._now())
        self._file.close()

    def _now(self) -> float:
        """Of a clock that does not jump, in seconds since 1970."""
        return self._offset + time.perf_counter()

    def _append(self, **values: str | float) -> None:
        self._file.append(json.dumps(values))


@contextmanager
def accounted(run: Path, first_step: int) -> Iterator[Ledger]:
    """A ledger of the block."""
    ledger = Ledger(run, first_step)
    try:
        yield ledger
    except BaseException:
        with suppress(DataError):  # the cause, perhaps
            ledger.close()
        raise
    ledger.close()


def process_start() -> float:
    """When this process began, in seconds since 1970; where the system does not say, now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


# ------------------------------------------------------------------------------------------------------------- reading


class Entry(BaseModel):
    """A line: a start of the run, or an outermost span of it."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str
    step: Annotated[int, Field(ge=0)]
    """Of a start, its first one."""
    start: Annotated[float, Field(allow_inf_nan=False)]
    end: Annotated[float, Field(allow_inf_nan=False)]


@dataclass
class _Start:
    first_step: int
    begin: float
    end: float
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Goodput:
    """Where a run's wall time went."""

    starts: int
    seconds: dict[str, float]
    """By the keys of :data:`PARTS`; they add up to :attr:`wall`."""
    steps: int
    """That count."""
    lost_steps: int

    @property
    def wall(self) -> float:
        """From the begin of the first start to the end of the last, in seconds."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput: the part of the wall time in steps that count."""
        return self.seconds["steps"] / self.wall if self.wall else 0.0

    @classmethod
    def of_run(cls, run: Path) -> "Goodput":
        """Of all starts so far. Raises :class:`DataError` naming the file if it is missing or damaged."""
        if os.path.isfile(run):
            raise DataError(f"{run} is not a run directory\n  give one, such as the run.dir of a recipe.")
        starts = list(_starts(run / ACCOUNTING))
        seconds = dict.fromkeys(PARTS, 0.0)
        made, lost = set(), 0
        for number, start in enumerate(starts):
            again = min((later.first_step for later in starts[number + 1 :]), default=None)
            rest = start.end - start.begin
            for entry in start.entries:
                took, kind = entry.end - entry.start, entry.name
                if kind == "step":
                    is_lost = again is not None and entry.step >= again
                    kind, lost = ("lost", lost + 1) if is_lost else ("steps", lost)
                    made |= set() if is_lost else {entry.step}
                if kind in seconds:
                    seconds[kind] += took
                    rest -= took
            starting = (start.entries[0].start if start.entries else start.end) - start.begin
            seconds["start_up"] += starting
            seconds["other"] += rest - starting
            if number:
                seconds["down"] += start.begin - starts[number - 1].end
        return cls(len(starts), seconds, len(made), lost)

    def line(self) -> str:
        """For the log."""
        parts = [f"{PARTS[name]} {took / self.wall:.1%}" for name, took in self._shown() if name != "steps"]
        return f"goodput {self.share:.1%} of {_duration(self.wall)} in {self.starts} start(s) | " + " | ".join(parts)

    def table(self) -> Table:
        """For a person."""
        table = Table("what", "time", "share", title=f"{self.steps:,} steps in {self.starts:,} start(s)")
        table.columns[1].justify = table.columns[2].justify = "right"
        for name, took in self.seconds.items():
            table.add_row(PARTS[name], _duration(took), f"{took / self.wall:.1%}" if self.wall else "")
        table.add_row("all", _duration(self.wall), f"goodput {self.share:.1%}")
        return table

    def as_dict(self) -> dict[str, object]:
        """For JSON; seconds."""
        numbers = {"goodput": self.share, "wall": self.wall, "starts": self.starts, "steps": self.steps}
        return numbers | {"lost_steps": self.lost_steps, "seconds": self.seconds}

    def _shown(self) -> Sequence[tuple[str, float]]:
        """The parts that are worth a word."""
        return [(name, took) for name, took in self.seconds.items() if took >= 0.0005 * self.wall]


def _starts(path: Path) -> Iterator[_Start]:
    with reading(path):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: no start of the run has come to its first step") from None
    start: _Start | None = None
    for number, line in enumerate(lines, start=1):
        try:
            entry = Entry.model_validate_json(line)
        except ValueError:
            continue  # cut short by a kill
        if entry.name == "start":
            if start is not None:
                yield start
            start = _Start(entry.step, entry.start, entry.end)
            continue
        if start is None:
            raise DataError(f"{path}:{number} comes before any start: the file's begin is missing")
        start.end = max(start.end, entry.end)
        if entry.name != "end":
            start.entries.append(entry)
    if start is not None:
        yield start


def _duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s``, ``4.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"
