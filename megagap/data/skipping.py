"""Global sample numbers with some left out: the usual answer to a loss spike."""

from collections.abc import Iterator, Sequence


class SampleNumbers:
    """The numbers 0, 1, 2, … without the half-open ranges ``skip``, which may overlap and come in any order.

    The n-th sample trained on is then number ``number(n)``; skipping later numbers does not move earlier ones.
    """

    def __init__(self, skip: Sequence[tuple[int, int]] = ()) -> None:
        self.skipped: list[tuple[int, int]] = []
        for start, stop in sorted(skip):
            assert 0 <= start < stop, (start, stop)
            if self.skipped and start <= self.skipped[-1][1]:
                self.skipped[-1] = (self.skipped[-1][0], max(stop, self.skipped[-1][1]))
            else:
                self.skipped.append((start, stop))

    def number(self, position: int) -> int:
        """The global number of the sample at ``position`` in training order."""
        for start, stop in self.skipped:
            if position < start:
                break
            position += stop - start
        return position

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The numbers at positions ``first … last - 1`` as ranges [start, stop) of consecutive numbers."""
        start, left = self.number(first), last - first
        for gap_start, gap_stop in self.skipped:
            if start < gap_start < start + left:
                yield start, gap_start
                start, left = gap_stop, left - (gap_start - start)
        if left:
            yield start, start + left
