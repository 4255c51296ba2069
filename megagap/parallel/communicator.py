"""Exchange of small Python objects between processes, for checkpoints and agreement."""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist

from megagap.parallel.mesh import Axis, Mesh


class Communicator(Protocol):
    """Exchange of small Python objects between ranks."""

    rank: int
    size: int

    def gather(self, value: object) -> list[object] | None:
        """The values of all ranks, on rank 0; None elsewhere."""

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""


class SingleProcess:
    """The communicator of a single process."""

    rank = 0
    size = 1

    def gather(self, value: object) -> list[object] | None:
        return [value]

    def broadcast(self, value: object) -> object:
        return value


class DistributedCommunicator:
    """The communicator of all ranks of a mesh.

    Values pass from the first members of one level to the next: of ``mesh.object_levels``, unless a thread has levels
    of its own.
    """

    def __init__(self, mesh: Mesh, levels: Sequence[Axis] | None = None) -> None:
        self.rank, self.size = mesh.world.rank, mesh.world.size
        self._levels = mesh.object_levels if levels is None else levels

    def gather(self, value: object) -> list[object] | None:
        """The values of all ranks, on rank 0; None elsewhere."""
        values = [value]
        for level in self._levels:  # ranks that are not the first of a level are alone in the next
            if level.group is not None:
                parts: list[list[object]] | None = [[]] * level.size if level.rank == 0 else None
                with level.spans.collective("gather_of_objects", level.name):
                    dist.gather_object(values, parts, dst=level.ranks[0], group=level.group)
                values = [value for part in parts or [] for value in part]
        return values if self.rank == 0 else None

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        values = [value]
        for level in reversed(self._levels):
            if level.group is not None:
                with level.spans.collective("broadcast_of_objects", level.name):
                    dist.broadcast_object_list(values, src=level.ranks[0], group=level.group)
        return values[0]
