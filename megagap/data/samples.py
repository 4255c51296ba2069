"""Training samples, read from token files: pure functions of (seed, sample number).

Training sample n comes from the source that the mixture of its phase draws for n, and is that source's k-th sample in
the shuffled order, k being how often the source was drawn before, in whatever phase. Ranks, workers and the length of
the run have no influence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megagap.data.agreement import Ids
from megagap.data.identity import Identity
from megagap.data.megatron import MegatronOrder
from megagap.data.shuffled import Draws, Place, ShuffledOrder
from megagap.data.skipping import SampleNumbers
from megagap.data.sources import TRAINING, TokenSource, positions_in
from megagap.errors import DataError
from megagap.timeline import Source, Timeline


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
    files: list[str]
    """Prefixes of the token files with a token in it."""


class Order(Protocol):
    """Where samples come from, by global number."""

    def sources(self, start: int, stop: int) -> NDArray[np.int64]: ...

    def drawn(self, n: int) -> list[int]: ...

    def place(self, source: int, k: int) -> Place: ...

    def progress(self, source: int, k: int) -> tuple[int, int]: ...


class TrainingData:
    """The sequence of training samples given by ``timeline`` and ``seed``, without the numbers in ``skip``.

    A phase has as many samples as its steps, not counting skipped ones: positions are counted, numbers identify
    samples. ``megatron``: in Megatron's order, planned for the run's steps.
    The order within a source depends on its name, not on its path; the mixture on weights and order of the sources.
    """

    def __init__(
        self,
        timeline: Timeline,
        seed: int,
        split: str = "100,0,0",
        vocab_size: int | None = None,
        skip: Sequence[tuple[int, int]] = (),
        *,
        megatron: bool = False,
    ) -> None:
        self.timeline, self.seed, self.numbers = timeline, seed, SampleNumbers(skip)
        self.ids: Ids | None = None
        """What their tokenizer declares about the ids, if known."""
        phases = timeline.phases
        named: dict[str, Source] = {}
        for phase in phases:
            require_distinct_names(phase.sources)
            for source in phase.sources:
                if named.setdefault(source.name, source).prefixes != source.prefixes:
                    raise DataError(
                        f"source {source.name} is not the same in all phases: {', '.join(source.prefixes)} in "
                        f"phase {phase.name}\n  give different data different names."
                    )
        self.sources = [TokenSource(source, split, TRAINING, vocab_size) for source in named.values()]
        index = {name: i for i, name in enumerate(named)}
        for phase in phases:
            for source in phase.sources:
                self.sources[index[source.name]].require(phase.sequence_length)
        self.order: Order
        if megatron:
            (phase,) = phases
            assert timeline.steps is not None, "Megatron's order depends on the length of the run"
            planned = timeline.at(timeline.steps).consumed_samples
            weights = [source.weight for source in phase.sources]
            drawn = self.numbers.number(planned - 1) + 1
            self.order = MegatronOrder(self.sources, weights, planned, phase.sequence_length, seed, drawn)
        else:
            starts = [timeline.at(timeline.first_step(phase)).first_sample for phase in phases]
            draws = [
                Draws(
                    self.numbers.number(position) if position else 0,
                    phase.sequence_length,
                    [index[source.name] for source in phase.sources],
                    [source.weight for source in phase.sources],
                )
                for position, phase in zip(starts, phases, strict=True)
            ]
            self.order = ShuffledOrder(draws, list(named), [source.token_count for source in self.sources], seed)

    @property
    def names(self) -> list[str]:
        """Names of the sources of all phases, in the order of their first appearance."""
        return [source.source.name for source in self.sources]

    def sample(self, position: int) -> Sample:
        """The sample at ``position`` in training order, with its provenance."""
        number, i, place = next(self._places(position, position + 1))
        source = self.sources[i]
        documents = {document: None for stretch in place.stretches for document in source.documents(*stretch)}
        files = {file: None for stretch in place.stretches for file in source.files(*stretch)}
        return Sample(number, source.source.name, list(documents), self._read(i, place), list(files))

    def tokens(self, position: int) -> NDArray[np.int64]:
        """The tokens of the sample at ``position``, int64 [s + 1]."""
        tokens: NDArray[np.int64] = self.batch(position, 1)[0]
        return tokens

    def batch(self, first: int, count: int) -> NDArray[np.int64]:
        """The tokens of the samples at positions ``first … first + count - 1``, int64 [count, s + 1]."""
        return np.stack([self._read(i, place) for _, i, place in self._places(first, first + count)])

    def read(
        self, first: int, count: int, *, with_positions: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
        """The training data at positions ``first … first + count - 1``.

        Tokens, int64 [count, s + 1]; each sample's index into :attr:`sources`, int64 [count]; and if asked for how far
        each token lies behind its document's start, or the sample's, int64 [count, s + 1]. Raises :class:`DataError` if
        a file that they come from was rebuilt since it was opened.
        """
        places = list(self._places(first, first + count))
        stretches: dict[int, list[tuple[int, int]]] = {}
        for _, i, place in places:
            stretches.setdefault(i, []).extend(place.stretches)
        self._require_unchanged(stretches)  # reading a truncated memory-mapped file kills the process
        samples = [self._read_documents(i, place) for _, i, place in places]
        self._require_unchanged(stretches)
        tokens = np.stack([sample for sample, _ in samples])
        positions = positions_in([ends for _, ends in samples], tokens.shape[1]) if with_positions else None
        return tokens, np.array([i for _, i, _ in places], np.int64), positions

    def source_indices(self, first: int, count: int) -> NDArray[np.int64]:
        """The source of each of these samples, as an index into :attr:`sources`, int64 [count]."""
        return np.concatenate([self.order.sources(*run) for run in self.numbers.runs(first, first + count)])

    def drawn(self, position: int) -> list[int]:
        """How many samples of each source lie before the sample at ``position``, skipped ones included."""
        return self.order.drawn(self.numbers.number(position))

    def epochs(self, position: int) -> list[int]:
        """The epoch, from 0, that each source is in before the sample at ``position``: that of its last sample."""
        return [self.order.progress(i, max(k - 1, 0))[0] for i, k in enumerate(self.drawn(position))]

    def identities(self) -> dict[str, list[Identity]]:
        """By source: the identities of its shards, which detect rebuilt ones."""
        return {source.source.name: source.identities() for source in self.sources}

    def _places(self, first: int, last: int) -> Iterator[tuple[int, int, Place]]:
        """Number, index of the source and place of the samples at positions ``first … last - 1``."""
        for start, stop in self.numbers.runs(first, last):
            drawn = self.order.drawn(start)
            for number, i in enumerate(self.order.sources(start, stop).tolist(), start):
                yield number, i, self.order.place(i, drawn[i])
                drawn[i] += 1

    def _require_unchanged(self, touched: dict[int, list[tuple[int, int]]]) -> None:
        for i, stretches in touched.items():
            self.sources[i].require_unchanged(stretches)

    def _read(self, source: int, place: Place) -> NDArray[np.int64]:
        return self._read_documents(source, place)[0]

    def _read_documents(self, source: int, place: Place) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A sample's tokens, and where its documents end; where stretches meet, one ends."""
        parts = [self.sources[source].read_documents(*stretch) for stretch in place.stretches]
        if len(parts) == 1:
            return parts[0]
        starts = accumulate((len(tokens) for tokens, _ in parts[:-1]), initial=0)
        ends = [start + ends for start, (_, ends) in zip(starts, parts, strict=True)]
        return np.concatenate([tokens for tokens, _ in parts]), np.concatenate(ends)


def require_distinct_names(sources: Sequence[Source]) -> None:
    """Raises :class:`DataError` if two sources have the same name."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are named {name}: give each a name of its own with name = …")
