"""Inputs cut into units of work of about equal size, each of which can be parsed and encoded independently.

A unit is whole lines of a JSON-lines file, whole rows of a Parquet file, or a piece of a plain text. How inputs are cut
depends on nothing but them. Each unit says where the next one starts, so that another run can resume there.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from megagap.data.partial import checksum_of
from megagap.errors import DataError
from megagap.files import reading
from megagap.preprocess import parquet
from megagap.preprocess.inputs import READING_ERRORS, Content, Input, cannot_read_on, open_content
from megagap.preprocess.kinds import BYTE_ORDER_MARK, Kind

UNIT_BYTES = 1 << 20
ROWS_AT_A_TIME = 1000

TEXT_CUT = re.compile(rb"[!-~](?= )")
"""Where a text may be cut: between a visible ASCII character and a space (``Tokenizer.splits_at_spaces``)."""


@dataclass(frozen=True)
class Mark:
    """Where a unit starts."""

    input: int = 0
    """Number of the input; the number of inputs at the end."""
    offset: int = 0
    """Bytes of its content, or rows, that come before, counted from where the reading of this input begins."""
    line: int = 1
    """Number of the line, or row, counted from there."""
    checksum: str = ""
    """xxh3_64 of the content before."""


@dataclass(frozen=True)
class Unit:
    input: int
    path: str
    kind: Kind
    data: bytes
    """Lines, a piece of text, or rows in Arrow's IPC format."""
    line: int
    """Number of the first line, or row."""
    size: int
    """Bytes of the file that were read for it."""
    next: Mark
    begins: bool = False
    """For a piece of text: whether it is the first of its document."""
    ends: bool = False
    file_checksum: str | None = None
    """Of the last unit of an input: xxh3_64 of all bytes that were read of the file."""
    content_size: int = 0
    """Bytes of its content, uncompressed; of rows, their share of the columns that are read."""

    @property
    def records_read(self) -> int:
        """Lines or rows of the input up to the end of this unit, which is its last or ends a line; 1 of a text."""
        if self.kind == "text":
            return 1
        lines = self.data.count(b"\n") + (not self.data.endswith(b"\n") and len(self.data) > 0)
        return self.line - 1 + (lines if self.kind == "lines" else 0)


def read_units(
    inputs: Sequence[Input],
    columns: Sequence[str],
    splits_texts: bool,
    start: Mark | None = None,
    unit_bytes: int = UNIT_BYTES,
) -> Iterator[Unit]:
    """The units of ``inputs`` from ``start`` on. ``columns`` are read from Parquet files.

    A plain text is cut at :data:`TEXT_CUT` if ``splits_texts``, else it is one unit. Raises :class:`DataError` if a
    file cannot be read further, or has changed since it was listed or, before ``start``, since it was read.
    """
    mark = start or Mark()
    for number in range(mark.input, len(inputs)):
        at = mark if number == mark.input else Mark(number)
        with open_content(inputs[number].path, inputs[number].any_text) as content:
            yield from _read_input(inputs[number], content, at, columns, splits_texts, unit_bytes)


def _read_input(
    file: Input, content: Content, at: Mark, columns: Sequence[str], splits_texts: bool, unit_bytes: int
) -> Iterator[Unit]:
    if content.kind == "rows":
        units = _read_rows(file, at, columns, unit_bytes)
    else:
        units = _read_bytes(file, content, at, splits_texts, unit_bytes)
    checksum = None
    for unit in units:
        checksum = unit.file_checksum
        yield unit
    if file.size is not None:
        _require_unchanged(file, checksum if content.kind != "rows" else None)


def _require_unchanged(file: Input, checksum: str | None) -> None:
    """Raises :class:`DataError` if a file changed since it was listed; ``checksum`` is of what was read, if known."""
    with reading(file.path):
        status = os.stat(file.path)
        if status.st_size != file.size:
            raise DataError(
                f"{file.path} had {file.size:,} bytes at first, {status.st_size:,} now: it changed while it was read"
            )
        if status.st_mtime_ns == file.modified:
            return
        if not checksum or not file.is_whole or checksum_of(file.path) != checksum:
            raise DataError(f"{file.path} was written while it was read\n  start again when it is complete.")


def _read_bytes(file: Input, content: Content, at: Mark, splits_texts: bool, unit_bytes: int) -> Iterator[Unit]:
    """Lines or a text. The last unit may be empty."""
    is_text = content.kind == "text"
    line, hash_ = at.line, xxhash.xxh3_64()
    try:
        left = _begin(file, content)
        _skip(file, content, at, hash_)
        offset = at.offset
        counted = 0
        pending: list[bytes] = []
        """What was read, but is not yet in a unit for lack of a place to cut."""
        while True:
            wanted = unit_bytes if left is None else min(unit_bytes, max(left - offset - sum(map(len, pending)), 0))
            block = content.read(wanted)
            is_last = len(block) < unit_bytes
            if left is not None and is_last and (end := block or (pending or [b""])[-1]) and not end.endswith(b"\n"):
                block += content.readline()  # the line that starts in our part and ends in the next
            cut = len(block) if is_last else _last_cut(block, is_text, splits_texts)
            if not cut and not is_last:
                pending.append(block)
                continue
            data = b"".join((*pending, block[:cut]))
            pending = [block[cut:]] if cut < len(block) else []
            hash_.update(data)
            unit = Unit(
                at.input,
                file.path,
                content.kind,
                data.removeprefix(BYTE_ORDER_MARK) if not offset and not file.start else data,
                line,
                content.bytes_read - counted,
                Mark(at.input, offset + len(data), line + data.count(b"\n"), hash_.hexdigest()),
                begins=is_text and not offset,
                ends=is_text and is_last,
                content_size=len(data),
            )
            offset, line, counted = unit.next.offset, unit.next.line, content.bytes_read
            if is_last:
                # For a part of a file, read-ahead would count too; the checksum of its lines is what can be checked.
                checksum = content.file_checksum if file.is_whole else hash_.hexdigest()
                yield replace(unit, next=Mark(at.input + 1), file_checksum=checksum)
                return
            yield unit
    except READING_ERRORS as error:
        raise cannot_read_on(file.path, line - 1 + b"".join(pending).count(b"\n"), error) from None


def _begin(file: Input, content: Content) -> int | None:
    """Go to the first line of a part of a file; the bytes from there to its end, None for those of the whole file."""
    if file.is_whole:
        return None
    content.skip_to(max(file.start - 1, 0))
    skipped = len(content.readline()) - 1 if file.start else 0
    assert file.size is not None
    return max((file.size if file.stop is None else file.stop) - file.start - skipped, 0)


def _skip(file: Input, content: Content, at: Mark, hash_: "xxhash.xxh3_64") -> None:
    """Skip what an earlier run has processed."""
    left = at.offset
    while left and (block := content.read(min(left, UNIT_BYTES))):
        hash_.update(block)
        left -= len(block)
    if at.offset and (left or hash_.hexdigest() != at.checksum):
        raise changed(file.path)


def changed(path: str) -> DataError:
    return DataError(
        f"{path} has changed since the interrupted run read it\n  restore it to resume, or start without --resume."
    )


def _last_cut(block: bytes, is_text: bool, splits_texts: bool) -> int:
    """Where the last unit that ends in ``block`` ends; 0 if none does."""
    if not is_text:
        return block.rfind(b"\n") + 1
    if splits_texts:
        for window in range(len(block) - 4096, -4096, -4096):
            matches = list(TEXT_CUT.finditer(block, max(window, 0), window + 4097))
            if matches:
                return matches[-1].end()
    return 0


def _read_rows(file: Input, at: Mark, columns: Sequence[str], unit_bytes: int) -> Iterator[Unit]:
    """Rows of a Parquet file. A unit may be empty."""
    row = 0
    with parquet.open_table(file.path, columns) as table:
        size_of_row = (file.size or 0) / max(table.row_count, 1)
        for first, batch in table.batches(at.offset, ROWS_AT_A_TIME):
            row = first
            for rows in _slices(batch, unit_bytes):
                row += rows.num_rows
                size = int(rows.num_rows * size_of_row)
                data, mark = parquet.to_bytes(rows), Mark(at.input, row, row + 1)
                number = row - rows.num_rows + 1
                # Not what the file says of its columns: pyarrow ends the process where that is damaged.
                yield Unit(at.input, file.path, "rows", data, number, size, mark, content_size=rows.nbytes)
    with reading(file.path):
        checksum = checksum_of(file.path)
    yield Unit(at.input, file.path, "rows", b"", row + 1, 0, Mark(at.input + 1), file_checksum=checksum)


def _slices(rows: Any, unit_bytes: int) -> Iterator[Any]:
    """``rows`` in parts of about ``unit_bytes``, whatever the reader's batches: halved until small enough."""
    if rows.nbytes <= unit_bytes or rows.num_rows < 2:
        yield rows
        return
    half = rows.num_rows // 2
    yield from _slices(rows.slice(0, half), unit_bytes)
    yield from _slices(rows.slice(half), unit_bytes)
