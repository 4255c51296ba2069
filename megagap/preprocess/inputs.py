"""Files to be read, whole or in part, and their content, decompressed. ``listing`` finds the files."""

import gzip
import io
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, Self, cast

import xxhash
import zstandard

from megagap.errors import DataError, system_reason
from megagap.preprocess.kinds import COMPRESSED_ENDINGS, LOOKED_AT, NotTextError, kind_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP_MAGIC = b"\x1f\x8b"
ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTANDARD_SKIPPED = tuple(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))
"""Start of a frame without content; pzstd writes one before every other frame."""
ZSTANDARD_INPUT = 1 << 14
"""Compressed bytes decompressed at a time; the result is held in memory."""
ZSTANDARD_WINDOW = 1 << 31
"""Largest window in bytes that a file may use; the most that ``zstd --long=31`` writes."""
BUFFER = 1 << 18
GLANCE = 1 << 14
"""Bytes read from a file to check that it can be read."""

READING_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What reading :class:`Content` raises for a truncated or damaged file."""


@dataclass(frozen=True)
class Input:
    """A file, or of plain JSON lines the lines that start at bytes ``[start, stop)``."""

    path: str
    size: int | None
    """Bytes; None for a pipe, which can be read only once, from start to end."""
    modified: int = 0
    """Modification time in ns."""
    start: int = 0
    stop: int | None = None
    """None for the end of the file."""
    any_text: bool = False
    """Whether it is plain text, whatever its name, if it does not start like JSON lines."""

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop is None

    @property
    def share(self) -> int:
        """Bytes to be read from it."""
        return 0 if self.size is None else (self.size if self.stop is None else self.stop) - self.start


def shard(inputs: Sequence[Input], index: int, count: int) -> list[Input]:
    """Part ``index`` of ``count``, from 0: all parts one after the other are the whole, each document once.

    The parts have about as many bytes. A plain JSON-lines file is cut between lines; others, which cannot be read from
    the middle, belong whole to the part in which they start. Raises :class:`DataError` for a pipe.
    """
    assert 0 <= index < count, (index, count)
    if pipe := next((file.path for file in inputs if file.size is None), None):
        raise DataError(f"{pipe} is not a regular file: it cannot be split into shards")
    total = sum(file.share for file in inputs)
    first, last = total * index // count, total * (index + 1) // count
    part = []
    before = 0
    for file in inputs:
        size = file.share
        start, stop = max(first - before, 0), min(last - before, size)
        begins_here = first <= before < last or (before == total and index == count - 1)  # an empty file at the end
        if size and start < stop and (start or stop < size) and is_plain_lines(file.path):
            part.append(replace(file, start=start, stop=None if stop == size else stop))
        elif begins_here:
            part.append(file)
        before += size
    return part


def is_plain_lines(path: str) -> bool:
    """Whether a file is of JSON lines that are not compressed, so that it can be read from the middle."""
    with open_content(path) as content:
        return not content.is_compressed and content.kind == "lines"


class Content:
    """A file's content, decompressed; a context manager. Reading raises :data:`READING_ERRORS`."""

    def __init__(self, path: str, any_text: bool, buffer: int) -> None:
        self._file = _Summing(path)
        try:
            buffered = io.BufferedReader(self._file, buffer)
            decompressed = _decompressed(path, buffered)
            self.is_compressed = decompressed is not None
            self._stream = buffered if decompressed is None else io.BufferedReader(decompressed, buffer)
            # A pipe returns what has arrived so far, which says less.
            looked_at = min(buffer, LOOKED_AT) if self._file.is_regular else 0
            self.kind = kind_of(path, self._stream.peek(LOOKED_AT), looked_at, any_text)
            if self.kind == "rows" and (self.is_compressed or not self._file.is_regular):
                what = "is a compressed Parquet file or comes from a pipe"
                raise NotTextError.of(path, what, "decompress it, and give it as a file.")
        except BaseException:
            self._file.close()
            raise

    def read(self, count: int) -> bytes:
        """Fewer bytes only at the end."""
        return self._stream.read(count)

    def readline(self, limit: int = -1) -> bytes:
        return self._stream.readline(limit)

    def skip_to(self, position: int) -> None:
        """Continue at a byte of a file that is not compressed."""
        assert not self.is_compressed
        self._stream.seek(position)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far, perhaps ahead."""
        return self._file.count

    @property
    def file_checksum(self) -> str:
        """xxh3_64 of these bytes."""
        return self._file.hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def open_content(path: str, any_text: bool = False, buffer: int = BUFFER) -> Content:
    """Open a file; ``any_text`` as in :class:`Input`. ``buffer`` bytes are read at a time.

    Raises :class:`NotTextError` if it is something other than text for training, or compressed in an unknown format,
    and :class:`DataError` if its start is damaged.
    """
    try:
        return Content(path, any_text, buffer)
    except READING_ERRORS as error:
        raise cannot_read_on(path, 0, error) from None


def cannot_read_on(path: str, line: int, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno:  # from the system, not from a library
        place = f" beyond line {line:,}" if line else ""
        return DataError(f"cannot read {path}{place}: {system_reason(error)}")
    fault = "its compressed data ends before the end marker" if isinstance(error, EOFError) else str(error)
    if "dictionary" in fault.lower():  # Zstandard's, without which nobody can read it
        return DataError(
            f"{path} was compressed with a dictionary of its own, or its start is damaged\n"
            "  decompress it with that dictionary: zstd -d -D DICTIONARY."
        )
    return DataError(
        f"{path} cannot be read beyond line {line:,}: {fault}\n"
        "  the file is cut short or damaged (disk full? copy interrupted?). Copy or create it again."
    )


class _Summing(io.RawIOBase):
    """A file that counts and checksums what is read from it."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.is_regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        self.hash = xxhash.xxh3_64()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        count = self._file.readinto(view) or 0
        self.hash.update(view[:count])
        self.count += count
        return count

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def close(self) -> None:
        self._file.close()
        super().close()


def _decompressed(path: str, file: "io.BufferedReader[_Summing]") -> io.RawIOBase | None:
    """The content of a compressed file; None if it is not compressed."""
    start = file.peek(8)
    if len(start) < 4 and path.lower().endswith((*COMPRESSED_ENDINGS, ".parquet")):
        raise DataError(
            f"{path} has only {len(start)} bytes, too few for the format that its name implies\n"
            "  the file is cut short (disk full? copy interrupted?). Copy or create it again."
        )
    if start.startswith(GZIP_MAGIC):
        return cast(io.RawIOBase, gzip.GzipFile(fileobj=file))  # a BufferedIOBase, which serves as well
    if start.startswith((ZSTANDARD_MAGIC, *ZSTANDARD_SKIPPED)):
        return _ZstandardFile(file)
    return None


class _ZstandardFile(io.RawIOBase):
    """The content of a Zstandard file: its frames one after the other.

    The library's own reader mistakes a truncated file for a complete one.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = self._new_frame()
        self._content = memoryview(b"")
        """Decompressed, and not yet read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        # Fill the buffer even if frames are short: a file's kind is determined from the first call's result.
        target, filled = memoryview(buffer), 0
        while filled < len(target) and (self._content or self._decompress()):
            count = min(len(target) - filled, len(self._content))
            target[filled : filled + count] = self._content[:count]
            self._content = self._content[count:]
            filled += count
        return filled

    def _decompress(self) -> bool:
        """Whether there is more content."""
        while not self._content:
            if not (compressed := self._frame.unused_data or self._file.read(ZSTANDARD_INPUT)):
                if not self._frame.eof:
                    raise EOFError
                return False
            if self._frame.eof:
                self._frame = self._new_frame()
            self._content = memoryview(self._frame.decompress(compressed))
        return True

    @staticmethod
    def _new_frame() -> "zstandard.ZstdDecompressionObj":
        return zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW).decompressobj()
