"""Proof, by arithmetic, that every element of every parameter has one owner among all ranks, and every group its place.

Nothing is allocated: the records of parameters come from stages without storage, one for each pipeline and
tensor-parallel rank; data-parallel ranks differ only in the slice of each bucket that they own.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from megagap.config import Settings
from megagap.model.shapes import model_tensors
from megagap.optim.buckets import Arrangement, Kind
from megagap.parallel.layout import Layout, Members
from megagap.parallel.shard import Shard
from megagap.planning.transient import StoredParameters


@dataclass(frozen=True)
class Holding:
    """What the data-parallel ranks of one pipeline and tensor-parallel rank hold."""

    rank: int
    """The first of them."""
    shards: tuple[Shard, ...]
    kinds: tuple[Kind, ...]
    elements: tuple[int, ...]
    """Of each parameter, with padding."""
    arrangement: Arrangement
    """Where they lie in buckets, of which each rank that shards them owns an equal slice."""
    slices: int = 1
    """How many ranks a bucket is sharded over. All groups of so many data ranks are alike, and the first counts."""

    @property
    def parameters(self) -> int:
        """Real elements, without padding."""
        return sum(shard.numel for shard in self.shards)


def holdings(settings: Settings, layout: Layout) -> list[Holding]:
    """Those of every pipeline and tensor-parallel rank."""
    first = [
        rank for rank in range(layout.world_size) if (place := layout.coordinates(rank))["dp"] == 0 and place["cp"] == 0
    ]
    return [_holding(settings, layout, rank) for rank in first]


def _holding(settings: Settings, layout: Layout, rank: int) -> Holding:
    stored = StoredParameters.of_rank(settings, layout, rank)
    shards = tuple(parameter.shard for parameter in stored.parameters)
    elements = tuple(parameter.numel() for parameter in stored.parameters)
    return Holding(rank, shards, tuple(stored.kinds), elements, stored.buckets, stored.sharding.shard.size)


def coverage_faults(settings: Settings, layout: Layout, held: Sequence[Holding]) -> Iterator[str]:
    """What is owned by no rank, or by several."""
    shapes = model_tensors(settings.model)
    owned: dict[str, list[tuple[Shard, int]]] = defaultdict(list)
    for holding in held:
        for shard in holding.shards:
            members = layout.members(shard.replica_axis, holding.rank) if shard.replica_axis else (holding.rank,)
            if members[0] == holding.rank:
                owned[shard.name].append((shard, holding.rank))
    for name, shape in shapes.items():
        yield from _tiling_faults(name, shape, owned.pop(name, []))
    for name in owned:
        yield f"{name}: rank {owned[name][0][1]} holds it, but the model has no such parameter"
    yield from _replica_faults(layout, held)
    for holding in held:
        yield from _slice_faults(holding, holding.slices)


def _tiling_faults(name: str, shape: tuple[int, ...], parts: Sequence[tuple[Shard, int]]) -> Iterator[str]:
    """Rectangles that do not overlap and have as many elements as the tensor tile it."""
    for shard, rank in parts:
        if shard.shape != shape:
            yield f"{name}: rank {rank} has it with shape {shard.shape} instead of {shape}"
            return
    parts = sorted((part for part in parts if part[0].numel), key=lambda part: (part[0].offsets, part[1]))
    for (left, rank), (right, other) in _pairs(parts):
        if all(
            a < b + m and b < a + n
            for a, n, b, m in zip(left.offsets, left.sizes, right.offsets, right.sizes, strict=True)
        ):
            yield f"{name}: elements from {right.offsets} on are owned by rank {rank} and by rank {other}"
            return
    elements = sum(shard.numel for shard, _ in parts)
    if elements != prod(shape):
        yield f"{name}: {prod(shape) - elements:,} of {prod(shape):,} elements are owned by no rank"


def _pairs(parts: Sequence[tuple[Shard, int]]) -> Iterator[tuple[tuple[Shard, int], tuple[Shard, int]]]:
    return ((left, right) for i, left in enumerate(parts) for right in parts[i + 1 :])


def _replica_faults(layout: Layout, held: Sequence[Holding]) -> Iterator[str]:
    """Ranks that share parameters have the same parts of them, at the same places of the same buckets."""
    by_rank = {holding.rank: _replicated(holding) for holding in held}
    for holding in held:
        for axis, mine in by_rank[holding.rank].items():
            for other in layout.members(axis, holding.rank):
                theirs = by_rank[other].get(axis)
                if theirs != mine:
                    names = sorted({str(row[0]) for row in set(mine) ^ set(theirs or ())})
                    yield (
                        f"{names[0] if names else axis}: ranks {holding.rank} and {other} share parameters over "
                        f"{axis}, but do not hold the same parts at the same places"
                    )
                    return


def _replicated(holding: Holding) -> dict[str, list[tuple[object, ...]]]:
    found: dict[str, list[tuple[object, ...]]] = defaultdict(list)
    for shard, kind, start in zip(holding.shards, holding.kinds, holding.arrangement.starts, strict=True):
        if kind.replica_axis:
            found[kind.replica_axis].append((shard.name, shard.offsets, shard.sizes, start, kind.partial_gradient))
    return found


def _slice_faults(holding: Holding, ranks: int) -> Iterator[str]:
    """The buckets of a kind follow each other without gaps, each in equal slices, and parameters lie in them apart."""
    arrangement = holding.arrangement
    for kind in set(holding.kinds):
        ranges = sorted((bucket.start, bucket.stop) for bucket in arrangement.buckets if bucket.kind == kind)
        end = 0
        for start, stop in ranges:
            if start != end:
                yield f"rank {holding.rank}: buckets {'overlap' if start < end else 'leave a gap'} at element {start:,}"
            if (stop - start) % ranks:
                yield f"rank {holding.rank}: a bucket of {stop - start:,} elements is not divided by {ranks} data ranks"
            end = stop
        places = sorted(
            (start, start + elements, shard.name)
            for shard, its, start, elements in zip(
                holding.shards, holding.kinds, arrangement.starts, holding.elements, strict=True
            )
            if its == kind
        )
        for (_, before, name), (start, _, other) in pairwise(places):
            if start < before:
                yield f"rank {holding.rank}: {name} and {other} overlap in their bucket"
        if places and places[-1][1] > end:
            yield f"rank {holding.rank}: {places[-1][2]} lies beyond the end of its buckets"


# -- groups


def group_faults(world_size: int, orders: Mapping[int, Sequence[Members]]) -> Iterator[str]:
    """Whether all members of every group make it, as the same of the groups that each of them makes: torch names a
    group after its members and their number. And whether making them in these orders comes to its end.

    ``orders``: for each rank, the groups that it makes, which it must be in.
    """
    places: dict[Members, dict[int, int]] = defaultdict(dict)
    for rank, groups in orders.items():
        for place, members in enumerate(groups):
            if rank not in members:
                yield f"rank {rank} makes the group of ranks {members[:8]}, of which it is none"
                return
            places[members][rank] = place
    for members, by_rank in places.items():
        for rank, place in by_rank.items():
            if place != by_rank.get(members[0], place):
                yield (
                    f"the group of ranks {members[:8]} is group {by_rank[members[0]] + 1} of rank {members[0]} and "
                    f"group {place + 1} of rank {rank}: groups are not made in one order on all ranks"
                )
                return
    todo = {rank: deque(orders.get(rank, ())) for rank in range(world_size)}
    ready = deque(range(world_size))
    arrived: dict[Members, set[int]] = defaultdict(set)
    while ready:
        rank = ready.popleft()
        if not todo[rank]:
            continue
        members = todo[rank][0]
        arrived[members].add(rank)
        if len(arrived[members]) == len(members):
            del arrived[members]
            for member in members:
                todo[member].popleft()
                ready.append(member)
    for rank, groups in todo.items():
        if groups:
            waiting = arrived[groups[0]]
            missing = next(member for member in groups[0] if member not in waiting)
            yield (f"rank {rank} waits for rank {missing} to make the group of ranks {groups[0][:8]}")
            return


def group_orders(layout: Layout) -> dict[int, list[Members]]:
    """The groups that every rank makes, in its order."""
    orders: dict[int, list[Members]] = {rank: [] for rank in range(layout.world_size)}
    for division in layout.divisions.values():
        for members in division:
            for rank in members:
                orders[rank].append(members)
    return orders
