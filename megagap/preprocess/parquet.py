"""The one place where pyarrow is called: columns of text in Parquet files, in batches of rows.

Whatever pyarrow raises on a file becomes a :class:`DataError` that names the file and how far it was read.
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megagap.errors import DataError, library_errors

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

PLAIN_TYPES = {"string_view": "large_string", "binary_view": "large_binary"}
"""What view types are converted to, by the names of pyarrow's types."""


class Table:
    """Some columns of an open Parquet file."""

    def __init__(self, path: str, file: "ParquetFile", columns: Sequence[str]) -> None:
        self._path = path
        self._file = file
        self._columns = list(columns)
        self.row_count: int = file.metadata.num_rows

    def batches(self, skipped: int, rows_at_a_time: int) -> Iterator[tuple[int, Any]]:
        """The rows after the first ``skipped``, and how many lie before each batch.

        Row groups that lie before are not read. Raises :class:`DataError`.
        """
        first = 0
        for group in range(self._file.num_row_groups):
            with _errors_in(self._path, first):
                count = self._file.metadata.row_group(group).num_rows
            stop = first + count
            if stop <= skipped:
                first = stop
                continue
            with _errors_in(self._path, first):
                batches = self._file.iter_batches(rows_at_a_time, row_groups=[group], columns=self._columns)
            while (rows := self._next(batches, first)) is not None:
                over = min(max(skipped - first, 0), rows.num_rows)
                if over < rows.num_rows:
                    yield first + over, rows.slice(over)
                first += rows.num_rows
            self._require_all(group, first, stop)

    def _require_all(self, group: int, found: int, expected: int) -> None:
        if found != expected:
            raise DataError(
                f"{self._path} is damaged: row group {group} should end with row {expected:,} and ends with {found:,}\n"
                "  copy or create it again."
            )

    def _next(self, batches: Iterator[Any], first: int) -> Any:
        with _errors_in(self._path, first):
            rows = next(batches, None)
            return None if rows is None else _compact(rows)


@contextmanager
def open_table(path: str, columns: Sequence[str]) -> Iterator[Table]:
    """``columns`` of a Parquet file, which is closed after the block.

    Raises :class:`DataError` if it is damaged or encrypted, lacks one of them, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path} is a Parquet file, and pyarrow cannot be imported ({error})\n"
            "  install it with pip install 'megagap[parquet]'."
        ) from None
    with _errors_in(path, 0):
        # By the name's bytes: pyarrow takes only names that are valid UTF-8.
        source = pyarrow.OSFile(os.fsencode(path))
        file = parquet.ParquetFile(source)
        names = file.schema_arrow.names
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    with source, file:
        for column in columns:
            if column not in names:
                raise DataError(f"{path} has no column {column!r}; it has {', '.join(map(repr, names))}")
            if names.count(column) > 1:
                raise DataError(f"{path} has {names.count(column)} columns {column!r}: which one is ambiguous")
        if sum(rows) != file.metadata.num_rows:
            raise DataError(
                f"{path} is damaged: it should have {file.metadata.num_rows:,} rows and has {sum(rows):,}\n"
                "  copy or create it again."
            )
        with _errors_in(path, 0):
            table = Table(path, file, columns)
        yield table


@contextmanager
def _errors_in(path: str, row: int) -> Iterator[None]:
    try:
        with library_errors(f"{path} cannot be read beyond row {row:,}"):
            yield
    except DataError as error:
        raise DataError(
            f"{error.args[0]}\n"
            "  if the file is cut short or damaged (disk full? copy interrupted?), copy or create it again."
        ) from None


def to_bytes(rows: Any) -> bytes:
    """``rows`` in Arrow's IPC format."""
    import pyarrow

    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_batch(rows)
    return sink.getvalue()


def batches_in(data: bytes) -> Iterator[Any]:
    """The batches of rows that ``data`` holds, from :func:`to_bytes`."""
    import pyarrow

    yield from pyarrow.ipc.open_stream(data)


def row_of(batch: Any, number: int) -> dict[str, Any]:
    """A row by the names of its columns.

    Raises :class:`DataError` for a value that Python cannot hold, and UnicodeDecodeError for text that is not UTF-8.
    """
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        with library_errors(f"the value of {name!r} cannot be read"):
            value = column[number]
            # For text its bytes, to distinguish invalid UTF-8 from other errors.
            value = value.as_buffer() if hasattr(value, "as_buffer") else value.as_py()
        values[name] = str(value, "utf-8") if hasattr(value, "to_pybytes") else value
    return values


def _compact(rows: Any) -> Any:
    """``rows`` with their own copies of texts: each slice of a dictionary or view would carry along the whole."""
    import pyarrow

    for i, column in enumerate(rows.columns):
        if pyarrow.types.is_dictionary(column.type):
            rows = rows.set_column(i, rows.schema.names[i], column.dictionary_decode())
        elif plain := PLAIN_TYPES.get(str(column.type)):
            rows = rows.set_column(i, rows.schema.names[i], column.cast(getattr(pyarrow, plain)()))
    return rows
