"""Sources of a few documents whose tokens are all different."""

from collections.abc import Callable, Sequence

from megagap.data.samples import TrainingData
from megagap.timeline import Phase, Source, Timeline

S = 4
"""Default number of tokens per sequence."""

WriteTokens = Callable[[str, Sequence[Sequence[int]]], str]


def numbered(documents: int, length: int = 7, first: int = 0) -> list[list[int]]:
    """Documents whose tokens are all different, counting up."""
    return [[first + d * length + i for i in range(length)] for d in range(documents)]


def phase(name: str, samples: int, length: int, sources: Sequence[Source]) -> Phase:
    """Of so many samples."""
    return Phase(name, samples * length, length, tuple(sources))


def timeline(*phases: Phase, batch: int = 1, steps: int | None = None) -> Timeline:
    """Batches of so many samples; without ``steps``, the run has no end."""
    return Timeline(phases, [(0, batch)], steps)


def training(
    sources: Sequence[Source],
    seed: int,
    length: int = S,
    *,
    batch: int = 1,
    steps: int | None = None,
    **more: object,
) -> TrainingData:
    """One phase of these sources, without an end."""
    endless = Phase("all", None, length, tuple(sources))
    return TrainingData(timeline(endless, batch=batch, steps=steps), seed, **more)  # type: ignore[arg-type]
