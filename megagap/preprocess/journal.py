"""How far a run has come, beside its partial files, so that another one can continue there.

A line of JSON for each entry, appended and synced: first what the run is to do, then, now and then, how much of it has
been written. A last line that was cut short does not count.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megagap.data.manifest import RecordKind
from megagap.data.partial import Position, checksum_of
from megagap.errors import DataError, counted
from megagap.files import reading
from megagap.preprocess.inputs import Input
from megagap.preprocess.units import Mark, changed


@dataclass
class PairState:
    """What was written to a pair, and left out."""

    position: Position = field(default_factory=Position)
    characters: int = 0
    bytes: int | None = 0
    """Of the texts, in UTF-8; None where an earlier version did not count them."""
    empty: int = 0
    short: int = 0
    special: int = 0
    """Special tokens written out in the texts."""


@dataclass
class State:
    """Where a run stands."""

    pairs: list[PairState]
    mark: Mark = field(default_factory=Mark)
    """The unit to continue with."""
    checksums: list[str] = field(default_factory=list)
    """Of the inputs that were read to their end."""
    records: list[int | None] = field(default_factory=list)
    """Lines or rows of these inputs; None where an earlier version did not count them."""
    kinds: list[RecordKind | None] = field(default_factory=list)
    """What records these inputs have."""
    record_count: int = 0
    """The sum of ``records``."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Of the documents that were malformed."""
    first_skipped: list[str] = field(default_factory=list)
    content_bytes: int | None = 0
    """Bytes of the inputs that were read, uncompressed; None where an earlier version did not count them."""
    arranged: dict[int, tuple[Position, int]] = field(default_factory=dict)
    """Of pairs whose documents were arranged anew: what they hold, and how many duplicates were left out."""
    is_read: bool = False
    """All inputs were read."""
    is_complete: bool = False
    """All partial files are complete; they have only to be published."""


BY_INPUT = ("checksums", "records", "kinds")
"""Of a state: lists by input, of which an entry of the journal has what is new."""


class Journal:
    """The journal of a run, for appending."""

    def __init__(self, path: Path, plan: dict[str, Any] | None) -> None:
        """``plan`` starts a new journal; None continues the one that exists."""
        if plan is None:
            _cut_torn_line(path)
        self._file = open(path, "w" if plan else "a", encoding="utf-8")  # noqa: SIM115
        self._finished = 0
        self.has_progress = plan is None
        """Whether there is anything to continue from."""
        if plan:
            self._append(plan)

    def record(self, state: State) -> None:
        """Add where the run stands, all files being synced."""
        new = {name: getattr(state, name)[self._finished :] for name in BY_INPUT}
        self._append(asdict(state) | new | {"from": self._finished})
        self._finished = len(state.checksums)
        self.has_progress = True

    def _append(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk would fail here again, in place of the error that says so
            self._file.close()


def _cut_torn_line(path: Path) -> None:
    with reading(path):
        data = path.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def read_journal(path: Path) -> tuple[dict[str, Any], State] | None:
    """What an interrupted run was to do, and where it stood; None if it left nothing to continue from."""
    with reading(path):
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
    try:
        entries = [json.loads(line) for line in lines]
        by_input: dict[str, list[Any]] = {name: [] for name in BY_INPUT}
        for entry in entries[1:]:
            first = entry.pop("from")
            for name, values in by_input.items():
                values[first:] = entry.pop(name, [])
        if not entries[1:]:
            return None
        for values in by_input.values():
            values += [None] * (len(by_input["checksums"]) - len(values))
        state = _state_of(entries[-1] | by_input)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error})\n  start again without --resume.") from None
    return entries[0], state


def _state_of(entry: dict[str, Any]) -> State:
    pairs = [
        PairState(**pair | {"position": Position(**pair["position"]), "bytes": pair.get("bytes")})
        for pair in entry["pairs"]
    ]
    arranged = {int(i): (Position(**position), dropped) for i, (position, dropped) in entry["arranged"].items()}
    mark = Mark(**entry["mark"])
    content_bytes = entry.get("content_bytes")
    return State(**entry | {"pairs": pairs, "mark": mark, "arranged": arranged, "content_bytes": content_bytes})


def check_inputs(before: Sequence[dict[str, Any]], now: Sequence[Input], state: State) -> None:
    """Raises :class:`DataError` unless the inputs are those that the interrupted run began with.

    An input whose time of change differs is compared by its checksum if it was read to its end. One that was read in
    part is compared when reading continues.
    """
    then = [Input(**file) for file in before]
    for one, other in zip(then, now, strict=False):
        if (one.path, one.start, one.stop) != (other.path, other.start, other.stop):
            raise DataError(
                f"the interrupted run was to read {one.path}, in whose place {other.path} is given now\n"
                "  give the same inputs to continue, or start again without --resume."
            )
    if len(then) != len(now):
        raise DataError(
            f"the interrupted run had {counted(len(then), 'input file')}, now there are {len(now):,}\n"
            "  give the same inputs to continue, or start again without --resume."
        )
    for i, (one, other) in enumerate(zip(then, now, strict=True)):
        is_read = i < len(state.checksums)
        was_touched = one.modified != other.modified and i <= state.mark.input
        if one.size != other.size:
            raise changed(other.path)
        if was_touched and not other.is_whole:
            raise changed(other.path)
        if was_touched and is_read:
            with reading(other.path):
                checksum = checksum_of(other.path)
            if checksum != state.checksums[i]:
                raise changed(other.path)


def inputs_entry(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    return [asdict(file) for file in inputs]
