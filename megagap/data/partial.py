"""A ``.bin``/``.idx`` pair while it is being written: how it is locked, continued after a kill, and published.

``PREFIX.partial.*`` are its files: ``tokens`` (the ``.bin`` to be), ``lengths`` and ``documents`` (the parts of the
``.idx``, on disk so that memory does not grow with the number of documents), ``origins`` (record numbers, i64, for the
``map``, if they are known), ``index``, ``map``, ``manifest``, and what else the writer needs. They belong to the holder
of the lock on ``PREFIX.lock``.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from megagap.data.format import BLOCK, CODE_OF_DTYPE, HEADER, LONGEST_SEQUENCE, MAGIC, VERSION
from megagap.data.origin_map import ENDING, write_origin_map
from megagap.errors import DataError, system_reason
from megagap.files import Lock, LockedError, make_folder, partial_name, publish

PARTS = ("tokens", "lengths", "documents", "origins")
"""The files that a pair is written to; the last one only if it is known where its documents came from."""
COPIED_BYTES = 1 << 23
"""Bytes read at a time in a pass over a whole file."""


class CannotWriteError(DataError):
    """The system refuses to write a pair."""


def lock_pair(prefix: str) -> Lock:
    """The right to write the pair, until it is released.

    Raises :class:`DataError` naming the holder, and :class:`CannotWriteError` if the pair's files could not be
    written and renamed.
    """
    if not os.path.basename(prefix):
        raise DataError(f"the prefix {prefix!r} does not end in a file name")
    make_folder(Path(prefix).parent)
    try:
        lock = Lock(f"{prefix}.lock")
    except LockedError as error:
        raise DataError(
            f"{prefix} is being written by {error.holder}\n  wait for it to end, stop it, or choose another prefix."
        ) from None
    except (OSError, ValueError) as error:
        raise cannot_write(prefix, error) from error
    try:
        _require_publishable(prefix)
    except BaseException as error:
        with suppress(OSError):
            lock.release()
        if isinstance(error, OSError):
            raise cannot_write(prefix, error) from error
        raise
    return lock


def _require_publishable(prefix: str) -> None:
    """What would otherwise fail at the end fails now: writing, renaming, and replacing files with the final names.

    Raises OSError.
    """
    probe, renamed = partial_name(partial_path(prefix, "manifest")), partial_path(prefix, "probe")
    try:
        probe.write_bytes(bytes(1 << 12))
        os.replace(probe, renamed)
    finally:
        probe.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)
    folder = os.stat(renamed.parent)
    for ending in (".bin", ".idx", ENDING, ".json"):
        path = f"{prefix}{ending}"
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a folder", path)
        is_owner = os.geteuid() in (0, status.st_uid, folder.st_uid)
        if folder.st_mode & stat.S_ISVTX and not is_owner:
            raise PermissionError(errno.EPERM, "Belongs to another user, in a folder with the sticky bit", path)
        if stat.S_ISREG(status.st_mode):
            _require_mutable(path)


def _require_mutable(path: str) -> None:
    """A file without write permission can be replaced by renaming; an immutable one (chattr) cannot."""
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        if error.errno == errno.EPERM:
            raise


def cannot_write(prefix: str, error: OSError | ValueError) -> CannotWriteError:
    """What the system says, and what to do about it."""
    if not isinstance(error, OSError):
        return CannotWriteError(f"cannot write {prefix!r}: {error}")
    what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else f"{prefix}.bin and .idx"
    return CannotWriteError(f"cannot write {what}: {system_reason(error)}")


def partial_path(prefix: str, part: str) -> Path:
    """Matches neither ``*.bin`` nor ``*.idx`` nor ``*.json``."""
    return Path(f"{prefix}.partial.{part}")


@contextmanager
def making_pair(prefix: str) -> Iterator[None]:
    """For a block that makes a pair in one go: it has the lock, and what it leaves unfinished is removed.

    Raises :class:`DataError` if another process has the lock.
    """
    lock = lock_pair(prefix)
    try:
        remove_partial(prefix)
        yield
    finally:
        with suppress(CannotWriteError):
            remove_partial(prefix)
        lock.release()


@contextmanager
def writing_pair(prefix: str) -> Iterator[None]:
    """For a block that writes to a pair's files. Raises :class:`CannotWriteError` where the system refuses that."""
    try:
        yield
    except OSError as error:
        raise cannot_write(prefix, error) from error


def remove_partial(prefix: str) -> bool:
    """Remove what an earlier writer left unfinished; whether there was anything. The caller holds the lock.

    Raises :class:`CannotWriteError`.
    """
    path = Path(partial_path(prefix, ""))
    with writing_pair(prefix):
        found = [entry for entry in path.parent.iterdir() if entry.name.startswith(path.name)]
        for entry in found:
            entry.unlink()
    return bool(found)


@dataclass(frozen=True)
class Position:
    """How much of a pair has been written and synced."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0
    open: int = 0
    """Tokens, included in ``tokens``, of a sequence that has not ended."""
    checksum: str = ""
    """xxh3_64 of the tokens' bytes."""
    origins: str = ""
    """xxh3_64 of the numbers of the records that the documents came from; empty where these are not known."""


@dataclass(frozen=True)
class Written:
    """A file of a finished pair."""

    size: int
    checksum: str
    """xxh3_64, as 16 hexadecimal digits."""


class PartialPair:
    """Appends to the partial files of ``prefix``, whose lock the caller holds; from ``position`` on if one is given.

    ``stem`` begins the names of its parts, if a prefix has two. ``has_origins``: whether each document comes with the
    number of its record. Raises :class:`DataError` if the files do not contain what ``position`` says. All writing may
    raise OSError.
    """

    def __init__(
        self,
        prefix: str,
        dtype: np.dtype[Any],
        position: Position | None = None,
        stem: str = "",
        has_origins: bool = False,
    ) -> None:
        self.prefix = prefix
        self.has_origins = has_origins if position is None else bool(position.origins)
        parts = PARTS if self.has_origins else PARTS[:-1]
        self._paths = {part: partial_path(prefix, stem + part) for part in parts}
        self.dtype = dtype
        at = position or Position()
        self._tokens, self._sequences, self._documents, self._open = at.tokens, at.sequences, at.documents, at.open
        self._hash, self._origins_hash = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._files: dict[str, BinaryIO] = {}
        try:
            for part in self._paths:
                mode: Literal["wb", "r+b"] = "wb" if position is None else "r+b"
                self._files[part] = open(self._paths[part], mode, buffering=1 << 20)  # noqa: SIM115
            if position is not None:
                self._continue_at(position)
        except BaseException:
            self.close()
            raise

    def _continue_at(self, position: Position) -> None:
        sizes = (position.tokens * self.dtype.itemsize, position.sequences * 4, *[position.documents * 8] * 2)
        for file, size in zip(self._files.values(), sizes, strict=False):
            if file.seek(0, os.SEEK_END) < size:
                raise DataError(f"{file.name} is shorter than what was written to it: it cannot be resumed")
            file.truncate(size)
            file.seek(size)
        lengths = sum(int(np.frombuffer(b, "<i4").sum(dtype=np.int64)) for b in blocks_of(self._paths["lengths"]))
        if lengths != position.tokens - position.open:
            raise DataError(f"{self._files['lengths'].name} does not contain what was written to it: it is damaged")
        sums = [("tokens", self._hash, position.checksum), ("origins", self._origins_hash, position.origins)]
        for part, hash_, checksum in sums[: 1 + self.has_origins]:
            for block in blocks_of(self._paths[part]):
                hash_.update(block)
            if hash_.hexdigest() != checksum:
                raise DataError(f"{self._files[part].name} does not contain what was written to it: it is damaged")

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def open_tokens(self) -> int:
        """Tokens of the sequence that was begun and has not ended."""
        return self._open

    @property
    def sequences(self) -> int:
        return self._sequences

    @property
    def documents(self) -> int:
        return self._documents

    def add_tokens(self, tokens: NDArray[Any]) -> None:
        """Append to the sequence that :meth:`end_sequence` will end."""
        self._append(tokens)
        self._open += len(tokens)

    def end_sequence(self) -> None:
        self._end_sequences(np.array([self._open], np.int64))
        self._open = 0

    def end_document(self, origin: int | None = None) -> None:
        """End a document with the sequences added since the last one ended; ``origin``: the number of its record."""
        self._end_documents(np.array([self._sequences], np.int64))
        self.add_origins(None if origin is None else np.array([origin], np.int64))

    def add_documents(
        self, tokens: NDArray[Any], lengths: NDArray[np.int64], origins: NDArray[np.int64] | None = None
    ) -> None:
        """Documents of one sequence each, laid end to end; all lengths are positive or zero and sum to the tokens.

        ``origins``: the numbers of their records.
        """
        assert not self._open
        first = self._sequences
        self._append(tokens)
        self._end_sequences(lengths)
        self._end_documents(np.arange(first + 1, first + len(lengths) + 1))
        self.add_origins(origins)

    def add_origins(self, origins: NDArray[np.int64] | None) -> None:
        """The numbers of the records of documents that were added, in their order."""
        if self.has_origins:
            assert origins is not None
            data = origins.astype("<i8").tobytes()
            self._files["origins"].write(data)
            self._origins_hash.update(data)

    def add_pair(self, tokens: NDArray[Any], lengths: NDArray[np.int32], ends: NDArray[np.int64]) -> None:
        """All of another pair: its tokens, its sequences' lengths, and where its documents end in sequences. Their
        origins, if they are known, are added by :meth:`add_origins`."""
        first = self._sequences
        for start in range(0, len(tokens), COPIED_BYTES):
            self._append(tokens[start : start + COPIED_BYTES])
        for start in range(0, len(lengths), BLOCK):
            self._end_sequences(lengths[start : start + BLOCK].astype(np.int64))
        for start in range(0, len(ends), BLOCK):
            self._end_documents(ends[start : start + BLOCK] + first)

    def _append(self, tokens: NDArray[Any]) -> None:
        assert tokens.dtype == self.dtype, tokens.dtype
        data = np.ascontiguousarray(tokens).view(np.uint8).data
        self._files["tokens"].write(data)
        self._hash.update(data)
        self._tokens += len(tokens)

    def _end_sequences(self, lengths: NDArray[np.int64]) -> None:
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            raise DataError(
                f"a sequence of {int(lengths.max()):,} tokens is too long for {self.prefix}.idx: "
                f"at most {LONGEST_SEQUENCE:,}"
            )
        self._files["lengths"].write(lengths.astype("<i4").data)
        self._sequences += len(lengths)

    def _end_documents(self, ends: NDArray[np.int64]) -> None:
        self._files["documents"].write(ends.astype("<i8").data)
        self._documents += len(ends)

    def sync(self) -> Position:
        """Make what was written durable."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        origins = self._origins_hash.hexdigest() if self.has_origins else ""
        return Position(self._tokens, self._sequences, self._documents, self._open, self._hash.hexdigest(), origins)

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk would fail here again and hide the first error
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_index(prefix: str, dtype: np.dtype[Any], position: Position) -> dict[str, Written]:
    """Write the ``.idx`` and ``.origins`` to be of a partial pair that is closed; what all its files will be.

    There is no ``.origins`` if it is not known where the documents came from.
    """
    assert not position.open
    hash_ = xxhash.xxh3_64()
    with open(partial_path(prefix, "index"), "wb") as file:
        for block in _index(prefix, dtype, position):
            file.write(block)
            hash_.update(block)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    written = {
        ".bin": Written(position.tokens * dtype.itemsize, position.checksum),
        ".idx": Written(size, hash_.hexdigest()),
    }
    if position.origins:
        path, blocks = partial_path(prefix, "map"), blocks_of(partial_path(prefix, "origins"))
        write_origin_map(path, (np.frombuffer(block, "<i8") for block in blocks), position.documents)
        written[ENDING] = Written(path.stat().st_size, checksum_of(path))
    return written


def _index(prefix: str, dtype: np.dtype[Any], position: Position) -> Iterator[bytes]:
    yield HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], position.sequences, position.documents + 1)
    lengths = partial_path(prefix, "lengths")
    yield from blocks_of(lengths)
    start = 0
    for block in blocks_of(lengths):
        stops = start + np.cumsum(np.frombuffer(block, "<i4"), dtype=np.int64) * dtype.itemsize
        yield np.concatenate(([start], stops[:-1])).astype("<i8").tobytes()
        start = int(stops[-1])
    yield bytes(8)
    yield from blocks_of(partial_path(prefix, "documents"))


def publish_pair(prefix: str) -> None:
    """Give complete partial files their names; resumes if interrupted. The caller holds the lock."""
    if partial_path(prefix, "tokens").exists():
        # An old index, map or manifest must not remain beside new tokens if this is killed in between.
        for ending in (".idx", ENDING, ".json"):
            Path(prefix + ending).unlink(missing_ok=True)
        publish(partial_path(prefix, "tokens"), f"{prefix}.bin")
    for part, ending in (("index", ".idx"), ("map", ENDING), ("manifest", ".json")):
        if partial_path(prefix, part).exists():
            publish(partial_path(prefix, part), f"{prefix}{ending}")
    remove_partial(prefix)


def blocks_of(path: str | Path) -> Iterator[bytes]:
    """The bytes of a file, in blocks of whole entries."""
    with open(path, "rb") as file:
        while block := file.read(COPIED_BYTES):
            yield block


def checksum_of(path: str | Path) -> str:
    """xxh3_64 of a file, as 16 hexadecimal digits."""
    hash_ = xxhash.xxh3_64()
    for block in blocks_of(path):
        hash_.update(block)
    return hash_.hexdigest()
