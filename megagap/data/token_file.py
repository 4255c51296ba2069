"""What every format of token files offers: sequences of tokens, and which of them make a document."""

import importlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from megagap.data.format import BLOCK
from megagap.errors import DataError
from megagap.terminal.programs import typed
from megagap.token_formats import format_of, pair_prefix


def open_tokens(prefix: str | Path) -> "TokenFile":
    """The token file of this prefix, in whichever format it is. Raises :class:`DataError` if it cannot be read."""
    prefix = pair_prefix(prefix)
    module, _, name = format_of(prefix).reader.partition(":")
    reader: Callable[[str], TokenFile] = getattr(importlib.import_module(module), name)
    return reader(prefix)


class TokenFile(Sequence[NDArray[Any]]):
    """A row of tokens cut into sequences: ``ds[i]`` is one. A format's reader sets the attributes when it opens."""

    prefix: str
    index_path: str
    tokens_path: str
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    """[S] Tokens of each sequence."""
    pointers: NDArray[np.int64]
    """[S] Byte of :attr:`tokens` at which each sequence starts."""
    document_indices: NDArray[np.int64]
    """[documents + 1] First sequence of each document; the last entry is S."""
    tokens: NDArray[Any]
    """[token_count] All of them, memory-mapped."""

    def __init__(self, prefix: str, index: str, tokens: str) -> None:
        """``index``, ``tokens``: the endings of the two files."""
        self.prefix, self.index_path, self.tokens_path = prefix, prefix + index, prefix + tokens

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> NDArray[Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[NDArray[Any]]: ...

    def __getitem__(self, index: int | slice) -> NDArray[Any] | list[NDArray[Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, remainder = divmod(int(self.pointers[index]), self.dtype.itemsize)
        stop = start + int(self.lengths[index])
        if remainder or not 0 <= start <= stop <= len(self.tokens):
            raise DataError(
                f"{self.index_path} is damaged: sequence {index} should lie at tokens {start:,} to {stop:,} "
                f"of {len(self.tokens):,}\n  check the whole file with {typed('inspect')} PREFIX --verify."
            )
        return self.tokens[start:stop]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[i] for i in range(len(self)))

    @property
    def token_count(self) -> int:
        return len(self.tokens)

    @property
    def document_count(self) -> int:
        return len(self.document_indices) - 1

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of a document, all its sequences joined."""
        first, stop = int(self.document_indices[index]), int(self.document_indices[index + 1])
        return self[first] if stop == first + 1 else np.concatenate([self.tokens[:0], *self[first:stop]])

    def start_of(self, sequence: int) -> int:
        """Index in :attr:`tokens` of the sequence's first token; the end of the file for ``sequence == len(self)``."""
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self) else len(self.tokens)

    def sequences_between(self, start: int, stop: int) -> list[int]:
        """Numbers of the sequences that have a token in ``tokens[start:stop]``, start < stop, of a contiguous file."""
        assert 0 <= start < stop <= len(self.tokens), (start, stop)
        # bisect rather than searchsorted, which would copy the whole unaligned array to align it.
        first = bisect_right(self.pointers, start * self.dtype.itemsize) - 1
        sequences = []
        for sequence in range(first, len(self)):
            if self.start_of(sequence) >= stop:
                break
            if self.lengths[sequence]:
                sequences.append(sequence)
        return sequences

    def require_contiguous(self) -> None:
        """Check in one pass that the sequences follow each other in file order without gaps. Raises DataError."""
        for first in range(0, len(self), BLOCK):
            self.require_row(max(first - 1, 0), min(first + BLOCK, len(self)))

    def require_row(self, low: int, high: int) -> None:
        """Raises :class:`DataError` unless sequences [low, high) follow each other, the first of all from byte 0."""
        if low >= high:
            return
        lengths, pointers = self.lengths[low:high].astype(np.int64), self.pointers[low:high]
        begin = int(pointers[0]) if low else 0
        ends = begin + np.cumsum(lengths) * self.dtype.itemsize
        starts = np.concatenate(([begin], ends[:-1]))
        wrong = np.flatnonzero((lengths < 0) | (pointers != starts))
        if wrong.size:
            i = int(wrong[0])
            raise DataError(
                f"{self.index_path}: sequence {low + i} has length {lengths[i]} and starts at byte {pointers[i]:,}, "
                f"but the one before ends at byte {starts[i]:,}\n"
                "  the index is damaged or not in file order. Preprocess the text again."
            )

    def verify(self, vocab_size: int | None = None) -> None:
        """A full pass over both files; with ``vocab_size``, every token must be below it. Raises DataError."""
        self.require_contiguous()
        for first in range(0, len(self.document_indices), BLOCK):
            indices = self.document_indices[first : first + BLOCK + 1]
            wrong = np.flatnonzero(np.diff(indices) < 0)
            if wrong.size:
                raise DataError(f"{self.index_path} is damaged: document {first + int(wrong[0])} has no end")
        if vocab_size is None:
            return
        for first in range(0, len(self.tokens), BLOCK):
            tokens = self.tokens[first : first + BLOCK]
            wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
            if wrong.size:
                at = first + int(wrong[0])
                sequence = self.sequences_between(at, at + 1)[0]
                raise DataError(
                    f"{self.tokens_path}: token id {self.tokens[at]} in document {sequence} at position "
                    f"{at - self.start_of(sequence)} is outside the vocabulary of {vocab_size:,}\n"
                    "  the file was made with another tokenizer."
                )
