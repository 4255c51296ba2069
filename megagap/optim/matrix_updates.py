"""Updates of whole matrices, by ranks that have slices of them (docs/optimizers.md).

Matrices are dealt over all ranks of a pipeline stage, so that each has about the same work, in rounds. In a round,
slices of a tensor-parallel rank's part of a matrix go to one data-parallel rank, and the parts to one tensor-parallel
rank, which computes the update. It goes back the same way, and to replicas that have the same slices. So each matrix is
computed once, from the same numbers whatever the layout: updates are the same bits in all of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from megagap.optim.buckets import Arrangement
from megagap.optim.gradient_store import GradientStore
from megagap.parallel.collectives import all_to_all_uneven
from megagap.parallel.mesh import Axis
from megagap.parallel.shard import Shard, Slice


class Piece(NamedTuple):
    """Consecutive elements of a matrix, flattened part by part as tensor parallelism splits it."""

    name: str
    start: int
    size: int


class Worker(NamedTuple):
    """The place of a rank along the axes of replicas, of sharding, and of tensor parallelism."""

    replicate: int
    shard: int
    tp: int


def matrix_rounds(store: GradientStore, bucket_elements: int) -> "Iterator[MatrixRound]":
    """All rounds of a step, in the order in which the forward pass uses the parameters; alike on all ranks.

    A matrix goes to the rank with the least work so far, the most costly of a round first (Graham 1969).
    """
    sharding, tp = store.sharding, store.mesh.tp
    data = sharding.replicate.size * sharding.shard.size
    loads = [0] * (data * tp.size)
    for numbers in rounds_of(store.arrangement, data * bucket_elements):
        costs = {
            place.parameter.shard: _work(place.parameter.shard) for n in numbers for place in store.buckets[n].places
        }
        workers: dict[Shard, Worker] = {}
        for shard in sorted(costs, key=lambda shard: -costs[shard]):
            rank = loads.index(min(loads))
            loads[rank] += costs[shard]
            workers[shard] = Worker(*divmod(rank // tp.size, sharding.shard.size), rank % tp.size)
        yield MatrixRound(store, numbers, workers)


def rounds_of(arrangement: Arrangement, elements: int) -> Iterator[list[int]]:
    """The numbers of the buckets of each round: as few as have so many elements, and their matrices whole."""
    buckets = arrangement.buckets
    missing_pieces = Counter(parameter for bucket in buckets for parameter in bucket.parameters)
    opened: list[int] = []
    for number, bucket in reversed(list(enumerate(buckets))):
        if bucket.kind.is_matrix:
            opened.append(number)
            missing_pieces.subtract(bucket.parameters)
            is_whole = not any(missing_pieces[parameter] for n in opened for parameter in buckets[n].parameters)
            if is_whole and sum(buckets[n].stop - buckets[n].start for n in opened) >= elements:
                yield opened
                opened = []
    if opened:
        yield opened


def _work(shard: Shard) -> int:
    """In proportion to products of a matrix with its Gram matrix, and of that with itself."""
    shorter, longer = sorted(shard.shape)
    return 2 * shorter**2 * longer + shorter**3


class MatrixRound:
    """Some buckets on one rank, and the exchanges with others that make their matrices whole."""

    def __init__(self, store: GradientStore, numbers: Sequence[int], workers: Mapping[Shard, Worker]) -> None:
        """``numbers``: of the buckets. ``workers``: which rank computes each of their matrices."""
        self.numbers, self.workers, self._tp = numbers, workers, store.mesh.tp
        self.buckets = [store.buckets[number] for number in numbers]
        replicate, shard, tp = store.sharding.replicate, store.sharding.shard, store.mesh.tp
        self._pieces: dict[Shard, list[tuple[int, Piece]]] = {record: [] for record in workers}
        """Of this rank's part of each matrix, in order, with the rank that has it in its slice."""
        for rank in range(shard.size):
            for bucket in self.buckets:
                for record, start, size in bucket.pieces(rank):
                    self._pieces[record].append((rank, self._piece(record, start, size)))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[1].start)
        alike = [record for record, worker in workers.items() if worker.replicate == replicate.rank]
        self._parts = [record for record in alike if workers[record].shard == shard.rank]
        """Matrices of which this rank's part is put together here."""
        self._whole = [record for record in self._parts if workers[record].tp == tp.rank]
        slices = [(rank, workers[record].shard, piece) for record in alike for rank, piece in self._pieces[record]]
        own = [(workers[r].replicate, p) for r in workers for rank, p in self._pieces[r] if rank == shard.rank]
        ways = [(t, workers[record].tp, self._part(record, t)) for record in self._parts for t in range(tp.size)]
        # Of ranks that have the same part, the first gives it, and all get its update.
        firsts = [way for i, way in enumerate(ways) if way[0] == 0 or ways[i - 1][2] != way[2]]
        self._gather_slices = Exchange(shard, slices)
        self._gather_parts = Exchange(tp, firsts)
        self._return_parts = Exchange(tp, ((there, here, part) for here, there, part in ways))
        self._return_slices = Exchange(shard, ((there, here, piece) for here, there, piece in slices))
        self._copy = Exchange(replicate, ((here, r, piece) for here, piece in own for r in range(replicate.size)))

    @property
    def exchanges(self) -> tuple["Exchange", ...]:
        """In the order in which they are made."""
        return self._gather_slices, self._gather_parts, self._return_parts, self._return_slices, self._copy

    def updates(self, prepared: Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Callable[[Slice], Tensor]:
        """What each part of this rank's slices is to be updated with. Collective over the stage.

        ``prepared``: of each bucket, the slice of what updates are computed from [n]. ``compute``: makes the update of
        a matrix [rows, columns].
        """
        like, pieces = prepared[0], self._pieces
        given = (part for bucket, x in zip(self.buckets, prepared, strict=True) for part in bucket.slices("", x))
        slices = self._gather_slices({self._piece_of(part): part.tensor for part in given}, like)
        own = {self._part(r): _joined([slices[piece] for _, piece in pieces[r]]) for r in self._parts}
        parts = self._gather_parts(own, like)
        computed = dict(part for record in self._whole for part in self._computed(record, parts, compute))
        parts = self._return_parts(computed, like)
        own = {}
        for record in self._parts:
            names = [piece for _, piece in pieces[record]]
            own |= zip(names, parts[self._part(record)].split([piece.size for piece in names]), strict=True)
        found = self._copy(self._return_slices(own, like), like)
        return lambda part: found[self._piece_of(part)]

    def _computed(
        self, record: Shard, parts: Mapping[Piece, Tensor], compute: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Piece, Tensor]]:
        """The update of a matrix, by parts."""
        names = list(dict.fromkeys(self._part(record, t) for t in range(self._tp.size)))
        split = next((dim for dim in range(2) if record.sizes[dim] != record.shape[dim]), 0)
        whole = _joined([parts[name].view(record.sizes) for name in names], split)
        return zip(names, (part.flatten() for part in compute(whole).chunk(len(names), split)), strict=True)

    def _part(self, record: Shard, rank: int | None = None) -> Piece:
        """All that a tensor-parallel rank, by default this one, has of a matrix: neighbours share a part where there
        are fewer parts than ranks."""
        assert record.sizes == record.local_shape, f"{record.name} has padding"
        parts, rank = prod(record.shape) // record.numel, self._tp.rank if rank is None else rank
        return Piece(record.name, rank * parts // self._tp.size * record.numel, record.numel)

    def _piece(self, record: Shard, start: int, size: int) -> Piece:
        return Piece(record.name, self._part(record).start + start, size)

    def _piece_of(self, part: Slice) -> Piece:
        return self._piece(part.shard, part.start, part.stop - part.start)


class Exchange:
    """Pieces of matrices that members of an axis give each other."""

    def __init__(self, axis: Axis, ways: Iterable[tuple[int, int, Piece]]) -> None:
        """``ways``: from whom, to whom, what; on all members in the same order."""
        self.axis = axis
        own = [way for way in ways if axis.rank in way[:2]]
        self.given = sorted((way for way in own if way[0] == axis.rank), key=lambda way: way[1])
        self.taken = sorted((way for way in own if way[1] == axis.rank), key=lambda way: way[0])
        self._sizes = [0] * axis.size, [0] * axis.size
        for _, there, piece in self.given:
            self._sizes[0][there] += piece.size
        for here, _, piece in self.taken:
            self._sizes[1][here] += piece.size

    def __call__(self, tensors: Mapping[Piece, Tensor], like: Tensor) -> Mapping[Piece, Tensor]:
        """Flat tensors for flat tensors, of the dtype and on the device of ``like``."""
        if self.axis.size == 1:
            return tensors
        sent = torch.cat([like.new_empty(0), *(tensors[piece] for _, _, piece in self.given)])
        received = all_to_all_uneven(sent, *self._sizes, self.axis)
        pieces = [piece for _, _, piece in self.taken]
        return dict(zip(pieces, received.split([piece.size for piece in pieces]), strict=True))


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
