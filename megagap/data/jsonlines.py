"""JSON lines, plain or compressed: one process reads chunks of whole lines, others parse them.

Files are decompressed by what they hold (gzip, Zstandard), whatever their names.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import zstandard

from megagap.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 1 << 20

GZIP_MAGIC = b"\x1f\x8b"
ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTANDARD_INPUT = 1 << 14
"""Compressed bytes handed over at a time; what comes of them is held in memory."""
ZSTANDARD_WINDOW = 1 << 31
"""Bytes that a file may ask to look back; the most that ``zstd --long=31`` writes."""


def fail(error: DataError) -> NoReturn:
    """What to do about a bad document by default: raise its error."""
    raise error


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file, as bytes; ``first_line`` counts from 1."""

    path: str
    first_line: int
    lines: list[bytes]
    size: int
    """Bytes of the file that were read for it: of a compressed file, compressed bytes."""

    def documents(self, keys: Sequence[str], on_bad: Callable[[DataError], object] = fail) -> Iterator[tuple[str, ...]]:
        """The texts of each document, one for each of ``keys``.

        A document that is malformed or lacks a text is left out after ``on_bad`` was told, in an error that names file
        and line.
        """
        for number, line in enumerate(self.lines, start=self.first_line):
            if line.isspace():
                continue
            try:
                texts = _texts_of(line, keys)
            except (ValueError, RecursionError) as error:
                on_bad(DataError(f"{self.path}, line {number}: {error}"))
                continue
            yield texts


def _texts_of(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        document: Any = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError('not a JSON object such as {"text": "…"}')
    return tuple(_text_of(document, key) for key in keys)


def _text_of(document: dict[str, Any], key: str) -> str:
    if key not in document:
        raise ValueError(f"the document has no key {key!r}; it has {', '.join(map(repr, document)) or 'none'}")
    text = document[key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} is {type(text).__name__}, not text")
    try:
        text.encode()  # JSON may escape half of a surrogate pair, which is no text
    except ValueError as error:
        raise ValueError(f"the value of {key!r} is no text: {error}") from None
    return text


def total_size(paths: Sequence[str | Path]) -> int:
    """Bytes of all files. Raises :class:`DataError` for one that cannot be read, before any work is done."""
    total = 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                total += file.seek(0, 2)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    return total


def read_chunks(paths: Sequence[str | Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The lines of the files in order, in chunks of about ``chunk_bytes``; a line is never split.

    Raises :class:`DataError` naming file and line where a file cannot be read on: it is cut short or damaged.
    """
    for path in paths:
        with open(path, "rb") as file:
            yield from _read_file(str(path), file, chunk_bytes)


def _read_file(path: str, file: io.BufferedReader, chunk_bytes: int) -> Iterator[Chunk]:
    lines: list[bytes] = []
    first_line, size, start = 1, 0, 0
    try:
        content = _decompressed(file)
        for line in content:
            lines.append(line)
            size += len(line)
            if size >= chunk_bytes:
                yield Chunk(path, first_line, lines, file.tell() - start)
                first_line, lines, size, start = first_line + len(lines), [], 0, file.tell()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        whole = first_line - 1 + len(lines)
        raise DataError(
            f"{path} cannot be read beyond line {whole:,}: {_fault_of(error)}\n"
            "  the file is cut short or damaged (disk full? copy interrupted?). Copy or make it again."
        ) from None
    # Perhaps without lines: the last bytes of a compressed file may hold none.
    if lines or file.tell() > start:
        yield Chunk(path, first_line, lines, file.tell() - start)


def _fault_of(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "its compressed data ends before their end marker"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _decompressed(file: io.BufferedReader) -> BinaryIO:
    """What ``file`` holds. Reading raises EOFError if compressed data is cut short, and errors of each library."""
    start = file.peek(len(ZSTANDARD_MAGIC))
    if start.startswith(GZIP_MAGIC):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if start.startswith(ZSTANDARD_MAGIC):
        return io.BufferedReader(_ZstandardFile(file))
    return file


class _ZstandardFile(io.RawIOBase):
    """The content of a Zstandard file: its frames one after the other.

    The library's own reader takes a file that is cut short for one that has ended.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = self._new_frame()
        self._content = memoryview(b"")
        """Decompressed, and not yet read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        while not self._content:
            if not (compressed := self._frame.unused_data or self._file.read(ZSTANDARD_INPUT)):
                if not self._frame.eof:
                    raise EOFError
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            self._content = memoryview(self._frame.decompress(compressed))
        target = memoryview(buffer)
        count = min(len(target), len(self._content))
        target[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    @staticmethod
    def _new_frame() -> "zstandard.ZstdDecompressionObj":
        return zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW).decompressobj()


def read_texts(paths: Sequence[str | Path], key: str) -> Iterator[str]:
    """Documents of JSON-lines files, which begin with ``{``, and the lines of any other file as plain text.

    Raises :class:`DataError` as :func:`read_chunks` does, for a document that is malformed or lacks its text, and for
    plain text that is not UTF-8.
    """
    for path in paths:
        is_json = None
        for chunk in read_chunks([path]):
            if is_json is None:
                is_json = b"".join(chunk.lines).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
            if is_json:
                yield from (text for (text,) in chunk.documents([key]))
            else:
                # A BPE is trained on words: where a plain text is cut does not matter, only that lines stay whole.
                try:
                    yield b"".join(chunk.lines).decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} is neither JSON lines nor plain text in UTF-8: {error.reason}\n"
                        "  give text, JSON lines, or either of them compressed with gzip or Zstandard."
                    ) from None
