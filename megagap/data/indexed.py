"""Token files in Megatron's byte format (:mod:`megagap.data.format`), memory-mapped, and how to write them."""

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from megagap.data.format import CODE_OF_DTYPE, DTYPE_OF_CODE, HEADER, MAGIC, VERSION, best_dtype
from megagap.data.partial import (
    CannotWriteError,
    PartialPair,
    lock_pair,
    publish_pair,
    remove_partial,
    write_index,
    writing_pair,
)
from megagap.data.token_file import TokenFile
from megagap.errors import DataError
from megagap.files import (
    allow_more_open_files,
    is_there,
    reading,
    require_fetched,
    require_regular,
)
from megagap.terminal.programs import typed
from megagap.token_formats import pair_prefix

__all__ = ["VERSION", "IndexedDataset", "IndexedDatasetWriter", "best_dtype"]


class IndexedDataset(TokenFile):
    """A ``.bin``/``.idx`` pair, memory-mapped: ``ds[i]`` is a read-only view of the file.

    It is given by its prefix, or by one of its files. While it is open, both files count as open files.

    Opening checks the header and the sizes of both files against each other, in constant time; :meth:`verify` looks
    at every entry. Raises :class:`DataError` for files that are missing, cut short, or of another format.
    """

    def __init__(self, prefix: str | Path) -> None:
        super().__init__(pair_prefix(prefix), ".idx", ".bin")
        index_size, tokens_size = _size_of(self.index_path), _size_of(self.tokens_path)
        for path in (self.index_path, self.tokens_path):
            require_fetched(path)
        if index_size < HEADER.size:
            raise DataError(
                f"{self.index_path} is {index_size:,} bytes, shorter than the {HEADER.size} bytes of a header\n"
                "  the file was cut short, or is not a token index. Preprocess the text again."
            )
        index = _map(self.index_path)
        magic, version, code, sequences, document_entries = HEADER.unpack_from(index)
        if magic != MAGIC:
            raise DataError(
                f"{self.index_path} is not a token index: it starts with {bytes(magic)!r} instead of {MAGIC!r}\n"
                f"  give the prefix of a .bin/.idx pair written by {typed('preprocess')} or by Megatron."
            )
        if version != VERSION:
            raise DataError(f"{self.index_path} is of format version {version}; only version {VERSION} can be read")
        if code not in DTYPE_OF_CODE:
            raise DataError(f"{self.index_path} has the unknown dtype code {code}; known: 1 to {len(DTYPE_OF_CODE)}")
        self.dtype = DTYPE_OF_CODE[code]
        promised = HEADER.size + sequences * (4 + 8) + document_entries * 8
        if index_size != promised:
            raise DataError(
                f"{self.index_path} is {index_size:,} bytes, its header promises {promised:,} "
                f"({sequences:,} sequences, {document_entries:,} document entries)\n"
                f"  {_likely_cause(index_size, promised)}"
            )
        # The arrays are unaligned, which numpy handles; views cost nothing, whatever the number of documents.
        pointers_at = HEADER.size + 4 * sequences
        self.lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
        self.pointers = np.frombuffer(index, "<i8", sequences, pointers_at)
        self.document_indices = np.frombuffer(index, "<i8", document_entries, pointers_at + 8 * sequences)
        if not document_entries or self.document_indices[0] != 0 or self.document_indices[-1] != sequences:
            ends = [int(self.document_indices[i]) for i in (0, -1)] if document_entries else []
            raise DataError(
                f"{self.index_path} is damaged: its document indices should run from 0 to {sequences:,}, not {ends}"
            )
        promised = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if tokens_size != promised:
            raise DataError(
                f"{self.tokens_path} is {tokens_size:,} bytes, its .idx promises {promised:,}\n"
                f"  {_likely_cause(tokens_size, promised)}"
            )
        if tokens_size % self.dtype.itemsize:
            raise DataError(
                f"{self.tokens_path} is {tokens_size:,} bytes, not a multiple of {self.dtype.itemsize} bytes per token"
            )
        self.tokens = np.frombuffer(_map(self.tokens_path) if tokens_size else b"", self.dtype)


def _size_of(path: str) -> int:
    if is_there(path):
        require_regular(path)
    with reading(path):
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            pass
    prefix = path[: -len(".bin")]
    there = [ending for ending in (".bin", ".idx") if os.path.exists(prefix + ending)]
    if there:
        hint = f"its {there[0]} exists: the pair is incomplete. Copy the other file too, or preprocess again."
    elif os.path.isdir(prefix):
        hint = f"{prefix} is a folder: give the prefix of a .bin/.idx pair in it."
    else:
        hint = f"give the prefix of a .bin/.idx pair that {typed('preprocess')} or Megatron wrote."
    raise DataError(f"{path} does not exist\n  {hint}")


def _map(path: str) -> mmap.mmap:
    with reading(path):
        try:
            return _map_once(path)
        except OSError as error:
            # A memory map keeps its file open, so many shards mean many open files.
            if error.errno != errno.EMFILE or not allow_more_open_files():
                raise
            return _map_once(path)


def _map_once(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _likely_cause(size: int, promised: int) -> str:
    if size < promised:
        return "the file was cut short (disk full? copy interrupted?). Copy it again, or preprocess the text again."
    return "the two files do not belong together, or the index is damaged. Preprocess the text again."


class IndexedDatasetWriter:
    """Writes a ``.bin``/``.idx`` pair; a context manager.

    The files appear under their names only when complete, the index last, on leaving the context without an exception.
    An existing pair is replaced, and what a killed writer left behind is removed. Memory does not grow with the number
    of documents. Raises :class:`DataError` for tokens that do not fit ``dtype``, and if the prefix has another writer.
    """

    def __init__(self, prefix: str | Path, dtype: DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            known = ", ".join(str(known) for known in CODE_OF_DTYPE)
            raise DataError(f"tokens cannot be stored as {self.dtype}; possible: {known}")
        self._lock = lock_pair(self.prefix)
        try:
            with writing_pair(self.prefix):
                remove_partial(self.prefix)
                self._pair = PartialPair(self.prefix, self.dtype)
        except BaseException:
            self._lock.release()
            raise
        self._ended = 0
        """Sequences whose document has ended."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._ended != self._pair.sequences:
                    raise DataError(f"{self.prefix}: the last document was not ended (end_document)")
                with writing_pair(self.prefix):
                    position = self._pair.sync()
                    self._pair.close()
                    write_index(self.prefix, self.dtype, position)
                    publish_pair(self.prefix)
        finally:
            self._pair.close()
            with suppress(CannotWriteError):
                remove_partial(self.prefix)
            self._lock.release()

    def add_document(self, tokens: ArrayLike) -> None:
        """Add a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Add a sequence to the document that :meth:`end_document` will end."""
        values = self._cast(np.asarray(tokens))
        with writing_pair(self.prefix):
            self._pair.add_tokens(values)
            self._pair.end_sequence()

    def end_document(self) -> None:
        """End a document with the sequences added since the last one ended."""
        with writing_pair(self.prefix):
            self._pair.end_document()
        self._ended = self._pair.sequences

    def _cast(self, given: NDArray[Any]) -> NDArray[Any]:
        if given.ndim != 1:
            raise DataError(f"a sequence of {self.prefix} must be one row of tokens, not of shape {given.shape}")
        if given.dtype == self.dtype or not given.size:
            return given.astype(self.dtype, copy=False)
        if given.dtype.kind in "iuf":
            with np.errstate(invalid="ignore"):
                values = given.astype(self.dtype)
            wrong = np.flatnonzero(values != given)
        else:
            wrong = np.zeros(1, np.intp)
        if wrong.size:
            at = int(wrong[0])
            raise DataError(
                f"token {given.flat[at]} at position {at} of document {self._pair.documents} does not fit "
                f"{self.dtype.name}, the type of {self.prefix}.bin\n  write with best_dtype(vocab_size)."
            )
        return values
