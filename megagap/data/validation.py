"""Fixed held-out samples of each source."""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megagap.data.order import split_shares
from megagap.data.samples import require_distinct_names
from megagap.data.sources import VALIDATION, WHOLE, Source, TokenSource, positions_in, same_pairs

log = logging.getLogger(__name__)


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
        source, length = self.sources[name], self.sequence_length
        windows = self.windows[name][first : first + count]
        spans = [(window * length, (window + 1) * length + 1) for window in windows.tolist()]
        source.require_unchanged(spans)
        batch = np.empty((len(windows), length + 1), np.int64)
        for row, window in zip(batch, windows, strict=True):
            row[:] = source.window(int(window), length)
        source.require_unchanged(spans)
        return batch

    def positions(self, name: str, first: int, count: int) -> NDArray[np.int64]:
        """How far each of these tokens lies behind its document's start, or the window's: int64 [count, s + 1]."""
        source, length = self.sources[name], self.sequence_length
        starts = self.windows[name][first : first + count] * length
        ends = [source.read_documents(int(start), int(start) + length + 1)[1] for start in starts]
        return positions_in(ends, length + 1)


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
        read = [prefix for source in sources for prefix in source.prefixes]
        for source in validation:
            if same := same_pairs(source.prefixes, read):
                log.warning("validation source %s is trained on too: %s", source.name, ", ".join(same))
        opened = [TokenSource(source, split, WHOLE, vocab_size) for source in validation]
    elif split_shares(split)[VALIDATION] > 0:
        opened = [TokenSource(source, split, VALIDATION, vocab_size) for source in sources]
    else:
        opened = []
    return ValidationData(opened, sequence_length, samples)
