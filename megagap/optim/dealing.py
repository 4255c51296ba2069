"""Which rank computes the update of which matrix, where a rule needs whole ones: arithmetic only.

Matrices are dealt over all ranks of a pipeline stage, data-parallel and tensor-parallel, so that each has about the
same work. Only the numbers that a matrix is made of travel, and only to the rank that needs them: with n ranks, each
sends and receives about 1/n of all.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagap.optim.buckets import Arrangement, Range
from megagap.parallel.shard import Shard


class Grid(NamedTuple):
    """The ranks of a pipeline stage by axis: how many, or a place among them."""

    replicate: int
    """Those that have the same slices."""
    shard: int
    """Those that buckets are sharded over."""
    tp: int

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tp

    def place(self, number: int) -> "Grid":
        """Of one of so many ranks."""
        rest, tp = divmod(number, self.tp)
        return Grid(*divmod(rest, self.shard), tp)


class Part(NamedTuple):
    """What a tensor-parallel rank has of a matrix, flattened; several have the same where they share heads."""

    matrix: int
    """The number of the parameter."""
    place: int
    """Among the parts."""
    size: int
    """Elements."""


class Piece(NamedTuple):
    """What a slice of a bucket has of such a part: consecutive elements."""

    matrix: int
    bucket: int
    rank: int
    """Along the axis that buckets are sharded over: whose slice it is."""
    first: int
    """The first of them in the slice."""
    start: int
    """The first of them in the part."""
    size: int


@dataclass(frozen=True)
class Matrix:
    """Of the ranks of a pipeline stage together."""

    number: int
    shape: tuple[int, ...]
    dim: int
    """The one that its parts are concatenated along."""
    parts: tuple[Part, ...]
    pieces: tuple[Piece, ...]
    """Of any part, in order."""
    worker: Grid
    """The place of the rank that computes its update."""

    def part_shape(self) -> tuple[int, ...]:
        return tuple(size // len(self.parts) if dim == self.dim else size for dim, size in enumerate(self.shape))

    def part_of(self, rank: int, ranks: int) -> Part:
        """That of one of ``ranks`` tensor-parallel ranks: neighbours have the same where there are fewer parts."""
        return self.parts[rank * len(self.parts) // ranks]

    def senders(self, ranks: int) -> range:
        """Of tensor-parallel ranks that have the same part, the first; by part."""
        return range(0, ranks, ranks // len(self.parts))


@dataclass(frozen=True)
class Round:
    """Matrices whose updates are computed at one time, and all buckets that they lie in."""

    buckets: tuple[int, ...]
    """Their numbers, in the order of their use."""
    matrices: tuple[Matrix, ...]


def deal(
    shards: Sequence[Shard],
    arrangement: Arrangement,
    ranks: Grid,
    bucket_elements: int,
    work: Callable[[int, int], int],
) -> list[Round]:
    """All rounds of an update, on all ranks of the stage alike, in the order in which parameters are used.

    ``shards``: of all parameters of this rank, as they are numbered in the ``arrangement``. ``work``: what a matrix of
    so many rows and columns costs. A matrix goes to the rank with the least work so far, the most costly of a round
    first (longest processing time first; Graham 1969).
    """
    pieces = _pieces(shards, arrangement, ranks.shard)
    loads = [0] * ranks.ranks
    rounds = []
    for buckets in rounds_of(arrangement, ranks, bucket_elements):
        numbers = dict.fromkeys(number for bucket in buckets for number in arrangement.buckets[bucket].parameters)
        costs = {number: work(*shards[number].shape) for number in numbers}
        matrices = []
        for number in sorted(numbers, key=lambda number: -costs[number]):
            worker = loads.index(min(loads))
            loads[worker] += costs[number]
            matrices.append(_matrix(number, shards[number], pieces[number], ranks.place(worker)))
        rounds.append(Round(buckets, tuple(matrices)))
    return rounds


def rounds_of(arrangement: Arrangement, ranks: Grid, bucket_elements: int) -> Iterator[tuple[int, ...]]:
    """The numbers of the buckets of each round: as few as let each rank hold about a bucket's elements, and whole
    matrices."""
    touching: dict[int, set[int]] = defaultdict(set)
    for number, bucket in enumerate(arrangement.buckets):
        for parameter in bucket.parameters:
            touching[parameter].add(number)
    enough = bucket_elements * ranks.replicate * ranks.shard
    opened: list[int] = []
    elements, needed = 0, set[int]()
    for number, bucket in reversed(list(enumerate(arrangement.buckets))):
        if bucket.kind.is_matrix:
            opened.append(number)
            elements += bucket.stop - bucket.start
            needed |= {other for parameter in bucket.parameters for other in touching[parameter]}
            if elements >= enough and len(needed) == len(opened):
                yield tuple(opened)
                opened, elements, needed = [], 0, set()
    if opened:
        yield tuple(opened)


def _pieces(shards: Sequence[Shard], arrangement: Arrangement, ranks: int) -> Mapping[int, list[Piece]]:
    found: dict[int, list[Piece]] = defaultdict(list)
    for number, bucket in enumerate(arrangement.buckets):
        if bucket.kind.is_matrix:
            for piece in _pieces_of(number, bucket, shards, arrangement.starts, ranks):
                found[piece.matrix].append(piece)
    return found


def _pieces_of(
    number: int, bucket: Range, shards: Sequence[Shard], starts: Sequence[int], ranks: int
) -> Iterator[Piece]:
    length = (bucket.stop - bucket.start) // ranks
    for parameter in bucket.parameters:
        begin = starts[parameter]
        place, stop = max(begin, bucket.start), min(begin + shards[parameter].numel, bucket.stop)
        while place < stop:
            rank = (place - bucket.start) // length
            slice_start = bucket.start + rank * length
            size = min(stop, slice_start + length) - place
            yield Piece(parameter, number, rank, place - slice_start, place - begin, size)
            place += size


def _matrix(number: int, shard: Shard, pieces: Sequence[Piece], worker: Grid) -> Matrix:
    assert shard.sizes == shard.local_shape, f"{shard.name} has padding"
    counts = [whole // own for whole, own in zip(shard.shape, shard.sizes, strict=True)]
    parts = max(counts)
    return Matrix(
        number,
        shard.shape,
        counts.index(parts),
        tuple(Part(number, place, shard.numel) for place in range(parts)),
        tuple(sorted(pieces, key=lambda piece: piece.start)),
        worker,
    )
