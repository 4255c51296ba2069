"""``PREFIX.origins``: for each document of a pair, the number of the input record that it was made from.

The records of a pair's inputs (lines of JSON lines, rows of Parquet files, whole plain texts) are numbered from 0, over
all inputs in the order of the manifest, which says how many each has. Documents mostly follow each other as their
records do, so for each block of 256 documents the map holds the smallest of ``record - place in the block``, and for
each document the excess over it, in as many bits as the largest excess needs: none where no record was left out, about
log2(records) where documents were shuffled.

The file, little-endian: ``MGORIGIN``; u32 version = 1; u32 documents of a block = 256; u64 number of documents; for
each block an i64, that smallest value, and a u64, the byte of the file at which its bits start; then the bits of all
blocks, each 256 × width long, from the lowest bit of the first byte on. A block's width follows from where the next one
starts.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megagap.errors import DataError
from megagap.files import reading, require_regular

ENDING = ".origins"
MAGIC = b"MGORIGIN"
VERSION = 1
BLOCK = 256
HEADER = struct.Struct("<8sIIQ")
HEAD = np.dtype([("smallest", "<i8"), ("start", "<u8")])
"""Of a block."""
BLOCKS_AT_A_TIME = 1 << 12
"""Whose documents are in memory."""


def write_origin_map(path: str | Path, numbers: Iterable[NDArray[np.int64]], documents: int) -> None:
    """Write the map of ``documents`` record numbers, which come in arrays of any lengths, and sync it.

    Memory does not grow with their number. May raise OSError.
    """
    blocks = -(-documents // BLOCK)
    start = HEADER.size + blocks * HEAD.itemsize
    done = 0
    with open(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, BLOCK, documents))
        for part in _in_blocks(numbers):
            heads, bits = _encoded(part, start)
            file.seek(HEADER.size + done * HEAD.itemsize)
            file.write(heads.tobytes())
            file.seek(start)
            file.write(bits)
            start, done = start + len(bits), done + len(heads)
        assert done == blocks, (done, documents)
        file.flush()
        os.fsync(file.fileno())


def _in_blocks(numbers: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """[blocks, BLOCK] The same numbers; the last block is filled up as if documents went on without a gap."""
    size = BLOCK * BLOCKS_AT_A_TIME
    held = np.zeros(0, np.int64)
    for part in numbers:
        held = np.concatenate((held, part))
        for begin in range(0, len(held) - size + 1, size):
            yield held[begin : begin + size].reshape(-1, BLOCK)
        held = held[len(held) // size * size :]
    if len(held):
        missing = -len(held) % BLOCK
        yield np.concatenate((held, held[-1] + 1 + np.arange(missing))).reshape(-1, BLOCK)


def _encoded(numbers: NDArray[np.int64], start: int) -> tuple[NDArray[Any], bytes]:
    """The heads of blocks [blocks, BLOCK] of numbers whose bits start at ``start``, and these bits."""
    excess = numbers - np.arange(BLOCK)
    heads = np.zeros(len(numbers), HEAD)
    heads["smallest"] = excess.min(1)
    excess -= heads["smallest"][:, None]
    widths = [int(largest).bit_length() for largest in excess.max(1)]
    parts = []
    for i, width in enumerate(widths):
        heads["start"][i] = start
        bits = (excess[i][:, None] >> np.arange(width)).astype(np.uint8) & 1
        parts.append(np.packbits(bits, bitorder="little").tobytes())
        start += len(parts[-1])
    return heads, b"".join(parts)


class OriginMap:
    """The map of a pair, memory-mapped: a document's number is read without reading the others'.

    Raises :class:`DataError` if the file cannot be read, is not a map of ``documents`` documents, or is damaged.
    """

    def __init__(self, prefix: str, documents: int) -> None:
        self.path = f"{prefix}{ENDING}"
        with reading(self.path):
            require_regular(self.path)
            with open(self.path, "rb") as file:
                self._data = _mapped(file)
        known = len(self._data) >= HEADER.size and HEADER.unpack_from(self._data)
        if not known or known[:3] != (MAGIC, VERSION, BLOCK):
            raise DataError(f"{self.path} is not a map of origins that this version can read")
        self.documents = documents
        if known[3] != documents:
            raise DataError(
                f"{self.path} is of {known[3]:,} documents, {prefix} has {documents:,}\n"
                "  they do not belong together. Preprocess the text again."
            )
        blocks = -(-self.documents // BLOCK)
        if len(self._data) < HEADER.size + blocks * HEAD.itemsize:
            raise self._damaged()
        self._heads = np.frombuffer(self._data, HEAD, blocks, HEADER.size)

    def __getitem__(self, document: int) -> int:
        """The number of the record that a document was made from."""
        assert 0 <= document < self.documents, document
        block, place = divmod(document, BLOCK)
        smallest, start, width = self._block(block)
        first, shift = divmod(place * width, 8)
        stop = -(-(shift + width) // 8)
        bits = int.from_bytes(self._data[start + first : start + first + stop], "little")
        return smallest + place + (bits >> shift & ((1 << width) - 1))

    def parts(self) -> Iterator[NDArray[np.int64]]:
        """All numbers in the order of the documents, block by block."""
        for block in range(len(self._heads)):
            smallest, start, width = self._block(block)
            bits = np.frombuffer(self._data, np.uint8, BLOCK // 8 * width, start)
            bits = np.unpackbits(bits, bitorder="little").reshape(BLOCK, width)
            numbers = smallest + np.arange(BLOCK) + (bits.astype(np.int64) << np.arange(width)).sum(1, dtype=np.int64)
            yield numbers[: self.documents - block * BLOCK]

    def _block(self, block: int) -> tuple[int, int, int]:
        """Its smallest value, the byte at which its bits start, and their width per document."""
        start = int(self._heads["start"][block])
        stop = int(self._heads["start"][block + 1]) if block + 1 < len(self._heads) else len(self._data)
        width, rest = divmod(stop - start, BLOCK // 8)
        if rest or not 0 <= width < 64 or not 0 <= start <= stop <= len(self._data):
            raise self._damaged()
        return int(self._heads["smallest"][block]), start, width

    def _damaged(self) -> DataError:
        return DataError(f"{self.path} is damaged\n  preprocess the text again, or remove it to do without.")


def _mapped(file: BinaryIO) -> bytes | mmap.mmap:
    size = os.fstat(file.fileno()).st_size
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
