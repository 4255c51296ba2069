"""Files to be read, whole or in parts, and their content, decompressed. Which files: ``listing``."""

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

from megagap.data.kinds import COMPRESSED_ENDINGS, LOOKED_AT, NotTextError, kind_of
from megagap.errors import DataError, system_reason

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP_MAGIC = b"\x1f\x8b"
ZSTANDARD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTANDARD_SKIPPED = tuple(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16))
"""What a frame without content starts with; pzstd writes one before each other."""
ZSTANDARD_INPUT = 1 << 14
"""Compressed bytes handed over at a time; what comes of them is held in memory."""
ZSTANDARD_WINDOW = 1 << 31
"""Bytes that a file may ask to look back; the most that ``zstd --long=31`` writes."""
BUFFER = 1 << 18
GLANCE = 1 << 14
"""Bytes that are read of a file to see whether it can be read."""

READING_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What reading :class:`Content` raises where a file is cut short or damaged."""


@dataclass(frozen=True)
class Input:
    """A file, or of plain JSON lines the lines that start at bytes ``[start, stop)``."""

    path: str
    size: int | None
    """Bytes; None of a pipe, which can be read only once and in one go."""
    modified: int = 0
    """In ns, as the file system tells."""
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
        """Bytes that are to be read of it."""
        return 0 if self.size is None else (self.size if self.stop is None else self.stop) - self.start


def shard(inputs: Sequence[Input], index: int, count: int) -> list[Input]:
    """Part ``index`` of ``count``, from 0: all parts one after the other are the whole, each document once.

    The parts have about as many bytes. A plain JSON-lines file is cut between lines; others, which cannot be read from
    the middle, belong whole to the part in which they start. Raises :class:`DataError` for a pipe.
    """
    assert 0 <= index < count, (index, count)
    if pipe := next((file.path for file in inputs if file.size is None), None):
        raise DataError(f"{pipe} is no regular file: it cannot be shared out")
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


def lines_before(file: Input) -> int:
    """Lines of the file before those that are read. Reads all of them."""
    count, left = 0, file.start - 1
    with open_content(file.path) as content:
        while left > 0 and (block := content.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count + bool(file.start)


class Content:
    """What a file holds, decompressed; a context manager. Reading raises :data:`READING_ERRORS`."""

    def __init__(self, path: str, any_text: bool, buffer: int) -> None:
        self._file = _Summing(path)
        try:
            buffered = io.BufferedReader(self._file, buffer)
            decompressed = _decompressed(path, buffered)
            self.is_compressed = decompressed is not None
            self._stream = buffered if decompressed is None else io.BufferedReader(decompressed, buffer)
            # A pipe gives what has come so far, which tells less.
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
        """Go on at a byte of a file that is not compressed."""
        assert not self.is_compressed
        self._stream.seek(position)

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that were read so far, perhaps ahead."""
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

    Raises :class:`NotTextError` if it is something else than text for training, or compressed in a way that is not
    known, and :class:`DataError` if it is damaged already.
    """
    try:
        return Content(path, any_text, buffer)
    except READING_ERRORS as error:
        raise cannot_read_on(path, 0, error) from None


def cannot_read_on(path: str, line: int, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno:  # the system's, not that of a library
        place = f" beyond line {line:,}" if line else ""
        return DataError(f"cannot read {path}{place}: {system_reason(error)}")
    fault = "its compressed data ends before their end marker" if isinstance(error, EOFError) else str(error)
    return DataError(
        f"{path} cannot be read beyond line {line:,}: {fault}\n"
        "  the file is cut short or damaged (disk full? copy interrupted?). Copy or make it again."
    )


class _Summing(io.RawIOBase):
    """A file that counts and sums what is read of it."""

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
    """What a compressed file holds; None for one that is not compressed."""
    start = file.peek(8)
    if len(start) < 4 and path.lower().endswith((*COMPRESSED_ENDINGS, ".parquet")):
        raise DataError(
            f"{path} has only {len(start)} bytes, too few for what its name says\n"
            "  the file is cut short (disk full? copy interrupted?). Copy or make it again."
        )
    if start.startswith(GZIP_MAGIC):
        return cast(io.RawIOBase, gzip.GzipFile(fileobj=file))  # a BufferedIOBase, which serves as well
    if start.startswith((ZSTANDARD_MAGIC, *ZSTANDARD_SKIPPED)):
        return _ZstandardFile(file)
    return None


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
        # Filled, though frames be short, for a file's kind is told by what the first call gives.
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
