"""Which source each sample comes from, and how many came from it before: closed-form functions of the sample number.

Sample n falls at x(n) = n·P + offset mod 2^64 with P the odd number nearest to 2^64 / φ, a rotation by the golden
ratio whose points are spread as evenly as a sequence of points can be (Weyl 1916; Knuth, TAOCP 3, section 6.4). The
source is the interval of cumulative weights that holds x(n), so that any stretch of samples has nearly the wanted
shares: in random mixtures of up to 7 sources, none was more than 5 samples off at any point tried up to 10^9, or 7
up to 10^10. How many points of the first n lie in an interval is a floor sum, which takes O(log) steps.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from megagap.data.order import GOLDEN_GAMMA as STEP
from megagap.errors import DataError

MODULUS = 2**64


class Mixture:
    """Sources drawn in proportion to ``weights``, which need not add up to 1.

    ``offset`` shifts the rotation, 0 ≤ offset < 2^64. Raises :class:`DataError` for invalid weights.
    """

    def __init__(self, weights: Sequence[float], offset: int = 0) -> None:
        if not len(weights):
            raise DataError("a mixture needs at least one source")
        for weight in weights:
            if not isfinite(weight) or weight <= 0:
                raise DataError(f"a source has weight {weight}: weights must be above 0 and finite")
        cumulative = list(accumulate(map(Fraction, weights), initial=Fraction(0)))
        inner = [min(round(bound / cumulative[-1] * MODULUS), MODULUS - 1) for bound in cumulative[1:-1]]
        self.bounds = [0, *inner, MODULUS]
        self.offset = offset % MODULUS

    @property
    def shares(self) -> list[float]:
        """The weights as drawn, adding up to 1."""
        return [(stop - start) / MODULUS for start, stop in pairwise(self.bounds)]

    def source_of(self, n: int) -> int:
        """The source of sample n."""
        return bisect_right(self.bounds, (n * STEP + self.offset) % MODULUS) - 1

    def sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """The sources of samples ``start … stop - 1``, int64 [stop - start]."""
        points = np.arange(stop - start, dtype=np.uint64) * STEP + (start * STEP + self.offset) % MODULUS
        return np.searchsorted(np.array(self.bounds[1:-1], np.uint64), points, side="right")

    def counts(self, n: int) -> list[int]:
        """How many of samples ``0 … n - 1`` come from each source."""
        below = [self._points_below(bound, n) for bound in self.bounds]
        return [stop - start for start, stop in pairwise(below)]

    def _points_below(self, bound: int, n: int) -> int:
        """How many k < n have x(k) < bound: each adds 1 to ⌊y / M⌋ - ⌊(y - bound) / M⌋, with y = k·P + offset."""
        shifted = self.offset - bound + MODULUS  # + M keeps it from being negative; n makes up for it
        return floor_sum(n, MODULUS, STEP, self.offset) - floor_sum(n, MODULUS, STEP, shifted) + n


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Σ ⌊(a·k + b) / m⌋ over 0 ≤ k < n, for a, b ≥ 0, in O(log m) steps.

    Counts the lattice points under the line, and swaps the axes as in Euclid's algorithm (Graham, Knuth and
    Patashnik, Concrete Mathematics, section 3.5).
    """
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        # What is left of the line ends at height (a·n + b) / m < n: count its points by rows instead of columns.
        n, b = divmod(a * n + b, m)
        a, m = m, a
    return total
