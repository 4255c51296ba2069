"""The grid of processes with its groups: one object, made at start and passed down. There is no other global state.

An axis of size 1 has no process group and its collectives are the identity, so one process runs the same code.
``parallel/layout.py`` says which ranks an axis has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from megagap.errors import DistributedError, library_errors
from megagap.parallel.layout import AXES, Layout, Members
from megagap.parallel.spans import Spans

NOT_CONNECTED = (
    "the processes cannot connect to each other (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network)"
)


@dataclass(frozen=True)
class Axis:
    """This process's view of one group of processes: its place among them and the group itself."""

    name: str
    ranks: Members
    """Global ranks of the members, in order along the axis."""
    rank: int
    """This process's place along the axis."""
    group: dist.ProcessGroup | None = None
    """None where the axis has one member."""
    spans: Spans = field(default_factory=Spans, compare=False, repr=False)
    """Where collectives along the axis are noted: one object for all axes of a mesh."""

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
    """dp × cp: gradients are reduced over it."""
    shard: Axis
    """The part of ``data`` over which ``optim.zero`` shards: all of it, unless dp is divided into parts that each hold
    everything."""
    replicate: Axis
    """Those parts: the ranks that hold the same shards."""
    embedding: Axis
    """The ranks of the first and the last virtual stage, which share a tied embedding; one member on other ranks."""
    kv: Axis
    """The consecutive tp ranks that hold the same key/value heads, where tp exceeds their number."""
    world: Axis
    """All processes."""
    object_levels: tuple[Axis, ...]
    """The groups of this rank that carry Python objects, as in :meth:`Layout.object_levels`: values are gathered from
    the first to the last, and broadcast in reverse."""
    background_levels: tuple[Axis, ...]
    """Groups like ``object_levels``, of their own: what a thread exchanges beside training never meets training's
    collectives. Empty unless they were asked for."""
    layout: Layout
    device: torch.device

    @property
    def spans(self) -> Spans:
        """What this process is doing."""
        return self.world.spans

    @property
    def background_spans(self) -> Spans | None:
        """What the thread that uses ``background_levels`` is doing, where there are such."""
        return self.background_levels[0].spans if self.background_levels and self.world.size > 1 else None

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
        dp_replicate: int = 1,
        timeout: timedelta | None = None,
    ) -> "Mesh":
        """:meth:`of` a layout of these sizes."""
        layout = Layout(world_size, pp=pp, cp=cp, tp=tp, kv_sharing=kv_sharing, dp_replicate=dp_replicate)
        return cls.of(layout, rank, device, timeout)

    @classmethod
    def of(
        cls,
        layout: Layout,
        rank: int,
        device: torch.device,
        timeout: timedelta | None = None,
        *,
        background: bool = False,
    ) -> "Mesh":
        """Make the groups of a layout. Collective: every rank calls it with the same layout.

        ``background``: with :attr:`background_levels`.

        ``torch.distributed`` must be initialised where there are several ranks; the groups use its backend. Those of
        NCCL are connected on return. Raises :class:`DistributedError` if ranks cannot connect to each other.
        """
        mesh = cls._of_layout(layout, rank, device, timeout)
        if not background:
            return mesh
        if layout.world_size == 1:
            return replace(mesh, background_levels=mesh.object_levels)
        with library_errors(NOT_CONNECTED, DistributedError):
            levels, spans = _object_levels(layout.object_levels(), rank, timeout), Spans()
            named = (replace(level, name="background", spans=spans) for level in levels)
            return replace(mesh, background_levels=tuple(named))

    @classmethod
    def _of_layout(cls, layout: Layout, rank: int, device: torch.device, timeout: timedelta | None) -> "Mesh":
        everyone = tuple(range(layout.world_size))
        groups: _Groups = {}
        if layout.world_size > 1:
            assert dist.group.WORLD is not None
            groups[everyone] = dist.group.WORLD
            if dist.get_backend() == "nccl":  # RCCL is called that, too
                with library_errors(NOT_CONNECTED, DistributedError):
                    can_split = dist.group.WORLD._get_backend(device).supports_splitting
                    groups |= (_split_world if can_split else _separate_groups)(layout, rank, timeout)
                    mesh = cls._of_groups(layout, rank, device, groups)
                    connect(mesh)
                    levels = _object_levels(layout.object_levels(), rank, timeout)
                    return replace(mesh, object_levels=tuple(replace(level, spans=mesh.spans) for level in levels))
            groups |= _separate_groups(layout, rank, timeout)
        return cls._of_groups(layout, rank, device, groups)

    @classmethod
    def without_groups(cls, layout: Layout, rank: int, device: torch.device) -> "Mesh":
        """Any rank of any layout, in one process, to look at what it would hold: its collectives do nothing."""
        return cls._of_groups(layout, rank, device, {})

    @classmethod
    def _of_groups(cls, layout: Layout, rank: int, device: torch.device, groups: "_Groups") -> "Mesh":
        spans = Spans()

        def axis(name: str, members: Members) -> Axis:
            return Axis(name, members, members.index(rank), groups.get(members), spans)

        world = axis("world", tuple(range(layout.world_size)))
        axes = {name: axis(name, layout.members(name, rank)) for name in AXES}
        return cls(**axes, world=world, object_levels=(world,), background_levels=(), layout=layout, device=device)


_Groups = dict[Members, dist.ProcessGroup]


# torch names a group after its members and the number of groups that a process has made before, and members must agree
# on the name. So every rank makes a group of every division, be it one of its own alone.


def _split_world(layout: Layout, rank: int, timeout: timedelta | None) -> _Groups:
    """This rank's groups, split from the world's communicator: one call for all groups of a division, and no use of
    the store. The world's must be bound to the device (``init_process_group(device_id=…)``)."""
    made = {}
    for axis, division in layout.divisions.items():
        group = dist.split_group(split_ranks=[list(members) for members in division], timeout=timeout, group_desc=axis)
        assert group is not None
        made[_group_of(rank, division)] = group
    return _of_several(made)


def _separate_groups(layout: Layout, rank: int, timeout: timedelta | None) -> _Groups:
    """This rank's groups, each made by its members only: the others need not wait for them.

    All ranks go through the divisions in one order, else members of several groups would wait for each other.
    """
    made = {}
    for axis, division in layout.divisions.items():
        members = _group_of(rank, division)
        made[members] = dist.new_group(list(members), timeout=timeout, use_local_synchronization=True, group_desc=axis)
    return _of_several(made)


def _object_levels(levels: Sequence[Sequence[Members]], rank: int, timeout: timedelta | None) -> tuple[Axis, ...]:
    """This rank's group of each level, of gloo: NCCL's carry tensors on GPUs only."""
    found = []
    for level in levels:
        members = _group_of(rank, level)
        group = dist.new_group(
            list(members), timeout=timeout, backend="gloo", use_local_synchronization=True, group_desc="objects"
        )
        found.append(Axis("objects", members, members.index(rank), _of_several({members: group}).get(members)))
    return tuple(found)


def _group_of(rank: int, division: Sequence[Members]) -> Members:
    return next(members for members in division if rank in members)


def _of_several(groups: _Groups) -> _Groups:
    return {members: group for members, group in groups.items() if len(members) > 1}


def connect(mesh: Mesh) -> None:
    """Use each group once, in the order in which they were made: its connections are made and found to work before the
    first step. A collective makes those for collectives, messages between neighbours those of the pipeline and
    of the ring of cp ranks.

    Collective. Raises :class:`DistributedError` if a group has other members than it should, and what the backend
    raises if they cannot connect.
    """
    axes = [mesh.world, *(mesh.axis(name) for name in AXES)]
    for axis in {axis.ranks: axis for axis in axes}.values():
        if axis.group is not None:
            # torch tells NCCL which ranks belong together by a hash, which two groups of a large world may share.
            found = torch.tensor([1, mesh.world.rank], device=mesh.device)
            dist.all_reduce(found, group=axis.group)
            if found.tolist() != [axis.size, sum(axis.ranks)]:
                raise DistributedError(
                    f"rank {mesh.world.rank}: the group of axis {axis.name} does not have the ranks it was made for\n"
                    "  this is a fault of torch or of NCCL: try another number of processes, or another layout."
                )
    for axis in (mesh.pp, mesh.cp):
        _send_around(axis, mesh.device)
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)


def _send_around(axis: Axis, device: torch.device) -> None:
    """A message from each member to both of its neighbours along the axis."""
    if axis.group is None:
        return
    neighbours = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    sent, received = torch.zeros(2, 2, 1, device=device)
    sends = [dist.P2POp(dist.isend, sent[i], neighbours[i], axis.group) for i in range(2)]
    receives = [dist.P2POp(dist.irecv, received[i], neighbours[1 - i], axis.group) for i in range(2)]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
