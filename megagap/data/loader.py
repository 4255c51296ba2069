"""Samples for training and validation, read from token files: pure functions of (seed, sample number).

Training sample n comes from the source that the mixture draws for n, and is that source's k-th window in the shuffled
order, k being how often the source was drawn before. Ranks, workers and the length of the run play no part.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from megagap.data.indexed import IndexedDataset
from megagap.data.mixture import Mixture
from megagap.data.order import split_ranges, split_shares, stable_key, window_count, window_of_sample
from megagap.data.skipping import SampleNumbers
from megagap.errors import DataError

TRAINING, VALIDATION, WHOLE = 0, 1, None
"""Which part of a source's split to read."""


@dataclass(frozen=True)
class Source:
    """A source of tokens; several prefixes are shards that are read one after the other."""

    name: str
    prefixes: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One training sample and where it came from."""

    sample: int
    """Its global number, from 0."""
    source: str
    documents: list[int]
    """The source's documents with a token in it, counted over all shards in order."""
    tokens: NDArray[np.int64]
    """[s + 1]"""


@dataclass(frozen=True)
class _Piece:
    """A stretch of a shard: its share of a split's tokens."""

    dataset: IndexedDataset
    first_document: int
    """Number within the source of the shard's document 0."""
    start: int
    """Index of the stretch's first token in the shard."""
    tokens: int


class TokenSource:
    """One part of a source's split as windows of ``sequence_length + 1`` tokens, overlapping by one.

    A document is a sequence of the token files. ``part`` is TRAINING, VALIDATION, or WHOLE for all documents whatever
    the split. With ``vocab_size``, reading a token outside it raises :class:`DataError`, as do damaged files and a part
    too small for one window.
    """

    def __init__(
        self, source: Source, sequence_length: int, split: str, part: int | None, vocab_size: int | None = None
    ) -> None:
        self.source = source
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        datasets = [IndexedDataset(prefix) for prefix in source.prefixes]
        self.document_count = sum(map(len, datasets))
        self.document_range = (
            (0, self.document_count) if part is None else split_ranges(split, self.document_count)[part]
        )
        self._pieces = list(self._cut(datasets))
        self._ends = list(accumulate(piece.tokens for piece in self._pieces))
        self.token_count = self._ends[-1] if self._ends else 0
        self.window_count = window_count(self.token_count, sequence_length)
        if not self.window_count:
            share = (
                "" if part is None else f' in its {("training", "validation", "test")[part]} part of split "{split}"'
            )
            start, stop = self.document_range
            raise DataError(
                f"source {source.name} has {self.token_count:,} tokens in {stop - start:,} documents{share}; "
                f"one sequence needs {sequence_length + 1:,}\n"
                f"  add text to {source.prefixes[0]}, change data.split, or lower train.sequence_length."
            )

    def _cut(self, datasets: Sequence[IndexedDataset]) -> Iterator[_Piece]:
        start, stop = self.document_range
        first = 0
        for dataset in datasets:
            if dataset.dtype.kind not in "iu":
                raise DataError(f"{dataset.index_path} holds {dataset.dtype.name} values, which are no token ids")
            dataset.require_contiguous()
            low, high = (min(max(bound - first, 0), len(dataset)) for bound in (start, stop))
            begin, end = dataset.start_of(low), dataset.start_of(high)
            if begin < end:
                yield _Piece(dataset, first, begin, end - begin)
            first += len(dataset)

    def tokens(self, window: int) -> NDArray[np.int64]:
        """The window's tokens, int64 [s + 1], a copy."""
        tokens = np.concatenate([piece.dataset.tokens[i:j] for piece, i, j in self._stretches(window)])
        if self.vocab_size is not None and (tokens.max() >= self.vocab_size or tokens.min() < 0):
            self._report_foreign_token(window)
        return tokens.astype(np.int64)

    def documents(self, window: int) -> list[int]:
        """The documents with a token in the window."""
        return [
            piece.first_document + document
            for piece, start, stop in self._stretches(window)
            for document in piece.dataset.sequences_between(start, stop)
        ]

    def _stretches(self, window: int) -> Iterator[tuple[_Piece, int, int]]:
        """Where the window's tokens lie: shard and token indices [start, stop) in it."""
        assert 0 <= window < self.window_count, (window, self.window_count)
        at, left = window * self.sequence_length, self.sequence_length + 1
        i = bisect_right(self._ends, at)
        while left:
            piece = self._pieces[i]
            offset = at - (self._ends[i] - piece.tokens)
            count = min(left, piece.tokens - offset)
            yield piece, piece.start + offset, piece.start + offset + count
            at, left, i = at + count, left - count, i + 1

    def _report_foreign_token(self, window: int) -> None:
        for piece, start, stop in self._stretches(window):
            tokens = piece.dataset.tokens[start:stop]
            foreign = np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))
            if foreign.size:
                at = start + int(foreign[0])
                document = piece.dataset.sequences_between(at, at + 1)[0]
                raise DataError(
                    f"token id {piece.dataset.tokens[at]} in source {self.source.name}, document "
                    f"{piece.first_document + document}, position {at - piece.dataset.start_of(document)} is outside "
                    f"the vocabulary of {self.vocab_size:,}\n"
                    f"  {piece.dataset.tokens_path} was made with another tokenizer, or model.vocab_size is too small."
                )


class TrainingData:
    """The endless series of training samples that ``sources`` and ``seed`` give, without the numbers in ``skip``.

    The order within a source depends on its name, not on its path; the mixture on weights and order of the sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        sequence_length: int,
        seed: int,
        split: str = "100,0,0",
        vocab_size: int | None = None,
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        _require_distinct_names(sources)
        self.sequence_length = sequence_length
        self.seed = seed
        self.numbers = SampleNumbers(skip)
        self.mixture = Mixture([source.weight for source in sources], stable_key("mixture", seed))
        self.sources = [TokenSource(source, sequence_length, split, TRAINING, vocab_size) for source in sources]

    def sample(self, position: int) -> Sample:
        """The sample at ``position`` in training order, with its provenance."""
        number, source, window = next(self._windows(position, position + 1))
        return Sample(number, source.source.name, source.documents(window), source.tokens(window))

    def tokens(self, position: int) -> NDArray[np.int64]:
        """The tokens of the sample at ``position``, int64 [s + 1]."""
        tokens: NDArray[np.int64] = self.batch(position, 1)[0]
        return tokens

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """The tokens of the samples at positions ``first … first + count - 1``, int64 [count, s + 1]."""
        return np.stack([source.tokens(window) for _, source, window in self._windows(first, first + count)])

    def source_indices(self, first: int, count: int) -> NDArray[np.int64]:
        """The source of each of these samples, as an index into :attr:`sources`, int64 [count]."""
        return np.concatenate([self.mixture.sources(*run) for run in self.numbers.runs(first, first + count)])

    def _windows(self, first: int, last: int) -> Iterator[tuple[int, TokenSource, int]]:
        """Number, source and window of the samples at positions ``first … last - 1``."""
        for start, stop in self.numbers.runs(first, last):
            drawn = self.mixture.counts(start)
            for number, i in enumerate(self.mixture.sources(start, stop), start):
                source = self.sources[i]
                yield number, source, window_of_sample(drawn[i], source.window_count, self.seed, source.source.name)
                drawn[i] += 1


class ValidationData:
    """For each source a fixed list of windows, spread evenly and in file order, at most ``samples`` of them.

    ``windows[name]`` is int64 [count]; :meth:`batch` reads some of them. Empty if there are no sources.
    """

    def __init__(self, sources: Sequence[TokenSource], samples: int) -> None:
        _require_distinct_names([source.source for source in sources])
        self.sources = {source.source.name: source for source in sources}
        self.windows: dict[str, NDArray[np.int64]] = {}
        for name, source in self.sources.items():
            count = min(samples, source.window_count)
            self.windows[name] = np.arange(count) * source.window_count // count

    def batch(self, name: str, first: int, count: int) -> NDArray[np.int64]:
        """Tokens of the source's windows ``first … first + count - 1`` of the list, int64 [count, s + 1]."""
        source, windows = self.sources[name], self.windows[name][first : first + count]
        batch = np.empty((len(windows), source.sequence_length + 1), np.int64)
        for row, window in zip(batch, windows, strict=True):
            row[:] = source.tokens(int(window))
        return batch


def open_validation(
    sources: Sequence[Source],
    validation: Sequence[Source],
    sequence_length: int,
    samples: int,
    split: str = "100,0,0",
    vocab_size: int | None = None,
) -> ValidationData:
    """All documents of ``validation`` if given, else the second part of the training sources' split, if it has one."""
    if validation:
        opened = [TokenSource(source, sequence_length, split, WHOLE, vocab_size) for source in validation]
    elif split_shares(split)[VALIDATION] > 0:
        opened = [TokenSource(source, sequence_length, split, VALIDATION, vocab_size) for source in sources]
    else:
        opened = []
    return ValidationData(opened, samples)


@dataclass(frozen=True)
class Batch:
    """One data rank's part of a step, in microbatches."""

    tokens: torch.Tensor
    """int64 [m, b, s + 1]"""
    sources: torch.Tensor
    """Index of each sequence's source, int64 [m, b]."""
    source_count: int

    def to(self, device: torch.device) -> "Batch":
        """On a GPU without waiting for it, from pinned memory."""
        tokens, sources = (part.pin_memory() if device.type == "cuda" else part for part in (self.tokens, self.sources))
        return Batch(tokens.to(device, non_blocking=True), sources.to(device, non_blocking=True), self.source_count)


class MicrobatchLoader:
    """Gives data-parallel rank ``dp_rank`` of ``dp_size`` its part of each step's samples, in microbatches.

    The rank's part is contiguous: the batch in rank order is the batch in sample order. ``global_batch_size`` must be
    a multiple of ``micro_batch_size * dp_size``.
    """

    def __init__(
        self, data: TrainingData, global_batch_size: int, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, (global_batch_size, micro_batch_size, dp_size)
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self.data = data
        self.micro_batch_size = micro_batch_size
        self.samples = global_batch_size // dp_size
        self.offset = dp_rank * self.samples

    def step(self, first_sample: int) -> Batch:
        """This rank's part of global samples ``first_sample … + global_batch_size``."""
        first = first_sample + self.offset
        tokens = torch.from_numpy(self.data.batch(first, self.samples))
        sources = torch.from_numpy(self.data.source_indices(first, self.samples))
        shape = (-1, self.micro_batch_size)
        return Batch(tokens.view(*shape, tokens.shape[-1]), sources.view(shape), len(self.data.sources))


def _require_distinct_names(sources: Sequence[Source]) -> None:
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are named {name}: tell them apart with name = …")
