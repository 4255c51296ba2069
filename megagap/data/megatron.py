"""Megatron's order of samples, index for index, for runs that move between the two systems.

Verified against megatron-core. Unlike the shuffled order it changes with the planned number of samples, and what it
needs grows with the data: 8 bytes per document, 12 per document and epoch, 4 per sample, 2 per sample of a mixture.
Nothing is cached: a cumulative sum and a binary search replace Megatron's index files.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from megagap.data.shuffled import Place
from megagap.data.sources import TokenSource
from megagap.errors import DataError

SURPLUS = 0.005
"""Megatron builds each source of a mixture for so many more samples than it plans to draw."""

LAST_EPOCH_SHARE = 0.80
"""A last epoch of which less than this is needed is shuffled separately, so that the earlier ones are read whole."""

COUNTED_EVERY = 1 << 14
"""Samples of a mixture between two stored counts."""


class DocumentShuffle:
    """Megatron's order of the documents and samples of one source, whose part of the split has these ``lengths``."""

    def __init__(self, lengths: NDArray[np.int64], samples: int, sequence_length: int, seed: int) -> None:
        """``samples`` is what it is built for; at least as many can be asked for."""
        self.length = sequence_length
        self.tokens = int(lengths.sum())
        self._starts = np.cumsum(lengths) - lengths
        epochs = max(1, -(-(samples * sequence_length + 1) // self.tokens))
        total = (epochs * self.tokens - 1) // sequence_length
        earlier = ((epochs - 1) * self.tokens - 1) // sequence_length
        one = (self.tokens - 1) // sequence_length
        separate = epochs > 1 and samples - earlier < int(LAST_EPOCH_SHARE * one)
        draw = np.random.RandomState(seed)
        documents = []
        for count in (epochs - 1, 1) if separate else (epochs,):
            # Whole arrays in this order: epoch after epoch, then all shuffled in one.
            index = np.tile(np.arange(len(lengths), dtype=np.int32), count)
            draw.shuffle(index)
            documents.append(index)
        self._documents = np.concatenate(documents)
        self._ends = np.cumsum(lengths[self._documents])
        numbers = []
        for low, high in ((0, earlier), (earlier, total)) if separate else ((0, total),):
            part = np.arange(low, high, dtype=np.uint32 if total < 2**32 - 1 else np.int64)
            draw.shuffle(part)
            numbers.append(part)
        self._numbers = np.concatenate(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def place(self, k: int) -> Place:
        """Where sample k lies, document by document."""
        at = int(self._numbers[k]) * self.length
        stop = at + self.length + 1
        epoch = at // self.tokens
        i = int(np.searchsorted(self._ends, at, side="right"))
        stretches = []
        while at < stop:
            end, document = int(self._ends[i]), self._documents[i]
            begin = int(self._starts[document])
            begin += at - (int(self._ends[i - 1]) if i else 0)
            count = min(stop, end) - at
            if count:
                stretches.append((begin, begin + count))
            at, i = at + count, i + 1
        return Place(epoch, stretches)


class MegatronOrder:
    """A run of ``planned`` samples; of one source alone, or of a mixture.

    With ``drawn`` samples, where the run skips some: those beyond the plan come from its surplus.
    Raises :class:`DataError` if that is too small.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        weights: Sequence[float],
        planned: int,
        sequence_length: int,
        seed: int,
        drawn: int = 0,
    ) -> None:
        shares = np.array(weights, np.float64) / np.sum(np.array(weights, np.float64))
        wanted = [ceil(planned * share) for share in shares] if len(sources) > 1 else [planned]
        built = [ceil(count * (1 + SURPLUS)) for count in wanted] if len(sources) > 1 else wanted
        self.shuffles = [
            DocumentShuffle(source.document_lengths(), count, sequence_length, seed)
            for source, count in zip(sources, built, strict=True)
        ]
        # One more than all sources have shows that the surplus is too small.
        self.planned = max(sum(wanted), min(drawn, sum(map(len, self.shuffles)) + 1))
        self._choice = blend(shares.tolist(), self.planned) if len(sources) > 1 else np.zeros(self.planned, np.int16)
        counts = [np.zeros(len(sources), np.int64)]
        for start in range(0, self.planned, COUNTED_EVERY):
            here = np.bincount(self._choice[start : start + COUNTED_EVERY], minlength=len(sources))
            counts.append(counts[-1] + here)
        self._counts = counts
        for source, count, shuffle in zip(sources, self.drawn(drawn), self.shuffles, strict=True):
            if count > len(shuffle):
                raise DataError(
                    f"train.skip_samples: without what is left out, the run needs at least {count:,} samples of "
                    f"source {source.source.name}, but Megatron's order for train.steps has {len(shuffle):,}\n"
                    "  skip fewer samples."
                )
        self._sources = sources

    def sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """The source of each sample ``start … stop - 1``, int64 [stop - start]."""
        if stop > self.planned:
            raise DataError(
                f'data.order = "megatron" plans {self.planned:,} samples, and number {stop - 1:,} is beyond them\n'
                "  it holds train.steps × train.global_batch_size, and what train.skip_samples leaves out."
            )
        return self._choice[start:stop].astype(np.int64)

    def drawn(self, n: int) -> list[int]:
        """How many of the samples before number n come from each source."""
        block, rest = divmod(min(n, self.planned), COUNTED_EVERY)
        start = block * COUNTED_EVERY
        here = np.bincount(self._choice[start : start + rest], minlength=len(self.shuffles))
        return (self._counts[block] + here).tolist()

    def place(self, source: int, k: int) -> Place:
        """Where the k-th sample of a source lies."""
        if k >= len(self.shuffles[source]):
            raise DataError(
                f"source {self._sources[source].source.name} has no sample {k:,} in Megatron's order, which was made "
                f"for {len(self.shuffles[source]):,}\n  Megatron's surplus of 0.5 % does not cover this mixture."
            )
        return self.shuffles[source].place(k)

    def progress(self, source: int, k: int) -> tuple[int, int]:
        """The epoch that k samples reach, and the tokens read of it: epochs are mixed in this order."""
        shuffle = self.shuffles[source]
        return divmod(k * shuffle.length, shuffle.tokens)


def blend(shares: Sequence[float], samples: int) -> NDArray[np.int16]:
    """At each step the source that is furthest behind its share gives the next sample; ties to the lowest."""
    drawn = [0] * len(shares)
    choice = np.empty(samples, np.int16)
    for t in range(samples):
        at = max(t, 1)
        errors = [share * at - count for share, count in zip(shares, drawn, strict=True)]
        i = errors.index(max(errors))
        choice[t] = i
        drawn[i] += 1
    return choice
