"""Which parameters share a bucket: pure arithmetic, for any number of ranks.

Parameters of one kind lie end to end in one flat buffer, in the order in which the backward pass completes their
gradients; buckets are consecutive ranges of it. Each rank of the data axis owns an equal slice of every bucket.
"""

from collections.abc import Sequence
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


def arrange(parameters: Sequence[tuple[Kind, int]], ranks: int, bucket_elements: int = BUCKET_ELEMENTS) -> Arrangement:
    """Lay out ``parameters``, the kind and number of elements of each, in the order in which they are first used.

    ``ranks``: of the data axis, which divides the length of every bucket. A parameter of more than two buckets' size
    is cut, so that its reduction is, too.
    """
    unit = ranks * ALIGNMENT
    piece = round_up(bucket_elements, unit)
    starts = [0] * len(parameters)
    opened: dict[Kind, int] = {}
    """The first element of each kind's open bucket."""
    ends: dict[Kind, int] = {}
    closed: list[tuple[int, Kind, int, int]] = []
    """With the number of the parameter that completes it."""
    earliest: dict[Kind, int] = {}

    for number in reversed(range(len(parameters))):
        kind, elements = parameters[number]
        earliest[kind] = number
        starts[number] = ends.get(kind, 0)
        end = starts[number] + elements
        first = opened.get(kind, 0)
        while end - first >= 2 * piece:
            closed.append((number, kind, first, first + piece))
            first += piece
        if end - first >= bucket_elements:
            closed.append((number, kind, first, round_up(end, unit)))
            first = end = round_up(end, unit)
        opened[kind], ends[kind] = first, round_up(end, ALIGNMENT)

    left = [(earliest[k], k, first, round_up(ends[k], unit)) for k, first in opened.items() if first < ends[k]]
    by_completion = sorted(closed + left, key=lambda bucket: -bucket[0])  # stable: pieces of a parameter stay in order
    members: dict[Kind, list[int]] = {}
    for number, (kind, _) in enumerate(parameters):
        members.setdefault(kind, []).append(number)

    def overlapping(kind: Kind, start: int, stop: int) -> tuple[int, ...]:
        return tuple(n for n in members[kind] if starts[n] < stop and starts[n] + parameters[n][1] > start)

    return Arrangement(
        tuple(starts),
        tuple(Range(kind, start, stop, overlapping(kind, start, stop)) for _, kind, start, stop in by_completion),
    )


def round_up(number: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-number // unit) * unit
