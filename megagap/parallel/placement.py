"""Which pipeline rank computes which part of the model: one table for settings, model, schedules, executor, planner.

The model is cut into *virtual stages*, numbered along it from 0. Each pipeline rank computes one or several of
them, its *chunks*. Being first or last is a property of a virtual stage, not of a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple


@dataclass(frozen=True)
class VirtualStage:
    """A part of the model, computed by one pipeline rank."""

    index: int
    """Along the model, from 0."""
    layers: range
    """Numbers of its layers in the model."""
    has_embedding: bool
    """Whether it turns tokens into the residual stream: the first."""
    has_head: bool
    """Whether it has the last norm, the output projection and the loss: the last."""

    @property
    def is_empty(self) -> bool:
        """Whether it would compute nothing."""
        return not (self.layers or self.has_embedding or self.has_head)


class Place(NamedTuple):
    """Where a virtual stage is computed."""

    rank: int
    """Pipeline rank."""
    chunk: int
    """Which of the rank's virtual stages, from 0."""


@dataclass(frozen=True)
class Placement:
    """Virtual stages and where they are computed; every rank has the same number of them."""

    stages: tuple[VirtualStage, ...]
    """All of them, along the model."""
    places: tuple[Place, ...]
    """Where each of them is computed."""

    def __post_init__(self) -> None:
        assert len(self.places) == len(self.stages), (self.places, self.stages)
        everywhere = {Place(rank, chunk) for rank in range(self.ranks) for chunk in range(self.chunks)}
        assert set(self.places) == everywhere, f"not one virtual stage for each chunk of each rank: {self.places}"

    @classmethod
    def loop(cls, layers_per_stage: Sequence[int], chunks: int = 1) -> "Placement":
        """The model goes around the ranks once per chunk: virtual stage v is on rank v mod ranks (Narayanan et al.
        2021, section 2.2). With one chunk per rank, rank and virtual stage have the same number.

        ``layers_per_stage``: layers of each virtual stage along the model, a multiple of ``chunks``.
        """
        assert len(layers_per_stage) % chunks == 0, (layers_per_stage, chunks)
        ranks = len(layers_per_stage) // chunks
        places = tuple(Place(index % ranks, index // ranks) for index in range(len(layers_per_stage)))
        return cls(_cut(layers_per_stage), places)

    @classmethod
    def v_shape(cls, layers_per_stage: Sequence[int], chunks: int = 2) -> "Placement":
        """The model goes down the ranks and back: rank r has the virtual stages r and 2 · ranks - 1 - r (ZB-V; Qi et
        al. 2023). The first rank then has both the embedding and the head.

        ``layers_per_stage``: layers of each virtual stage along the model, ``chunks`` (always two) for every rank.
        """
        assert chunks == 2 and len(layers_per_stage) % 2 == 0, (layers_per_stage, chunks)
        ranks = len(layers_per_stage) // 2
        down = [Place(rank, 0) for rank in range(ranks)]
        back = [Place(rank, 1) for rank in reversed(range(ranks))]
        return cls(_cut(layers_per_stage), (*down, *back))

    @cached_property
    def ranks(self) -> int:
        """Pipeline ranks."""
        return 1 + max(place.rank for place in self.places)

    @property
    def chunks(self) -> int:
        """Virtual stages of each rank."""
        return len(self.stages) // self.ranks

    def virtual(self, rank: int, chunk: int) -> int:
        """The number of a virtual stage, by where it is computed."""
        return self._numbers[Place(rank, chunk)]

    def stages_of(self, rank: int) -> tuple[VirtualStage, ...]:
        """A rank's virtual stages, by chunk."""
        return tuple(self.stages[self.virtual(rank, chunk)] for chunk in range(self.chunks))

    @property
    def embedding_ranks(self) -> tuple[int, ...]:
        """The ranks that have the weights of a tied embedding: that of the first virtual stage, and that of the last if
        it is another one."""
        first, last = self.places[0].rank, self.places[-1].rank
        return (first,) if first == last else (first, last)

    @cached_property
    def _numbers(self) -> dict[Place, int]:
        return {place: index for index, place in enumerate(self.places)}


def spread_layers(layers: int, stages: int) -> list[int]:
    """Layers of each of so many virtual stages, if nothing else is asked for; what does not divide goes to the earlier
    ones."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def balance_layers(layers: int, stages: int, head: float) -> list[int]:
    """Layers of each of so many virtual stages, so that the slowest takes as little time as possible.

    ``head``: the time of the output projection and the loss, in layers; looking up embeddings takes none. Stages
    between the first and the last have at least one layer: ``layers`` must suffice for that.
    """
    last = stages - 1
    counts = [int(0 < stage < last) for stage in range(stages)]
    assert sum(counts) <= layers, (layers, stages)
    for _ in range(layers - sum(counts)):
        counts[min(range(stages), key=lambda stage: counts[stage] + head * (stage == last))] += 1
    return counts


def _cut(layers_per_stage: Sequence[int]) -> tuple[VirtualStage, ...]:
    ends = list(accumulate(layers_per_stage))
    last = len(ends) - 1
    return tuple(
        VirtualStage(index, range(end - layers, end), has_embedding=index == 0, has_head=index == last)
        for index, (layers, end) in enumerate(zip(layers_per_stage, ends, strict=True))
    )
