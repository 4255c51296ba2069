"""What units contain: the texts of documents, and what is wrong with documents that have none."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from megagap.errors import DataError, library_errors
from megagap.files import reading
from megagap.preprocess import parquet
from megagap.preprocess.inputs import Input
from megagap.preprocess.listing import list_inputs
from megagap.preprocess.units import Unit, read_units

log = logging.getLogger(__name__)


class BadDocument(ValueError):
    """A document that is malformed or lacks a text; ``reason`` says so in a few fixed words."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(details)
        self.reason = reason


@dataclass(frozen=True)
class Fault:
    """A document that cannot be used."""

    line: int
    """Line or row within its unit, from 0."""
    reason: str
    """A few words, the same for all faults of a kind."""
    details: str


def documents_of(unit: Unit, keys: Sequence[str]) -> Iterator[tuple[str, ...] | Fault]:
    """The texts of each document of a unit of lines or rows, one for each of ``keys``; blank lines contain none."""
    for number, read in _records(unit, keys):
        try:
            yield _texts_of(read(), keys)
        except BadDocument as error:
            yield Fault(number, error.reason, str(error))


def objects_of(unit: Unit, key: str) -> Iterator[tuple[int, dict[str, Any]] | Fault]:
    """Each document of a unit, whole, and its number there, from 0; all have a text as ``key``."""
    for number, read in _records(unit, [key]):
        try:
            document = read()
            _texts_of(document, [key])
        except BadDocument as error:
            yield Fault(number, error.reason, str(error))
        else:
            yield number, document


Record = tuple[int, Callable[[], Any]]
"""The number of a line or row in its unit, from 0, and a function that returns its document or raises
:class:`BadDocument`."""


def record_numbers(unit: Unit) -> list[int]:
    """The number of each document of :func:`documents_of` in its unit, from 0."""
    return [number for number, _ in _records(unit, ())]


def _records(unit: Unit, keys: Sequence[str]) -> Iterator[Record]:
    return _lines(unit.data, keys) if unit.kind == "lines" else _rows(unit.data)


def _lines(data: bytes, keys: Sequence[str]) -> Iterator[Record]:
    quoted = [json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass") for key in keys]
    for number, line in enumerate(data.split(b"\n")):
        if line and not line.isspace():
            # A key that occurs twice is written twice; a slower parser decides what else it may be.
            may_repeat = any(line.count(key) > 1 for key in quoted)
            yield number, partial(_parse_strictly, line, keys) if may_repeat else partial(_parse, line)


def _parse_strictly(line: bytes, keys: Sequence[str]) -> Any:
    """As :func:`_parse`, but for a document that has one of ``keys`` more than once: parsers differ in which they take.

    Raises :class:`BadDocument`.
    """
    document = _parse(line)
    try:
        pairs = json.loads(line, object_pairs_hook=_Pairs, parse_int=float)
    except (ValueError, RecursionError):
        return document
    names = [name for name, _ in pairs] if isinstance(pairs, _Pairs) else []
    for key in keys:
        if names.count(key) > 1:
            raise BadDocument(f"key {key!r} more than once", f"the document has the key {key!r} more than once")
    return document


class _Pairs(list[tuple[str, Any]]):
    """The entries of a JSON object."""


def _rows(data: bytes) -> Iterator[Record]:
    if not data:
        return
    for batch in parquet.batches_in(data):
        for number in range(batch.num_rows):
            yield number, partial(_row, batch, number)


def _row(batch: Any, number: int) -> dict[str, Any]:
    try:
        return parquet.row_of(batch, number)
    except UnicodeDecodeError as error:
        raise BadDocument("invalid UTF-8", f"not valid UTF-8: {error}") from None
    except DataError as error:
        raise BadDocument("unreadable value", error.args[0]) from None


def _parse(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:
        pass
    # What the fast parser refuses, Python's may accept (NaN, for example), and its messages say where.
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocument("invalid UTF-8", f"not valid UTF-8, so not valid JSON: {error}") from None
    try:
        # An integer of more than 4,300 digits would be refused; no number's value is used.
        return json.loads(text, parse_int=float)
    except json.JSONDecodeError as error:
        raise BadDocument("invalid JSON", f"not valid JSON at character {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise BadDocument("invalid JSON", "lists or objects are nested too deeply") from None


def _texts_of(document: Any, keys: Sequence[str]) -> tuple[str, ...]:
    """Raises :class:`BadDocument`."""
    if not isinstance(document, dict):
        raise BadDocument("not a JSON object", 'not a JSON object such as {"text": "…"}')
    return tuple(_text_of(document, key) for key in keys)


def _text_of(document: dict[str, Any], key: str) -> str:
    if key not in document:
        details = f"the document has no key {key!r}; it has {', '.join(map(repr, document)) or 'none'}"
        raise BadDocument(f"no key {key!r}", details)
    text = document[key]
    if not isinstance(text, str):
        raise BadDocument(f"{key!r} is not text", f"the value of {key!r} is {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode()  # JSON may escape half of a surrogate pair, which is not valid text
        except ValueError as error:
            raise BadDocument(f"{key!r} is not text", f"the value of {key!r} is not valid text: {error}") from None
    return text


def line_units(path: Path) -> Iterator[Unit]:
    """The parts of a file of JSON lines, which may be compressed. Raises :class:`DataError` for any other file."""
    with reading(path):
        status = path.stat()
    for unit in read_units([Input(str(path), status.st_size, status.st_mtime_ns)], [], splits_texts=False):
        if unit.kind != "lines":
            raise DataError(f"{path} is not of JSON lines\n  write its texts as JSON lines, or leave it out.")
        yield unit


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, from 1, and its value. Raises :class:`DataError` for a line that is
    not JSON, and as :func:`line_units`."""
    for unit in line_units(path):
        for number, line in enumerate(unit.data.split(b"\n"), unit.line):
            if line.strip():
                with library_errors(f"{path}, line {number} is not JSON"):
                    value = json.loads(line)
                yield number, value


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a plain text, cut anywhere between words."""

    text: str
    ends: bool
    """It is the last of its document."""
    file_bytes: int
    """Read of the files, which may be compressed, since the piece before."""


def read_texts(
    paths: Sequence[str | Path], key: str, skip: Callable[[DataError], object] | None = None
) -> Iterator[str]:
    """The texts of :func:`read_pieces`, of all inputs that ``paths`` name."""
    return (piece.text for piece in read_pieces(list_texts(paths, key), key, skip))


def list_texts(paths: Sequence[str | Path], key: str) -> list[Input]:
    """The files of text, plain or with the key ``key``. Raises :class:`DataError` for one that cannot be read."""
    # A BPE is trained on words: where a plain text is cut does not matter, nor what its file is called.
    listing = list_inputs(paths, [key], any_text=True)
    for note in listing.notes:
        log.warning("%s", note)
    return listing.inputs


def read_pieces(
    inputs: Sequence[Input], key: str, skip: Callable[[DataError], object] | None = None
) -> Iterator[Piece]:
    """The documents of JSON lines and Parquet files, and plain texts in pieces.

    Raises :class:`DataError` for a file that cannot be read. So it does for a document that is malformed or lacks its
    text, and plain text that is not UTF-8, unless there is ``skip``, which is then called with the error.
    """
    for unit in read_units(inputs, [key], splits_texts=True):
        found = [text_of(unit)] if unit.kind == "text" else documents_of(unit, [key])
        size = unit.size
        for text in found:
            if isinstance(text, Fault):
                error = fault_in(unit, text)
                if skip is None:
                    raise error
                skip(error)
            else:
                ends = unit.kind != "text" or unit.ends
                yield Piece(text if isinstance(text, str) else text[0], ends, size)
                size = 0


def fault_in(unit: Unit, fault: Fault, lines_before: int = 0) -> DataError:
    """Names the file and line, or row; ``lines_before``: lines of the file before the part that is read."""
    number = unit.line + fault.line + lines_before
    return DataError(f"{unit.path}, {'row' if unit.kind == 'rows' else 'line'} {number}: {fault.details}")


def text_of(unit: Unit) -> str | Fault:
    """A piece of a plain text."""
    try:
        return unit.data.decode("utf-8")
    except UnicodeDecodeError as error:
        details = f"not valid UTF-8: {error.reason} ({unit.data[error.start]:#04x})"
        return Fault(unit.data[: error.start].count(b"\n"), "invalid UTF-8", details)
