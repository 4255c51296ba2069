"""The shuffled order: which tokens a source's k-th sample reads, for any k, whatever lengths the samples have.

A pass over a source is shared by a few thousand readers. Each has a stretch of its own and continues where it stopped,
one sequence per visit; rounds visit all of them, each round in an order of its own drawn from (seed, source, epoch,
round). So neighbouring samples come from far apart, and what a pass has yet to read stays in long stretches: when a
phase changes the sequence length, the readers simply continue with the new one. Tokens at the end of a reader's stretch
that do not fill a sequence are joined with those of other readers once all have read their whole sequences; what is
left then, less than one sequence, is not read in this pass. A source of fewer windows than readers is a permutation of
its windows.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megagap.data.mixture import Mixture
from megagap.data.order import permute, stable_key, window_count

READERS = 4096
"""Maximum number of readers of a source. More would mix better, and leave shorter stretches."""


@dataclass(frozen=True)
class Place:
    """Where a sample lies in its source."""

    epoch: int
    """From 0: how many times the whole source was read before."""
    stretches: list[tuple[int, int]]
    """Token indices [start, stop) in reading order, sequence_length + 1 in all."""


class _Pass:
    """The rest of a source, in stretches [low, high) of its inputs, read as sequences of one length."""

    def __init__(self, low: NDArray[np.int64], high: NDArray[np.int64], length: int) -> None:
        self.low, self.high, self.length = low, high, length
        self.visits = (high - low) // length
        """Whole sequences of each reader."""
        self._order = np.argsort(-self.visits, kind="stable")  # the readers of a round come first
        # Between two levels, rounds have the same number of readers.
        ends = np.unique(self.visits[self.visits > 0])
        self._rounds = np.concatenate(([0], ends[:-1])) if len(ends) else np.zeros(0, np.int64)
        self._readers = np.array([(self.visits > level).sum() for level in self._rounds], np.int64)
        self._before = np.concatenate(([0], np.cumsum((ends - self._rounds) * self._readers))).astype(np.int64)
        self.visited = int(self._before[-1])
        self._tails = low + self.visits * length
        self._tail_ends = np.cumsum(high - self._tails)
        self.sequences = self.visited + (int(self._tail_ends[-1]) if len(low) else 0) // length

    def stretches(self, k: int, key: tuple[object, ...]) -> list[tuple[int, int]]:
        """Where sequence k lies, its last target included."""
        assert 0 <= k < self.sequences, (k, self.sequences)
        if k >= self.visited:
            return self._leftover_sequence(k - self.visited)
        turn, index, order = self._round_of(k, key)
        start = int(self.low[order[index]]) + turn * self.length
        return [(start, start + self.length + 1)]

    def after(self, k: int, key: tuple[object, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What is left to read after k sequences."""
        assert 0 <= k < self.sequences, (k, self.sequences)
        if k >= self.visited:
            gleaned = (k - self.visited) * self.length
            sizes = self.high - self._tails
            read = np.clip(gleaned - (self._tail_ends - sizes), 0, sizes)
            return self._tails + read, self.high
        turn, index, order = self._round_of(k, key)
        done = np.minimum(self.visits, turn)
        done[order[:index]] += 1
        return self.low + done * self.length, self.high

    def _round_of(self, k: int, key: tuple[object, ...]) -> tuple[int, int, NDArray[np.int64]]:
        """Its round, its place in the round, and the readers in the order in which the round visits them."""
        level = int(np.searchsorted(self._before, k, side="right")) - 1
        readers = int(self._readers[level])
        turn, index = divmod(k - int(self._before[level]), readers)
        turn += int(self._rounds[level])
        return turn, index, self._order[_round_order((*key, turn), readers)]

    def _leftover_sequence(self, j: int) -> list[tuple[int, int]]:
        """The j-th sequence joined from what the readers left over, in their order."""
        at, stop = j * self.length, (j + 1) * self.length
        reader = int(np.searchsorted(self._tail_ends, at, side="right"))
        found: list[tuple[int, int]] = []
        while at < stop:
            end = int(self._tail_ends[reader])
            begin = int(self.high[reader]) - (end - at)
            count = min(stop, end) - at
            if found and found[-1][1] == begin:  # the text continues
                found[-1] = (found[-1][0], begin + count)
            elif count:
                found.append((begin, begin + count))
            at, reader = at + count, reader + 1
        return [*found[:-1], (found[-1][0], found[-1][1] + 1)]


@lru_cache(maxsize=256)
def _round_order(key: tuple[object, ...], readers: int) -> NDArray[np.int64]:
    places = permute(np.arange(readers), readers, stable_key(*key))  # type: ignore[arg-type]
    places.flags.writeable = False
    return places


class _Leg:
    """Samples of one length: what was left of an epoch, then whole epochs."""

    def __init__(self, name: str, seed: int, tokens: int, length: int, epoch: int, left: _Pass | None) -> None:
        self.key, self.length, self.epoch = ("order", seed, name), length, epoch
        windows = window_count(tokens, length)
        readers = min(READERS, windows)
        bounds = np.arange(readers + 1) * windows // readers * length
        bounds[-1] = tokens - 1
        self.whole = _Pass(bounds[:-1], bounds[1:], length)
        self.left = left or self.whole

    def find(self, k: int) -> tuple[int, _Pass, int]:
        """Epoch, pass and number within the pass of the leg's sample k."""
        if k < self.left.sequences:
            return self.epoch, self.left, k
        epochs, k = divmod(k - self.left.sequences, self.whole.sequences)
        return self.epoch + 1 + epochs, self.whole, k


class SourceOrder:
    """The samples of one source of ``tokens`` tokens, at least one sequence of every length it is read at."""

    def __init__(self, name: str, seed: int, tokens: int) -> None:
        self.name, self.seed, self.tokens = name, seed, tokens
        self._starts: list[int] = []
        self._legs: list[_Leg] = []

    def set_length(self, k: int, length: int) -> None:
        """From sample k on, not below that of the call before, samples have ``length`` tokens."""
        if self._starts and self._starts[-1] == k:  # nothing was read at the previous length: it leaves no trace
            self._starts.pop()
            self._legs.pop()
        if not self._legs:
            self._add(0, _Leg(self.name, self.seed, self.tokens, length, 0, None))
            return
        last = self._legs[-1]
        if length == last.length:
            return
        epoch, current, done = last.find(k - self._starts[-1])
        left = _Pass(*current.after(done, (*last.key, epoch)), length) if done or current is not last.whole else None
        if left is not None and not left.sequences:
            epoch, left = epoch + 1, None
        self._add(k, _Leg(self.name, self.seed, self.tokens, length, epoch, left))

    def _add(self, k: int, leg: _Leg) -> None:
        self._starts.append(k)
        self._legs.append(leg)

    def place(self, k: int) -> Place:
        """Where sample k lies."""
        i = bisect_right(self._starts, k) - 1
        leg = self._legs[i]
        epoch, current, number = leg.find(k - self._starts[i])
        return Place(epoch, current.stretches(number, (*leg.key, epoch)))

    def progress(self, k: int) -> tuple[int, int]:
        """The epoch of sample k, and the tokens of that epoch that were read before it."""
        i = bisect_right(self._starts, k) - 1
        epoch, current, number = self._legs[i].find(k - self._starts[i])
        left = int((current.high - current.low).sum())
        return epoch, self.tokens - 1 - left + number * current.length


@dataclass(frozen=True)
class Draws:
    """How a phase's samples, from number ``first`` on, are drawn: from which sources (indices), in which shares, how
    long."""

    first: int
    sequence_length: int
    sources: list[int]
    weights: list[float]


class ShuffledOrder:
    """Which source each sample comes from and where it lies in it, as functions of (seed, sample number)."""

    def __init__(self, phases: Sequence[Draws], names: Sequence[str], tokens: Sequence[int], seed: int) -> None:
        self.phases = phases
        self._firsts = [phase.first for phase in phases]
        # One rotation for all phases: if the next one has the same weights, the boundary makes no difference.
        self.mixtures = [Mixture(phase.weights, stable_key("mixture", seed)) for phase in phases]
        self.orders = [SourceOrder(name, seed, count) for name, count in zip(names, tokens, strict=True)]
        self._drawn = [[0] * len(names)]
        for i, phase in enumerate(phases):
            for source in phase.sources:
                self.orders[source].set_length(self._drawn[i][source], phase.sequence_length)
            if i + 1 < len(phases):
                self._drawn.append(self._drawn_in(i, phases[i + 1].first))

    def sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """The source of each sample ``start … stop - 1``, int64 [stop - start]."""
        parts = []
        while start < stop:
            i = self._phase(start)
            end = min(stop, self._firsts[i + 1]) if i + 1 < len(self.phases) else stop
            parts.append(np.array(self.phases[i].sources)[self.mixtures[i].sources(start, end)])
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def drawn(self, n: int) -> list[int]:
        """How many of the samples before number n come from each source."""
        return self._drawn_in(self._phase(n), n)

    def place(self, source: int, k: int) -> Place:
        """Where the k-th sample of a source lies."""
        return self.orders[source].place(k)

    def progress(self, source: int, k: int) -> tuple[int, int]:
        """The epoch of the source's k-th sample, and the tokens of that epoch that were read before it."""
        return self.orders[source].progress(k)

    def _phase(self, n: int) -> int:
        return bisect_right(self._firsts, n) - 1

    def _drawn_in(self, i: int, n: int) -> list[int]:
        phase, mixture, drawn = self.phases[i], self.mixtures[i], list(self._drawn[i])
        for source, before, now in zip(phase.sources, mixture.counts(phase.first), mixture.counts(n), strict=True):
            drawn[source] += now - before
        return drawn
