"""Where ranks stand in the grid of processes: arithmetic only, for any number of ranks, without torch.

Tensor parallelism is innermost (neighbours, so within a node), then context, data and pipeline parallelism:
``rank = ((pp · DP + dp) · CP + cp) · TP + tp``. ``parallel/mesh.py`` makes process groups from it.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from math import lcm, prod
from typing import Literal

import numpy as np

from megagap.errors import DistributedError

ContextMode = Literal["ring", "alltoall", "allgather"]
"""How attention reaches the tokens of other cp ranks (``parallel/context.py``)."""

Members = tuple[int, ...]
"""Ranks of a group, in order along its axis."""

AXES: dict[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "dp": ("replicate", "dp_shard"),
    "cp": ("cp",),
    "tp": ("tp_kv", "kv"),
    "data": ("replicate", "dp_shard", "cp"),
    "shard": ("dp_shard", "cp"),
    "replicate": ("replicate",),
    "embedding": ("pp",),
    "kv": ("kv",),
}
"""Each axis, and the dimensions of the grid that it spans, outermost first. The order is that in which groups are made.

``embedding`` has the ranks of the first and the last virtual stage only."""

OBJECT_BLOCK = 64
"""Ranks per group of :meth:`Layout.object_levels`: 64 blocks of 64 have 4,096 ranks, in which no rank connects to more
than 126 others."""


def sequence_unit(cp: int, tp: int, sequence_parallel: bool) -> int:
    """What the tokens of a sequence must be a multiple of. Each cp rank has two equal pieces of it; under sequence
    parallelism their tokens are split over tp."""
    return cp * lcm(2 if cp > 1 else 1, tp if sequence_parallel else 1)


@dataclass(frozen=True)
class Layout:
    """How ``world_size`` ranks are divided among the axes; dp is what remains.

    Raises :class:`DistributedError` if the sizes do not divide the ranks, or each other.
    """

    world_size: int
    pp: int = 1
    """Pipeline ranks."""
    cp: int = 1
    """Context-parallel ranks."""
    tp: int = 1
    """Tensor-parallel ranks."""
    kv_sharing: int = 1
    """Consecutive tp ranks that share key/value heads: tp / key-value heads, at least 1."""
    dp_replicate: int = 1
    """Parts of dp that each hold all gradients and optimizer states; these are sharded within a part."""
    embedding_ranks: tuple[int, ...] | None = None
    """Pipeline ranks of the first and the last virtual stage (``Placement.embedding_ranks``); None: first and last."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "embedding_ranks" and getattr(self, field.name) < 1:
                raise DistributedError(f"{field.name} = {getattr(self, field.name)}: must be at least 1")
        if self.world_size % (self.pp * self.cp * self.tp):
            raise DistributedError(
                f"pp {self.pp} × cp {self.cp} × tp {self.tp} does not divide {self.world_size} processes"
            )
        if self.tp % self.kv_sharing:
            raise DistributedError(f"{self.kv_sharing} ranks that share key/value heads do not divide tp {self.tp}")
        if self.dp % self.dp_replicate:
            raise DistributedError(f"dp_replicate {self.dp_replicate} does not divide dp {self.dp}")

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // (self.pp * self.cp * self.tp)

    def size(self, axis: str) -> int:
        """Members of each group of an axis; of ``embedding``, on the first and the last virtual stage."""
        if axis == "embedding":
            return len(self._sharing)
        return prod(self._dimensions[dimension] for dimension in AXES[axis])

    def coordinates(self, rank: int) -> dict[str, int]:
        """A rank's place along ``pp``, ``dp``, ``cp`` and ``tp``."""
        places = np.unravel_index(rank, (self.pp, self.dp, self.cp, self.tp))
        return dict(zip(("pp", "dp", "cp", "tp"), map(int, places), strict=True))

    def groups(self, axis: str) -> tuple[Members, ...]:
        """All groups of an axis. Every rank is in exactly one; ranks of other stages are alone in ``embedding``."""
        array = self._arrays[axis]
        if axis != "embedding":
            return _tuples(array)
        if len(self._sharing) == 1:
            return tuple((rank,) for rank in range(self.world_size))
        others = [stage for stage in range(self.pp) if stage not in self._sharing]
        return (*_tuples(array[:, list(self._sharing)]), *_tuples(array[:, others].reshape(-1, 1)))

    def members(self, axis: str, rank: int) -> Members:
        """The group of an axis that a rank is in."""
        array = self._arrays[axis]
        (row,), (place,) = np.nonzero(array == rank)
        members = tuple(array[row].tolist())
        if axis != "embedding":
            return members
        return tuple(members[stage] for stage in self._sharing) if place in self._sharing else (rank,)

    @cached_property
    def divisions(self) -> dict[str, tuple[Members, ...]]:
        """The groups that have to be made, by axis, in this order on every rank. Every rank is in one of each axis.

        An axis whose groups are the whole world's or an earlier axis' is left out: each group costs connections, and
        memory on a GPU. So is one whose groups all have one member.
        """
        made: dict[str, tuple[Members, ...]] = {}
        known = {(tuple(range(self.world_size)),), tuple((rank,) for rank in range(self.world_size))}
        for axis in AXES:
            groups = self.groups(axis)
            if groups not in known:
                made[axis] = groups
                known.add(groups)
        return made

    def object_levels(self) -> tuple[tuple[Members, ...], ...]:
        """Groups for exchanging objects by way of the CPU: blocks of ranks, then the first ranks of all blocks, while
        the others are alone.

        In one group of all ranks, each would connect to every other: 8 million connections among 4,096 ranks.
        """
        ranks = range(self.world_size)
        blocks = tuple(tuple(ranks[start : start + OBJECT_BLOCK]) for start in ranks[::OBJECT_BLOCK])
        if len(blocks) == 1:
            return (blocks,)
        others = ((rank,) for block in blocks for rank in block[1:])
        return (blocks, (tuple(block[0] for block in blocks), *others))

    @property
    def _sharing(self) -> tuple[int, ...]:
        """Pipeline ranks that share a tied embedding, in order."""
        return tuple(sorted({0, self.pp - 1} if self.embedding_ranks is None else self.embedding_ranks))

    @cached_property
    def _dimensions(self) -> dict[str, int]:
        """Sizes of the grid's dimensions, outermost first."""
        return {
            "pp": self.pp,
            "replicate": self.dp_replicate,
            "dp_shard": self.dp // self.dp_replicate,
            "cp": self.cp,
            "tp_kv": self.tp // self.kv_sharing,
            "kv": self.kv_sharing,
        }

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        """Ranks along each axis, [groups, members]."""
        names = list(self._dimensions)
        grid = np.arange(self.world_size).reshape(tuple(self._dimensions.values()))
        arrays = {}
        for axis, spanned in AXES.items():
            lines = np.moveaxis(grid, [names.index(name) for name in spanned], range(-len(spanned), 0))
            arrays[axis] = lines.reshape(-1, prod(self._dimensions[name] for name in spanned))
        return arrays


def _tuples(array: np.ndarray) -> tuple[Members, ...]:
    return tuple(map(tuple, array.tolist()))
