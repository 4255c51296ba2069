"""The exchange of slices for whole matrices, and of these for the slices of their updates (``dealing.py``).

Five exchanges are made in a round: slices of a tensor-parallel rank's part of a matrix go to one data-parallel rank,
the parts to one tensor-parallel rank, which computes the update; its parts go back, their slices, and copies of the
slices to the ranks that have the same. Over axes of one rank nothing is done. All that is computed, is computed by one
rank from the same numbers: the updates are the same bits in every layout.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from megagap.optim.dealing import Grid, Matrix, Part, Piece, Round
from megagap.parallel.collectives import all_to_all_uneven
from megagap.parallel.mesh import Axis

Key = TypeVar("Key", Part, Piece)


@dataclass(frozen=True)
class Route(Generic[Key]):
    """An exchange over an axis, as one of its members sees it."""

    axis: Axis
    given: Sequence[Sequence[Key]]
    """To each member."""
    taken: Sequence[Sequence[Key]]
    """From each member."""

    @classmethod
    def of(cls, axis: Axis, journeys: Iterable[tuple[int, int, Key]]) -> "Route[Key]":
        """``journeys``: (from, to, what), in an order that both have."""
        given: list[list[Key]] = [[] for _ in axis.ranks]
        taken: list[list[Key]] = [[] for _ in axis.ranks]
        for source, target, key in journeys:
            if source == axis.rank:
                given[target].append(key)
            if target == axis.rank:
                taken[source].append(key)
        return cls(axis, given, taken)

    @property
    def back(self) -> "Route[Key]":
        return Route(self.axis, self.taken, self.given)

    def exchange(self, tensors: Mapping[Key, Tensor], like: Tensor) -> Mapping[Key, Tensor]:
        """Flat tensors for flat tensors. Collective. ``like``: what has their dtype and device."""
        if self.axis.size == 1:
            return tensors
        sent = torch.cat([like.new_empty(0), *(tensors[key] for keys in self.given for key in keys)])
        given, taken = ([sum(key.size for key in keys) for keys in side] for side in (self.given, self.taken))
        received = all_to_all_uneven(sent, given, taken, self.axis)
        keys = [key for keys in self.taken for key in keys]
        return dict(zip(keys, received.split([key.size for key in keys]), strict=True))


class MatrixUpdates:
    """A :class:`Round` on one rank."""

    def __init__(self, round_: Round, replicate: Axis, shard: Axis, tp: Axis) -> None:
        me = Grid(replicate.rank, shard.rank, tp.rank)
        self.buckets = round_.buckets
        self._tp = tp
        alike = [m for m in round_.matrices if m.worker.replicate == me.replicate]
        self._parts = [m for m in alike if m.worker.shard == me.shard]
        """Whose part is put together here."""
        self._whole = [m for m in self._parts if m.worker.tp == me.tp]
        self._own = [piece for m in alike for piece in m.pieces if piece.rank == me.shard]
        self._slices = Route.of(shard, ((piece.rank, m.worker.shard, piece) for m in alike for piece in m.pieces))
        self._gather = Route.of(
            tp, ((t, m.worker.tp, m.part_of(t, tp.size)) for m in self._parts for t in m.senders(tp.size))
        )
        self._scatter = Route.of(
            tp, ((m.worker.tp, t, m.part_of(t, tp.size)) for m in self._parts for t in range(tp.size))
        )
        self._copies = Route.of(
            replicate,
            (
                (m.worker.replicate, r, piece)
                for m in round_.matrices
                for piece in m.pieces
                if piece.rank == me.shard
                for r in range(replicate.size)
            ),
        )

    def of(self, prepared: Mapping[int, Tensor], compute: Callable[[Tensor], Tensor]) -> Mapping[Piece, Tensor]:
        """The updates of this rank's slices. Collective over the stage.

        ``prepared``: by number of the bucket, the slice of what updates are computed from [n]. ``compute``: makes a
        whole matrix's update.
        """
        like = prepared[self.buckets[0]]
        pieces: Mapping[Piece, Tensor] = {
            piece: prepared[piece.bucket][piece.first : piece.first + piece.size] for piece in self._own
        }
        pieces = self._slices.exchange(pieces, like)
        parts: Mapping[Part, Tensor] = {
            self._part(m): _joined([pieces[piece] for piece in m.pieces]) for m in self._parts
        }
        parts = self._gather.exchange(parts, like)
        parts = {part: flat for m in self._whole for part, flat in _update_parts(m, parts, compute)}
        parts = self._scatter.exchange(parts, like)
        pieces = {
            piece: parts[self._part(m)][piece.start : piece.start + piece.size]
            for m in self._parts
            for piece in m.pieces
        }
        return self._copies.exchange(self._slices.back.exchange(pieces, like), like)

    def _part(self, matrix: Matrix) -> Part:
        return matrix.part_of(self._tp.rank, self._tp.size)


def _update_parts(
    matrix: Matrix, parts: Mapping[Part, Tensor], compute: Callable[[Tensor], Tensor]
) -> Iterable[tuple[Part, Tensor]]:
    whole = _joined([parts[part].view(matrix.part_shape()) for part in matrix.parts], matrix.dim)
    for part, update in zip(matrix.parts, compute(whole).chunk(len(matrix.parts), matrix.dim), strict=True):
        yield part, update.flatten()


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
