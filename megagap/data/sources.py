"""Sources: the contents of token files, as one row of tokens for each part of a split.

Opening costs the same whatever the number of documents. What an index says about documents is checked where they are
read: the sequences that contain the tokens must follow each other without gaps, in the order of the index and within
the part. So every token returned is where the index says; ``megagap inspect PREFIX --verify`` checks all.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from megagap.data.identity import Identity, Watch
from megagap.data.order import split_ranges, window_count
from megagap.data.token_file import TokenFile, open_tokens
from megagap.errors import DataError
from megagap.terminal.programs import typed
from megagap.timeline import Source
from megagap.token_formats import find_format, format_of, pair_prefix

TRAINING, VALIDATION, WHOLE = 0, 1, None
"""Which part of a source's split to read."""

CHECKED_AT_OPENING = 1024
"""Index entries that are checked on opening: at the start, and around the part's ends."""


@dataclass(frozen=True)
class _Piece:
    """A stretch of a shard: its share of a part's tokens."""

    dataset: TokenFile
    watch: Watch
    first_document: int
    """Number within the source of the shard's document 0."""
    low: int
    high: int
    """Its sequences are [low, high) of the shard."""
    start: int
    """Index of the stretch's first token in the shard."""
    tokens: int


def _open(source: Source, prefix: str) -> tuple[Watch, TokenFile]:
    """A shard. Raises :class:`DataError`; of one that is missing, with what the recipe says it is."""
    try:
        return Watch(prefix), open_tokens(prefix)
    except DataError as error:
        if not source.role or find_format(prefix) is not None:
            raise
        raise DataError(f"{error.args[0]}\n  it is source {source.name}: {source.role}.") from None


class TokenSource:
    """One part of a source's split as a row of :attr:`token_count` tokens, its documents end to end.

    A document is a sequence of the token files. ``part`` is TRAINING, VALIDATION, or WHOLE for all documents whatever
    the split. With ``vocab_size``, reading a token outside it raises :class:`DataError`, as damaged files do.
    """

    def __init__(self, source: Source, split: str, part: int | None, vocab_size: int | None = None) -> None:
        self.source, self.split, self.part, self.vocab_size = source, split, part, vocab_size
        if same := same_pairs(source.prefixes, source.prefixes):
            count = same.count(same[0]) + 1
            raise DataError(f"source {source.name} lists {same[0]} {count} times: an epoch would read it that often")
        opened = [_open(source, prefix) for prefix in source.prefixes]
        self._watches = [watch for watch, _ in opened]
        datasets = [dataset for _, dataset in opened]
        self._datasets = datasets
        self.document_count = sum(map(len, datasets))
        self.document_range = (
            (0, self.document_count) if part is None else split_ranges(split, self.document_count)[part]
        )
        self._pieces = list(self._cut(datasets))
        self._ends = list(accumulate(piece.tokens for piece in self._pieces))
        self.token_count = self._ends[-1] if self._ends else 0

    def _cut(self, datasets: Sequence[TokenFile]) -> Iterator[_Piece]:
        start, stop = self.document_range
        first = 0
        for dataset, watch in zip(datasets, self._watches, strict=True):
            if dataset.dtype.kind not in "iu":
                raise DataError(f"{dataset.index_path} contains {dataset.dtype.name} values, which are not token ids")
            low, high = (min(max(bound - first, 0), len(dataset)) for bound in (start, stop))
            for begin in {0, max(low - 1, 0), max(high - 1, 0)}:
                dataset.require_row(begin, min(begin + CHECKED_AT_OPENING, len(dataset)))
            begin, end = dataset.start_of(low), dataset.start_of(high)
            if low < high:
                yield _Piece(dataset, watch, first, low, high, begin, end - begin)
            first += len(dataset)

    def require(self, sequence_length: int) -> None:
        """Raises :class:`DataError` if the part is shorter than one sequence."""
        if window_count(self.token_count, sequence_length):
            return
        part = "" if self.part is None else f" in its {('training', 'validation', 'test')[self.part]} part of split "
        share = part and f'{part}"{self.split}"'
        start, stop = self.document_range
        documents = "1 document" if stop - start == 1 else f"{stop - start:,} documents"
        raise DataError(
            f"source {self.source.name} has {self.token_count:,} tokens in {documents}{share}; "
            f"one sequence needs {sequence_length + 1:,}\n"
            f"  add text to {self.source.prefixes[0]}, change data.split, or lower the sequence length."
        )

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the row, int64, a copy."""
        return self.read_documents(start, stop)[0]

    def read_documents(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens [start, stop), int64, a copy; and where each of their documents ends, counted from ``start``, int64.

        The last one ends at ``stop``, whether or not it continues.
        """
        parts, ends, at = [], [], 0
        for piece, first, last in self._stretches(start, stop):
            parts.append(piece.dataset.tokens[first:last])
            ends.append(at - first + _sequences_of(piece, first, last)[1])
            at += last - first
        tokens = parts[0].astype(np.int64) if len(parts) == 1 else np.concatenate(parts).astype(np.int64)
        if self.vocab_size is not None and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            self._report_token_out_of_range(start, stop)
        return tokens, ends[0] if len(ends) == 1 else np.concatenate(ends)

    def documents(self, start: int, stop: int) -> list[int]:
        """The source's documents with a token in [start, stop)."""
        documents = []
        for piece, first, last in self._stretches(start, stop):
            sequence, ends = _sequences_of(piece, first, last)
            lengths = np.diff(ends, prepend=first)
            documents += [piece.first_document + sequence + int(i) for i in np.flatnonzero(lengths > 0)]
        return documents

    def files(self, start: int, stop: int) -> list[str]:
        """Prefixes of the token files with a token in [start, stop)."""
        return [piece.dataset.prefix for piece, _, _ in self._stretches(start, stop)]

    def shard_of(self, document: int) -> tuple[str, int]:
        """The prefix of the shard that has a document of the source, and the document's number there."""
        for dataset in self._datasets:
            if document < len(dataset):
                break
            document -= len(dataset)
        return dataset.prefix, document

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document of the part, int64; a pass over the index that checks it."""
        for piece in self._pieces:
            piece.dataset.require_contiguous()
        parts = [piece.dataset.lengths[piece.low : piece.high].astype(np.int64) for piece in self._pieces]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def window_count(self, sequence_length: int) -> int:
        """Whole windows of ``sequence_length + 1`` tokens, overlapping by one."""
        return window_count(self.token_count, sequence_length)

    def window(self, index: int, sequence_length: int) -> NDArray[np.int64]:
        """The tokens of a window, int64 [sequence_length + 1]."""
        return self.read(index * sequence_length, (index + 1) * sequence_length + 1)

    def identities(self) -> list[Identity]:
        """The identity of each shard, which detects a rebuilt one."""
        return [watch.identity for watch in self._watches]

    def require_unchanged(self, stretches: Sequence[tuple[int, int]]) -> None:
        """Raises :class:`DataError` if a shard with a token in a stretch is no longer what was opened."""
        touched = {id(piece.watch): piece.watch for part in stretches for piece, _, _ in self._stretches(*part)}
        for watch in touched.values():
            watch.require_unchanged(self.source.name)

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[_Piece, int, int]]:
        """Where the tokens [start, stop) of the row lie: shard and token indices [first, last) in it."""
        assert 0 <= start < stop <= self.token_count, (start, stop, self.token_count)
        i = bisect_right(self._ends, start)
        while start < stop:
            piece = self._pieces[i]
            offset = start - (self._ends[i] - piece.tokens)
            count = min(stop - start, piece.tokens - offset)
            if count:
                yield piece, piece.start + offset, piece.start + offset + count
            start, i = start + count, i + 1

    def _report_token_out_of_range(self, start: int, stop: int) -> None:
        for piece, first, last in self._stretches(start, stop):
            tokens = piece.dataset.tokens[first:last]
            outside = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
            if outside.size:
                at = first + int(outside[0])
                document = piece.dataset.sequences_between(at, at + 1)[0]
                raise DataError(
                    f"token id {piece.dataset.tokens[at]} in source {self.source.name}, document "
                    f"{piece.first_document + document}, position {at - piece.dataset.start_of(document)} is outside "
                    f"the vocabulary of {self.vocab_size:,}\n"
                    f"  {piece.dataset.tokens_path} was made with another tokenizer, or model.vocab_size is too small."
                )


def same_pairs(prefixes: Sequence[str], others: Sequence[str]) -> list[str]:
    """Which of ``prefixes`` are also among ``others``, at another index if these are the same list; links are followed.

    Pairs that do not exist are left out: opening them says so.
    """
    files: dict[tuple[int, int], str] = {}
    found = []
    if others is not prefixes:
        files = {file: other for other in others if (file := _file_of(other))}
    for prefix in prefixes:
        file = _file_of(prefix)
        if file in files:
            found.append(prefix if prefix == files[file] else f"{prefix} (the same files as {files[file]})")
        elif file and others is prefixes:
            files[file] = prefix
    return found


def shared_pairs(sources: Sequence[Source]) -> list[str]:
    """Which sources have a pair in common, in words: each reads it independently, as if it were different text."""
    seen: dict[tuple[int, int], str] = {}
    found = []
    for source in sources:
        files = {file: prefix for prefix in source.prefixes if (file := _file_of(prefix))}
        found += [
            f"sources {seen[file]} and {source.name} read the same files: {prefix}; each reads them "
            "independently, so text repeats more often than the epochs of either say"
            for file, prefix in files.items()
            if file in seen
        ]
        seen |= {file: source.name for file in files if file not in seen}
    return found


def _file_of(prefix: str) -> tuple[int, int] | None:
    """Device and inode of the index: the same for all its names."""
    try:
        name = pair_prefix(prefix)
        status = os.stat(name + format_of(name).index)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def positions_in(ends: Sequence[NDArray[np.int64]], length: int) -> NDArray[np.int64]:
    """The position of each token in its document, int64 [n, length], for n samples whose documents end at ``ends``."""
    if not ends:
        return np.zeros((0, length), np.int64)
    stops = np.concatenate([i * length + stops for i, stops in enumerate(ends)])
    starts = np.concatenate(([0], stops[:-1]))
    return (np.arange(len(ends) * length) - np.repeat(starts, stops - starts)).reshape(-1, length)


def _sequences_of(piece: _Piece, first: int, last: int) -> tuple[int, NDArray[np.int64]]:
    """The first sequence with a token in [first, last) of the shard, and where it and those after it end, at most last.

    Raises :class:`DataError` if the index does not have these tokens contiguously.
    """
    dataset = piece.dataset
    item = dataset.dtype.itemsize
    # bisect rather than searchsorted, which would copy the whole unaligned array to align it.
    sequence = bisect_right(dataset.pointers, first * item, piece.low, piece.high) - 1
    count, most = 16, piece.high - sequence
    while True:
        stop = sequence + min(count, most)
        begin = max(sequence, 0)
        lengths = dataset.lengths[begin:stop].astype(np.int64)
        ends = dataset.pointers[begin:stop] // item + lengths
        if count >= most or (len(ends) and ends[-1] >= last):
            break
        count *= 4
    beyond = np.flatnonzero(ends >= last)
    starts = np.concatenate(([int(dataset.pointers[begin]) // item], ends[:-1]))
    in_a_row = (dataset.pointers[begin:stop] == starts * item) & (lengths >= 0)
    if sequence < piece.low or not beyond.size or starts[0] > first or not in_a_row[: beyond[0] + 1].all():
        raise DataError(
            f"{dataset.index_path}: the sequences around number {begin} do not contain tokens {first:,} to {last:,} "
            f"contiguously\n  the index is damaged or not in file order. Check it with {typed('inspect')} PREFIX "
            "--verify, and preprocess the text again."
        )
    return sequence, np.minimum(ends[: beyond[0] + 1], last)
