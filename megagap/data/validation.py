"""Fixed held-out samples of each source."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megagap.data.order import split_shares
from megagap.data.planted import require_no_planted
from megagap.data.samples import require_distinct_names
from megagap.data.sources import VALIDATION, WHOLE, TokenSource, positions_in, same_pairs
from megagap.timeline import Source

log = logging.getLogger(__name__)

WINDOWS_AT_A_TIME = 64
"""Whose tokens are in memory where they are counted."""


class ValidationData:
    """For each source a fixed list of windows, spread evenly and in file order, at most ``samples`` of them.

    ``windows[name]`` is int64 [count]; :meth:`batch` reads some of them. Empty if there are no sources.
    """

    def __init__(self, sources: Sequence[TokenSource], sequence_length: int, samples: int) -> None:
        require_distinct_names([source.source for source in sources])
        self.sequence_length = sequence_length
        self.sources = {source.source.name: source for source in sources}
        self.windows: dict[str, NDArray[np.int64]] = {}
        for name, source in self.sources.items():
            source.require(sequence_length)
            total = source.window_count(sequence_length)
            count = min(samples, total)
            self.windows[name] = np.arange(count) * total // count

    def batch(self, name: str, first: int, count: int) -> NDArray[np.int64]:
        """Tokens of the source's windows ``first … first + count - 1`` of the list, int64 [count, s + 1].

        Raises :class:`DataError` if a file that they come from was rebuilt since it was opened.
        """
        return self._read(name, first, count)[0]

    def positions(self, name: str, first: int, count: int) -> NDArray[np.int64]:
        """The position of each of these tokens in its document, or in the window: int64 [count, s + 1]."""
        return self._read(name, first, count)[1]

    def targets(self, name: str, document_mask: bool) -> Iterator[NDArray[np.int64]]:
        """The tokens that an evaluation of the source predicts, int64, in parts; with ``document_mask`` no document's
        first one. Raises :class:`DataError` as :meth:`batch` does."""
        for first in range(0, len(self.windows[name]), WINDOWS_AT_A_TIME):
            tokens, positions = self._read(name, first, WINDOWS_AT_A_TIME)
            predicted = tokens[:, 1:]
            yield predicted[positions[:, 1:] != 0] if document_mask else predicted.reshape(-1)

    def _read(self, name: str, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        length = self.sequence_length
        starts = self.windows[name][first : first + count] * length
        return read_stretches(self.sources[name], starts, length + 1)


def read_stretches(
    source: TokenSource, starts: Sequence[int] | NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``length`` tokens of the source from each of ``starts`` on, and how far each of them lies behind the start of its
    document or of its stretch, whichever is later: both int64 [starts, length].

    Raises :class:`DataError` if a file that they come from was rebuilt since it was opened.
    """
    spans = [(int(start), int(start) + length) for start in starts]
    source.require_unchanged(spans)
    read = [source.read_documents(*span) for span in spans]
    source.require_unchanged(spans)
    tokens = np.stack([tokens for tokens, _ in read]) if read else np.zeros((0, length), np.int64)
    return tokens, positions_in([ends for _, ends in read], length)


def open_validation(
    sources: Sequence[Source],
    validation: Sequence[Source],
    sequence_length: int,
    samples: int,
    split: str = "100,0,0",
    vocab_size: int | None = None,
) -> ValidationData:
    """Held-out windows of :func:`held_out_sources`."""
    return ValidationData(held_out_sources(sources, validation, split, vocab_size), sequence_length, samples)


def held_out_sources(
    sources: Sequence[Source], validation: Sequence[Source], split: str = "100,0,0", vocab_size: int | None = None
) -> list[TokenSource]:
    """All documents of ``validation`` if given, else the second part of the training sources' split, if it has one.

    Raises :class:`DataError` for planted documents that were not made to be held out.
    """
    for source in validation or (sources if split_shares(split)[VALIDATION] > 0 else ()):
        require_no_planted(source.name, source.prefixes)
    if validation:
        read = [prefix for source in sources for prefix in source.prefixes]
        for source in validation:
            if same := same_pairs(source.prefixes, read):
                log.warning("validation source %s is trained on too: %s", source.name, ", ".join(same))
        return [TokenSource(source, split, WHOLE, vocab_size) for source in validation]
    if split_shares(split)[VALIDATION] > 0:
        return [TokenSource(source, split, VALIDATION, vocab_size) for source in sources]
    return []
