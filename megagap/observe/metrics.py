"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a console line for a person."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagap.errors import DataError

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one object a step, in order; cut back to the step from which a run goes on.

    Numbers that are not finite, which JSON does not have, become null.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        self.path = path
        if path.exists():
            _cut_back(path, after_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line goes to the system when it is whole

    def write(self, record: Mapping[str, Any]) -> None:
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(strict, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Bring every record to the disk: before a checkpoint after which they would not be written again."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records, each with its ``step``; a last line torn by a kill is left out.

    Raises :class:`DataError` naming the file, and the line that is no record.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is no JSON: {error}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise DataError(f'{path}:{number} is no record of a step: it should be an object with a number "step"')
        records.append(record)
    return records


def _cut_back(path: Path, after_step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= after_step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)


class TensorBoard:
    """The same numbers for TensorBoard, on logging steps."""

    def __init__(self, folder: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def console_line(record: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """One step for a person."""
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {record['loss']:.3f}",
        f"norm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"{_short(record['tokens_per_second'])} tok/s",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["skipped"]:
        parts.append("SKIPPED: loss or gradient not finite")
    return " | ".join([*parts, f"{duration(seconds_left)} left"])


def duration(seconds: float) -> str:
    """``1h 12m``, ``3m 20s``, ``12s``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def _short(number: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"
