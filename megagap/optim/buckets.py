"""Which parameters share a bucket: pure arithmetic, for any number of ranks.

Parameters of one kind lie end to end in one flat buffer, in the order in which the backward pass completes their
gradients; buckets are consecutive ranges of it. Each rank of the axis that they are sharded over owns an equal slice of
every bucket.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BUCKET_ELEMENTS = 25_000_000
"""Elements after which a bucket is closed: large enough for bandwidth, small enough to start early."""

ALIGNMENT = 64
"""Elements; parameters and slices start at multiples of 256 bytes in fp32, 128 in bf16."""


@dataclass(frozen=True)
class Kind:
    """What all parameters of a bucket have in common, so that every operation on it is on whole flat tensors."""

    decayed: bool
    replica_axis: str | None
    partial_gradient: bool
    is_matrix: bool = False
    """Matrices of layers, where a rule updates these whole."""


@dataclass(frozen=True)
class Range:
    """Elements ``[start, stop)`` of a kind's buffer: one bucket."""

    kind: Kind
    start: int
    stop: int
    parameters: tuple[int, ...]
    """Numbers of the parameters that it has elements of."""


@dataclass(frozen=True)
class Arrangement:
    """Where every parameter lies, and the buckets in the order in which the backward pass completes them."""

    starts: tuple[int, ...]
    """For each parameter, its first element in its kind's buffer."""
    buckets: tuple[Range, ...]

    def buffer_elements(self, kind: Kind) -> int:
        return max(bucket.stop for bucket in self.buckets if bucket.kind == kind)


def arrange(
    parameters: Sequence[tuple[Kind, int]],
    ranks: int,
    bucket_elements: int = BUCKET_ELEMENTS,
    *,
    cuts: bool = True,
    blocks: Sequence[int] | None = None,
    packs: Sequence[Hashable] | None = None,
) -> Arrangement:
    """Lay out ``parameters``, the kind and number of elements of each, in the order in which they are first used.

    ``ranks``: of the axis that buckets are sharded over, which divides the length of every bucket.
    ``cuts``: a parameter of more than two buckets' size is cut, so that its reduction is, too.
    ``blocks``: the block of each parameter; a bucket then has parameters of one block only.
    ``packs``: what the parameters of a pack have in common, None for others. A pack lies end to end, in its order.
    Where parameters are not cut, packs are neither, and one larger than a bucket, whose whole gradient would take too
    much memory at once, is none.
    """
    unit = ranks * ALIGNMENT
    piece = round_up(bucket_elements, unit)
    starts = [0] * len(parameters)
    opened: dict[Kind, int] = {}
    """The first element of each kind's open bucket."""
    ends: dict[Kind, int] = {}
    closed: list[tuple[Kind, int, int]] = []

    block = None
    for numbers in reversed(_units(parameters, packs, None if cuts else bucket_elements)):
        kind = parameters[numbers[0]][0]
        if blocks is not None and block not in (None, blocks[numbers[0]]):
            for other, first in opened.items():
                if first < ends[other]:
                    closed.append((other, first, round_up(ends[other], unit)))
                    opened[other] = ends[other] = round_up(ends[other], unit)
        block = None if blocks is None else blocks[numbers[0]]
        end = ends.get(kind, 0)
        for number in numbers:
            starts[number] = end
            end += parameters[number][1]
        first = opened.get(kind, 0)
        while cuts and end - first >= 2 * piece:
            closed.append((kind, first, first + piece))
            first += piece
        if end - first >= bucket_elements:
            closed.append((kind, first, round_up(end, unit)))
            first = end = round_up(end, unit)
        opened[kind], ends[kind] = first, round_up(end, ALIGNMENT)

    closed += [(kind, first, round_up(ends[kind], unit)) for kind, first in opened.items() if first < ends[kind]]
    members: dict[Kind, list[int]] = {}
    for number, (kind, _) in enumerate(parameters):
        members.setdefault(kind, []).append(number)

    def overlapping(kind: Kind, start: int, stop: int) -> tuple[int, ...]:
        return tuple(n for n in members[kind] if starts[n] < stop and starts[n] + parameters[n][1] > start)

    buckets = [Range(kind, start, stop, overlapping(kind, start, stop)) for kind, start, stop in closed]
    # One is complete with the last of its parameters, the first that is used. Stable: pieces of one stay in order.
    return Arrangement(tuple(starts), tuple(sorted(buckets, key=lambda bucket: -min(bucket.parameters))))


def _units(
    parameters: Sequence[tuple[Kind, int]], packs: Sequence[Hashable] | None, most: int | None
) -> list[list[int]]:
    """What lies end to end, in the order of its first use: the numbers of a pack of at most so many elements, or of one
    parameter."""
    packs = packs or [None] * len(parameters)
    sizes: Counter[Hashable] = Counter()
    for pack, (_, elements) in zip(packs, parameters, strict=True):
        sizes[pack] += elements
    units: dict[Hashable, list[int]] = {}
    for number, pack in enumerate(packs):
        together = pack is not None and (most is None or sizes[pack] <= most)
        unit = units.setdefault(("pack", pack) if together else number, [])
        unit.append(number)
        assert parameters[unit[0]][0] == parameters[number][0], f"parameters of several kinds in pack {pack}"
    return list(units.values())


def round_up(number: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-number // unit) * unit
