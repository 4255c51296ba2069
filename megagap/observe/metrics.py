"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a console line for a person."""

import json
import logging
import math
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagap.errors import DataError
from megagap.files import LineFile, file_errors, write_text, writing
from megagap.run_files import METRICS

log = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one object per step, in order; cut back to the step from which a run resumes.

    A run that starts at step 0 starts the file again: an evaluation before the first step is made again too. Numbers
    that are not finite, which JSON does not have, become null. Every method raises :class:`DataError` naming
    the file if it cannot be written.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        self.path = path
        kept = _cut_back(path, after_step) if path.exists() else []
        self.resumed_at = kept[-1] if kept and kept[-1]["step"] == after_step else None
        """The record of the step from which the run resumes, if a former start has written it."""
        self._file = LineFile(path)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.append(json.dumps(_strict(record), allow_nan=False))

    def add_to_last(self, numbers: Mapping[str, Any]) -> None:
        """Add numbers to the last record."""
        self._file.close()
        records = read_metrics(self.path)
        records[-1] |= _strict(numbers)
        _write_all(self.path, records)
        self._file = LineFile(self.path)

    def sync(self) -> None:
        """Sync every record to disk: before a checkpoint, after which they would not be written again."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records, each with its ``step``; a last line cut short by a kill is left out.

    Step 0, where there is one, is an evaluation before the first update and has no training loss.
    Raises :class:`DataError` naming the file, and the line that is not a record.
    """
    with file_errors(f"cannot read {path}", path):
        lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            reason = "" if _is_record(record) else _NO_RECORD
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            reason = _not_json(line, error)
        if not reason:
            records.append(record)
        elif path.name == METRICS or any(map(_holds_record, lines)):
            raise DataError(f"{path}:{number} {reason}\n  {_cure(path, number)}")
        else:
            raise DataError(f"{path} is not a run's metrics.jsonl: no line of it is the record of a step")
    return records


_NO_RECORD = 'is not the record of a step: it must be an object with a number "step"'


def _is_record(value: object) -> bool:
    return isinstance(value, dict) and type(value.get("step")) is int


def _holds_record(line: bytes) -> bool:
    try:
        return _is_record(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _not_json(line: bytes, error: Exception) -> str:
    if b"\0" in line:
        return "has NUL bytes, as a power cut or a failed disk leaves them"
    return f"is not valid JSON: {error}"


def _cure(path: Path, number: int) -> str:
    return f"delete this line, to do without that step: sed -i {number}d {shlex.quote(str(path))}"


def _strict(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _cut_back(path: Path, after_step: int) -> list[dict[str, Any]]:
    """Returns the records that are kept."""
    kept = [record for record in read_metrics(path) if record["step"] <= after_step] if after_step else []
    _write_all(path, kept)
    return kept


def _write_all(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path = Path(os.path.realpath(path))  # a link to another disk stays one
    with writing(path):
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))


class TensorBoard:
    """The same numbers for TensorBoard.

    Written here and at once, not by TensorBoard's own writer, whose thread prints a traceback where a disk is full.
    Every method raises :class:`DataError` naming the file if it cannot be written.
    """

    def __init__(self, folder: Path, after_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = folder / f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        with writing(self._path):
            self._file = self._path.open("ab")
        self._records, self._event = RecordWriter(self._file), Event
        self._write(file_version="brain.Event:2")
        # What a former start wrote of the steps that are made again is not shown.
        self._write(step=after_step + 1 if after_step else 0, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
        self._write(step=record["step"], summary=Summary(value=values))

    def close(self) -> None:
        with file_errors(f"cannot write {self._path}", self._path):
            self._file.close()

    def _write(self, **fields: Any) -> None:
        with file_errors(f"cannot write {self._path}", self._path):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()


def console_line(record: Mapping[str, Any], steps: int, seconds_left: float) -> str:
    """One step, for a person."""
    parts = [
        f"step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {record['loss']:.3f}",
        f"norm {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"{_short(record['tokens_per_second'])} tok/s",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if problem := _problem(record):
        parts.append(f"SKIPPED: {problem}" if record["skipped"] else problem)
    return " | ".join([*parts, f"{duration(seconds_left)} left"])


def _problem(record: Mapping[str, Any]) -> str:
    """What is wrong with a step, in few words; nothing where all is well."""
    if record.get("spike"):
        return "spike"
    if not record["skipped"]:
        return ""
    if record.get("repeated") is False:
        return "two computations differ"
    if record.get("loss_scale", 0) > 1 and math.isfinite(record["loss"]):
        return "gradients overflowed fp16, loss scale halved"
    return "no gradient" if record["grad_norm"] == 0 else "loss or gradient not finite"


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
