"""Reading what a checkpoint stores, and comparing it with its checksums.

Bytes are read with ``pread`` before they are used through a mapping: where a disk fails, that is an error, while
touching the mapping would end the process (SIGBUS). Threads read and hash, both without Python's lock, ahead of who
uses the bytes, who finds them in the page cache: storage is read once, by one or by all ranks of a node.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
import xxhash

from megagap.checkpoint.index import Chunk, DamagedCheckpointError, Index, StoredFile, check_size, damaged
from megagap.errors import CheckpointError, system_reason

BLOCK = 4 * 2**20
"""Bytes that are read and hashed at a time: they stay in a core's cache in between."""

AHEAD = 4
"""Chunks per thread that are read before they are used."""


def reading_threads() -> int:
    """Threads that read at a time: one per core that this rank computes with, but enough to keep storage busy."""
    return min(max(torch.get_num_threads(), 4), 16)


class Opened:
    """A file of a checkpoint whose header is verified.

    Raises :class:`DamagedCheckpointError` if it is missing or damaged, and :class:`CheckpointError` if it cannot be
    opened.
    """

    def __init__(self, folder: Path, file: StoredFile) -> None:
        self._folder, self._file = folder, file
        check_size(folder, file)
        try:
            self._descriptor = os.open(folder / file.name, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / file.name}: {system_reason(error)}") from None
        try:
            self.verify(0, file.header_size, file.header_checksum, "header")
        except BaseException:
            self.close()
            raise

    def map(self) -> mmap.mmap:
        """Its bytes. The mapping ends with the last reference to it."""
        try:
            # Private and writable, never written: torch warns of read-only memory.
            return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"cannot read {self._folder / self._file.name}: {system_reason(error)}") from None

    def verify(self, begin: int, end: int, promised: str, what: str) -> None:
        """Read bytes ``[begin, end)``. Raises :class:`DamagedCheckpointError` unless their checksum is ``promised``."""
        place = f"{self._file.name}, bytes {begin:,} to {end:,} ({what})"
        state, buffer, position = xxhash.xxh3_64(), bytearray(min(BLOCK, end - begin)), begin
        while position < end:
            block = memoryview(buffer)[: end - position]
            try:
                count = os.preadv(self._descriptor, [block], position)
            except OSError as error:
                raise damaged(self._folder, f"{place}: {system_reason(error)}") from None
            if not count:
                raise damaged(self._folder, f"{place}: the file ends before")
            state.update(block[:count])
            position += count
        if state.hexdigest() != promised:
            raise damaged(self._folder, f"{place}: the checksum does not match")

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._descriptor)


def check_headers(folder: Path, index: Index) -> None:
    """What can be known of a checkpoint in a moment: its files are there, whole in size, and their headers right.

    Raises as :class:`Opened`.
    """
    with ThreadPoolExecutor(reading_threads()) as pool:
        for opened in pool.map(lambda file: Opened(folder, file), index.files):
            opened.close()


def read_verified(
    folder: Path, files: Mapping[str, StoredFile], chunks: Sequence[tuple[Chunk, str]]
) -> Iterator[tuple[Chunk, mmap.mmap]]:
    """Each chunk, in order, once its bytes are verified, and its file's. ``chunks`` of a file are neighbours, each
    with the name of its tensor.

    Raises as :class:`Opened`.
    """
    threads = reading_threads()
    opened: dict[str, Future[Opened]] = {}
    pending: deque[tuple[Chunk, Future[None]]] = deque()
    waiting = iter(chunks)
    mapped: tuple[str, mmap.mmap] | None = None

    def verify(file: Future[Opened], chunk: Chunk, tensor: str) -> None:
        file.result().verify(chunk.begin, chunk.end, chunk.checksum, tensor)

    with ExitStack() as stack:
        stack.callback(_close_all, opened)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(lambda: [future.cancel() for _, future in pending])  # first, then the threads end, then files
        while True:
            while len(pending) < AHEAD * threads and (following := next(waiting, None)) is not None:
                chunk, tensor = following
                if chunk.file not in opened:
                    # Before its chunks in the queue, so that no thread waits for what none has begun.
                    opened[chunk.file] = pool.submit(Opened, folder, files[chunk.file])
                pending.append((chunk, pool.submit(verify, opened[chunk.file], chunk, tensor)))
            if not pending:
                return
            chunk, verified = pending.popleft()
            verified.result()
            if mapped is None or mapped[0] != chunk.file:
                if mapped is not None:
                    _close(opened.pop(mapped[0]))
                mapped = chunk.file, opened[chunk.file].result().map()
            yield chunk, mapped[1]


def _close_all(opened: Mapping[str, "Future[Opened]"]) -> None:
    for file in opened.values():
        _close(file)


def _close(file: "Future[Opened]") -> None:
    if not file.cancel() and file.exception() is None:
        file.result().close()


@dataclass(frozen=True)
class Damage:
    """What of a checkpoint is not as it was written."""

    file: str
    begin: int
    end: int
    """Bytes ``[begin, end)`` of the file."""
    tensor: str | None
    """Kind and name of the tensor that has them; None for a header."""
    reason: str


def find_damage(
    folder: Path, index: Index, progress: Callable[[int], object] = lambda done: None
) -> tuple[Damage, ...]:
    """Read every byte of the files. ``progress`` is called with the bytes of each piece.

    Raises :class:`CheckpointError` if a file may not be read.
    """
    lock = Lock()

    def done(size: int) -> None:
        with lock:
            progress(size)

    chunks = _chunks_by_file(index)

    def of_file(file: StoredFile) -> list[Damage]:
        found = []
        try:
            opened = Opened(folder, file)
        except DamagedCheckpointError as error:
            done(file.size)
            return [Damage(file.name, 0, file.header_size, None, error.what)]
        done(file.header_size)
        try:
            for chunk, tensor in chunks[file.name]:
                try:
                    opened.verify(chunk.begin, chunk.end, chunk.checksum, tensor)
                except DamagedCheckpointError as error:
                    found.append(Damage(file.name, chunk.begin, chunk.end, tensor, error.what))
                done(chunk.end - chunk.begin)
        finally:
            opened.close()
        return found

    with ThreadPoolExecutor(reading_threads()) as pool:
        return tuple(damage for found in pool.map(of_file, index.files) for damage in found)


def verify_file(path: Path, index: Index, name: str) -> None:
    """Compare every byte of ``path`` with what the index says of the file ``name``. Raises as :class:`Opened`."""
    file = next(file for file in index.files if file.name == name)
    opened = Opened(path.parent, file.model_copy(update={"name": path.name}))
    try:
        for chunk, tensor in _chunks_by_file(index)[name]:
            opened.verify(chunk.begin, chunk.end, chunk.checksum, tensor)
    finally:
        opened.close()


def _chunks_by_file(index: Index) -> dict[str, list[tuple[Chunk, str]]]:
    """The chunks of each file as they lie in it, each with kind and name of its tensor."""
    chunks: dict[str, list[tuple[Chunk, str]]] = {file.name: [] for file in index.files}
    for tensor in index.tensors:
        for chunk in tensor.chunks:
            chunks[chunk.file].append((chunk, f"{tensor.kind} of {tensor.name}"))
    for of_file in chunks.values():
        of_file.sort(key=lambda each: each[0].begin)
    return chunks
