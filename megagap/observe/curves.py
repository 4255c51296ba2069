"""Curves of runs from their metrics.jsonl: over steps, tokens, samples or hours, smoothed, and compared."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
from numpy.typing import NDArray

from megagap.errors import DataError
from megagap.observe.metrics import read_metrics
from megagap.run_files import METRICS

Axis = Literal["step", "tokens", "samples", "hours"]
"""What a curve is drawn over. Hours are those of the steps (``step_seconds``): pauses between starts do not count."""
AXES: tuple[Axis, ...] = get_args(Axis)

RECORDED: Mapping[Axis, str] = {
    "step": "step",
    "tokens": "consumed_tokens",
    "samples": "consumed_samples",
    "hours": "step_seconds",
}
"""The key of metrics.jsonl from which each axis is computed."""

EVALUATED = ("validation_", "task_")
"""How the keys of numbers that evaluation gives start."""

LARGEST = 1e300
"""Of numbers that are drawn: beyond it the length of an axis may not be a float."""


@dataclass(frozen=True)
class Curve:
    """One number of a run."""

    key: str
    x: NDArray[np.float64]
    """[points] Increasing as the run proceeds."""
    y: NDArray[np.float64]
    """[points]"""

    @property
    def is_evaluated(self) -> bool:
        return self.key.startswith(EVALUATED)

    def smoothed(self, points: float) -> "Curve":
        """The exponential moving average whose weights fall by 1/e within ``points`` points; starts unbiased."""
        if points <= 0:
            return self
        share = -math.expm1(-1 / points)
        means = np.empty_like(self.y)
        total = weight = 0.0
        for i, value in enumerate(self.y):
            total, weight = (1 - share) * total + share * value, (1 - share) * weight + share
            means[i] = total / weight
        return Curve(self.key, self.x, means)


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of a run: the number that was asked for, and with ``loss`` the losses on validation sources."""

    path: Path
    curves: tuple[Curve, ...]
    """The number that was asked for first."""


class Difference(Curve):
    """A number of the second run minus that of the first, where both have the same x."""

    @property
    def mean(self) -> float:
        return float((self.y / len(self.y)).sum())

    @property
    def largest(self) -> tuple[float, float]:
        """The difference that is furthest from 0, and its x."""
        at = int(np.abs(self.y).argmax())
        return float(self.y[at]), float(self.x[at])


def read_curves(run: Path, key: str, axis: Axis = "step") -> RunCurves:
    """The curves of a run directory, or of its metrics.jsonl.

    Raises :class:`DataError` where there are no records, no numbers named ``key`` (naming those that there are), or
    none for ``axis``.
    """
    path = run / METRICS if run.is_dir() else run
    if not path.exists():
        raise DataError(f"{path} does not exist\n  give a run directory, such as the run.dir of a recipe.")
    records = [record for record in read_metrics(path) if _is_number(record["step"])]
    if not records:
        raise DataError(f"{path} is empty or has no complete record: the run has not made a step yet")
    numeric = sorted({name for record in records for name, value in record.items() if _is_number(value)} - {"step"})
    if key not in numeric:
        raise DataError(f"{path} has no numbers named {key!r}\n  possible: {', '.join(numeric) or 'none'}")
    validation = [name for name in numeric if name.startswith("validation_loss/")] if key == "loss" else []
    places = _places(path, records, axis)
    curves = []
    for name in (key, *validation):
        points = [
            (x, record[name])
            for x, record in zip(places, records, strict=True)
            if x is not None and _is_number(record.get(name))
        ]
        if not points:
            raise DataError(f"{path} has no {name} in the records that have {RECORDED[axis]}, which --x {axis} needs")
        x, y = np.array(points, np.float64).T
        curves.append(Curve(name, x, y))
    return RunCurves(run, tuple(curves))


def _places(path: Path, records: Sequence[Mapping[str, Any]], axis: Axis) -> list[float | None]:
    """Each record's x; None where it has none. Before the first step, nothing has been consumed."""
    recorded = RECORDED[axis]
    if not any(_is_number(record.get(recorded)) for record in records):
        possible = [name for name in AXES if any(_is_number(record.get(RECORDED[name])) for record in records)]
        raise DataError(f"{path} has no {recorded}, which --x {axis} needs\n  possible: {', '.join(possible)}")
    if axis == "hours":
        return list(_hours(records))
    return [
        float(value) if _is_number(value := record.get(recorded)) else 0.0 if record["step"] == 0 else None
        for record in records
    ]


def _hours(records: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Up to the end of each record's step. One that has no time, as before the first step, takes none."""
    seconds = 0.0
    for record in records:
        value = record.get("step_seconds")
        seconds += value if _is_number(value) else 0.0
        yield seconds / 3600


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it can be drawn: not NaN, and even whole numbers may be too large."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def differences(first: RunCurves, second: RunCurves, axis: Axis, smooth: float = 0) -> list[Difference]:
    """For each number that both runs have, at equal x; of hours, which are never equal, ``first`` is interpolated.

    ``smooth`` as in :meth:`Curve.smoothed`, of all numbers but those of evaluation. Raises :class:`DataError` if the
    runs have no x in common.
    """
    ours = {curve.key: curve for curve in first.curves}
    found = []
    for theirs in second.curves:
        if (curve := ours.get(theirs.key)) is None:
            continue
        points = 0 if curve.is_evaluated else smooth
        difference = _difference(curve.smoothed(points), theirs.smoothed(points), interpolate=axis == "hours")
        if len(difference.x):
            found.append(difference)
        elif theirs is second.curves[0]:
            spans = [f"{run.path} has {_span(run.curves[0], axis)}" for run in (first, second)]
            raise DataError(
                f"the runs have no {axis.removesuffix('s')} in common at which {theirs.key} could be compared: "
                f"{', '.join(spans)}\n"
                "  compare runs of the same steps, or draw them over one another without --difference."
            )
    return found


def _difference(first: Curve, second: Curve, interpolate: bool) -> Difference:
    if interpolate:
        within = (second.x >= first.x.min()) & (second.x <= first.x.max())
        x = second.x[within]
        return Difference(second.key, x, second.y[within] - np.interp(x, first.x, first.y))
    x, ours, theirs = np.intersect1d(first.x, second.x, return_indices=True)
    return Difference(second.key, x, second.y[theirs] - first.y[ours])


def _span(curve: Curve, axis: Axis) -> str:
    name, digits = axis.removesuffix("s"), ",.3g" if axis == "hours" else ",.0f"
    lowest, highest = format(curve.x.min(), digits), format(curve.x.max(), digits)
    return f"{name} {lowest}" if lowest == highest else f"{name}s {lowest} to {highest}"
