"""Sources of a few documents whose tokens are all different."""

from collections.abc import Callable, Sequence

from megagap.data.samples import Phase, TrainingData
from megagap.data.sources import Source

S = 4
"""Default number of tokens per sequence."""

WriteTokens = Callable[[str, Sequence[Sequence[int]]], str]


def numbered(documents: int, length: int = 7, first: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different, counting up."""
    return [[first + d * length + i for i in range(length)] for d in range(documents)]


def training(sources: Sequence[Source], seed: int, length: int = S, **more: object) -> TrainingData:
    """One phase of these sources."""
    return TrainingData([Phase("all", 0, length, tuple(sources))], seed, **more)  # type: ignore[arg-type]
