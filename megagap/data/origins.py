"""Which line of which input file a document came from, by the pair's manifest and its map (``origin_map``)."""

import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megagap.data.manifest import read_manifest
from megagap.data.origin_map import ENDING, OriginMap
from megagap.data.sources import TokenSource
from megagap.errors import DataError


class UnknownOriginsError(Exception):
    """Why it is not known where a pair's documents came from."""


@dataclass(frozen=True)
class Origin:
    """Where a document came from."""

    file: str
    """As it was named when it was preprocessed."""
    unit: str | None
    """``line`` or ``row``; None of a plain text, which is one document."""
    number: int
    """Of that line or row, from 1."""
    from_byte: int = 0
    """Where the counting starts: above 0 for a part of a file whose lines before that could not be counted."""

    def describe(self, count: int = 1) -> str:
        """In words, for ``count`` documents of which this is the first."""
        if self.unit is None:
            return self.file
        lines = f"{self.unit} {self.number:,}"
        if count > 1:
            lines = f"{self.unit}s {self.number:,} to {self.number + count - 1:,}"
        return f"{self.file}, {lines}" + (f", counted from byte {self.from_byte:,}" if self.from_byte else "")

    def as_dict(self) -> dict[str, Any]:
        """``{"file": str}`` of a plain text, else with ``"line"`` or ``"row"``, and ``"from_byte"`` if it is not 0."""
        place = {} if self.unit is None else {self.unit: self.number}
        return {"file": self.file} | place | ({"from_byte": self.from_byte} if self.from_byte else {})


class Origins:
    """Where each document of a pair came from.

    Raises :class:`UnknownOriginsError` if the pair does not say, and :class:`DataError` if its manifest or its map is
    damaged.
    """

    def __init__(self, prefix: str) -> None:
        manifest = read_manifest(prefix)
        if manifest is None:
            raise UnknownOriginsError(f"{prefix} has no manifest, which names input files")
        counts = [record.records for record in manifest.inputs]
        if ENDING not in manifest.files or None in counts:
            raise UnknownOriginsError(
                f"{prefix} has no map of origins: an earlier version made it, or its documents came from no files"
            )
        if not os.path.exists(prefix + ENDING):
            raise UnknownOriginsError(f"{prefix}{ENDING}, which its manifest lists, is missing")
        self._map = OriginMap(prefix, manifest.documents)
        self._inputs = manifest.inputs
        self._starts = list(accumulate((record.records or 0 for record in manifest.inputs), initial=0))
        self._before: dict[int, int | None] = {}

    def __getitem__(self, document: int) -> Origin:
        record = self._map[document]
        if not 0 <= record < self._starts[-1]:
            raise DataError(f"{self._map.path} is damaged: document {document} should be of record {record:,}")
        number = bisect_right(self._starts, record) - 1
        file, place = self._inputs[number], record - self._starts[number] + 1
        if file.kind == "text":
            return Origin(file.path, None, place)
        if file.kind == "rows" or not file.start:
            return Origin(file.path, "row" if file.kind == "rows" else "line", place)
        if number not in self._before:
            self._before[number] = self._lines_before(number)
        before = self._before[number]
        if before is None:
            return Origin(file.path, "line", place, from_byte=file.start)
        return Origin(file.path, "line", before + place)

    def _lines_before(self, number: int) -> int | None:
        """Lines of a file before the part that an input is; None if that cannot be known."""
        part, count = self._inputs[number], 0
        while part.start and number and self._continues(number):  # as in merged shards
            number -= 1
            part = self._inputs[number]
            count += part.records or 0
        try:
            if part.start and os.path.getsize(part.path) != part.size:
                return None
            return count + lines_before(part.path, part.start)
        except OSError:
            return None

    def _continues(self, number: int) -> bool:
        """Whether an input is the part of a file that follows the input before."""
        before, part = self._inputs[number - 1 : number + 1]
        return (before.path, before.stop) == (part.path, part.start)


class SourceOrigins:
    """Where the documents of sources came from, by shard: each is opened when it is first asked for."""

    def __init__(self) -> None:
        self._opened: dict[str, Origins | str] = {}

    def of(self, source: TokenSource, document: int) -> Origin | str:
        """Where a document of a source came from, or why that is not known. Raises :class:`DataError`."""
        prefix, number = source.shard_of(document)
        if prefix not in self._opened:
            try:
                self._opened[prefix] = Origins(prefix)
            except UnknownOriginsError as reason:
                self._opened[prefix] = str(reason)
        origins = self._opened[prefix]
        return origins if isinstance(origins, str) else origins[number]

    @property
    def unknown(self) -> list[str]:
        """Why it is not known of some shards, a sentence for each."""
        return [reason for reason in self._opened.values() if isinstance(reason, str)]


def lines_before(path: str, start: int) -> int:
    """How many lines of a file start before byte ``start``. Reads them; may raise OSError."""
    if not start:
        return 0
    count, left = 1, start - 1
    with open(path, "rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count
