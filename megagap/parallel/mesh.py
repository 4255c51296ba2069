"""The grid of processes: one object, made at start and passed down. There is no other global state.

Ranks are laid out with tensor parallelism innermost (neighbours, so within a node), then context, data and pipeline
parallelism: ``rank = ((pp · DP + dp) · CP + cp) · TP + tp``. An axis of size 1 has no process group and its
collectives are the identity, so one process runs the same code.
"""

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megagap.errors import DistributedError


@dataclass(frozen=True)
class Axis:
    """This process's view of one group of processes: its place among them and the group itself."""

    name: str
    ranks: tuple[int, ...]
    """Global ranks of the members, in order along the axis."""
    rank: int
    """This process's place along the axis."""
    group: dist.ProcessGroup | None = None
    """None where the axis has one member."""

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Mesh:
    """The axes of parallelism, and the joint groups that collectives over several of them use."""

    pp: Axis
    """Pipeline stages."""
    dp: Axis
    """Data-parallel replicas."""
    cp: Axis
    """Parts of each sequence (context parallelism)."""
    tp: Axis
    """Parts of each matrix (tensor parallelism)."""
    data: Axis
    """dp × cp: gradients are reduced and optimizer state is sharded over it."""
    embedding: Axis
    """The first and the last stage, which share a tied embedding; one member on other stages."""
    kv: Axis
    """The consecutive tp ranks that hold the same key/value heads, where tp exceeds their number."""
    world: Axis
    """All processes."""
    device: torch.device

    def axis(self, name: str) -> Axis:
        axis = getattr(self, name)
        assert isinstance(axis, Axis), name
        return axis

    @classmethod
    def single(cls, device: torch.device | None = None) -> "Mesh":
        """One process, no process groups."""
        return cls.create(device=device or torch.device("cpu"), world_size=1, rank=0)

    @classmethod
    def create(
        cls,
        *,
        device: torch.device,
        world_size: int,
        rank: int,
        pp: int = 1,
        cp: int = 1,
        tp: int = 1,
        kv_sharing: int = 1,
        timeout: timedelta | None = None,
    ) -> "Mesh":
        """Lay out ``world_size`` ranks; dp is what remains. Collective: every rank calls it with the same arguments.

        ``kv_sharing``: consecutive tp ranks that share key/value heads (tp / key-value heads, at least 1).
        ``torch.distributed`` must be initialised where ``world_size > 1``.
        Raises :class:`DistributedError` if the axes do not divide the ranks.
        """
        if world_size % (pp * cp * tp):
            raise DistributedError(f"pp {pp} × cp {cp} × tp {tp} does not divide {world_size} processes")
        dp = world_size // (pp * cp * tp)
        grid = np.arange(world_size).reshape(pp, dp, cp, tp)
        everyone = tuple(range(world_size))
        made = {everyone: dist.group.WORLD} if world_size > 1 else {}

        def axis(name: str, groups: np.ndarray) -> Axis:
            """``groups`` [number of groups, members]: every rank is a member of at most one.

            Axes with the same members share a process group: each costs connections, and memory on a GPU.
            """
            mine = Axis(name, (rank,), 0)
            for members in map(tuple, groups.tolist()):
                if len(members) == 1:
                    continue
                # Every rank must take part in creating every group, including those it is not in.
                if members not in made:
                    made[members] = dist.new_group(list(members), timeout=timeout)
                if rank in members:
                    mine = Axis(name, members, members.index(rank), made[members])
            return mine

        lines = lambda dims, size: np.moveaxis(grid, dims, range(-len(dims), 0)).reshape(-1, size)  # noqa: E731
        stages_at_the_ends = grid[[0, -1]] if pp > 1 else grid
        return cls(
            pp=axis("pp", lines((0,), pp)),
            dp=axis("dp", lines((1,), dp)),
            cp=axis("cp", lines((2,), cp)),
            tp=axis("tp", lines((3,), tp)),
            data=axis("data", lines((1, 2), dp * cp)),
            embedding=axis("embedding", np.moveaxis(stages_at_the_ends, 0, -1).reshape(-1, min(pp, 2))),
            kv=axis("kv", grid.reshape(-1, kv_sharing)),
            world=Axis("world", everyone, rank, made.get(everyone)),
            device=device,
        )
