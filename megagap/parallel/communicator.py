"""Exchange of small Python objects between processes, for checkpoints and agreement."""

from typing import Protocol

import torch.distributed as dist

from megagap.parallel.mesh import Mesh


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
    """The communicator of all ranks of a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size = mesh.world.rank, mesh.world.size

    def gather(self, value: object) -> list[object] | None:
        """The values of all ranks, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[object] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
