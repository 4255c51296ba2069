"""How much each rank sends in a step, by axis, by arithmetic. ``tests/planning/test_certificate.py`` holds it against
the calls of a simulated step."""

from collections import defaultdict
from dataclasses import dataclass

from megagap.config import Settings, timeline_of
from megagap.optim.precision import COMPUTE_DTYPES
from megagap.parallel.layout import Layout
from megagap.planning.coverage import Holding

FP32 = 4


@dataclass(frozen=True)
class Volume:
    """Of one rank in one step, on one axis."""

    given: int
    """Bytes of the whole tensors that its collectives and messages are about."""
    sent: int
    """Bytes that it sends if collectives go around a ring: (n - 1) / n of a gather or a scatter, twice that of a
    reduction to all."""


def volume_by_axis(settings: Settings, layout: Layout, stage: int, holding: Holding) -> dict[str, Volume]:
    """Of the first rank of a pipeline stage. A few scalars, such as the loss, are left out."""
    ledger = _Ledger(layout)
    _tensor_parallel(ledger, settings, layout, stage)
    _pipeline(ledger, settings, layout, stage)
    _gradients(ledger, settings, layout, holding)
    return ledger.volumes()


class _Ledger:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._given: dict[str, int] = defaultdict(int)
        self._sent: dict[str, float] = defaultdict(float)

    def gather_or_scatter(self, axis: str, whole_bytes: int, times: int = 1) -> None:
        self._add(axis, whole_bytes * times, 1)

    def reduce(self, axis: str, whole_bytes: int, times: int = 1) -> None:
        self._add(axis, whole_bytes * times, 2)

    def send(self, axis: str, size: int) -> None:
        self._given[axis] += size
        self._sent[axis] += size

    def _add(self, axis: str, size: int, passes: int) -> None:
        members = self.layout.size(axis)
        if members > 1:
            self._given[axis] += size
            self._sent[axis] += passes * size * (members - 1) / members

    def volumes(self) -> dict[str, Volume]:
        return {axis: Volume(given, round(self._sent[axis])) for axis, given in self._given.items() if given}


def _sizes(settings: Settings, layout: Layout) -> tuple[int, int, int]:
    """Microbatches of a rank, tokens of one, and bytes of an activation [b, s, h]."""
    train, timeline = settings.train, timeline_of(settings)
    microbatches = timeline.largest_batch // (train.micro_batch_size * layout.dp)
    tokens = train.micro_batch_size * timeline.sequence_lengths[-1]
    return microbatches, tokens, tokens * settings.model.hidden_size * COMPUTE_DTYPES[train.precision].itemsize


def _tensor_parallel(ledger: _Ledger, settings: Settings, layout: Layout, stage: int) -> None:
    """Two regions a layer, each entered and left forward and backward (docs/parallelism.md)."""
    if layout.tp == 1:
        return
    microbatches, tokens, activation = _sizes(settings, layout)
    splits = bool(settings.parallel.sequence_parallel)
    for virtual in settings.placement.stages_of(stage):
        layers = len(virtual.layers)
        if splits:
            # Forward: gather and scatter. Backward: gather the input again and scatter its gradient; gather.
            regions = 2 * layers * 5
            crossings = regions + 2 * virtual.has_embedding + 2 * virtual.has_head
            ledger.gather_or_scatter("tp", activation, crossings * microbatches)
        else:
            crossings = 4 * layers + virtual.has_embedding + virtual.has_head
            ledger.reduce("tp", activation, crossings * microbatches)
        if virtual.has_head:  # maximum, sum and target of every token
            wide = max(FP32, COMPUTE_DTYPES[settings.train.precision].itemsize)
            ledger.reduce("tp", 3 * tokens * wide, microbatches)


def _pipeline(ledger: _Ledger, settings: Settings, layout: Layout, stage: int) -> None:
    microbatches, _, activation = _sizes(settings, layout)
    message = activation // layout.tp if settings.parallel.sequence_parallel and layout.tp > 1 else activation
    placement = settings.placement
    for index, place in enumerate(placement.places):
        if place.rank == stage:
            for neighbour in (index - 1, index + 1):  # a gradient down, an activation up
                if 0 <= neighbour < len(placement.places) and placement.places[neighbour].rank != stage:
                    ledger.send("pp", message * microbatches)


def _gradients(ledger: _Ledger, settings: Settings, layout: Layout, holding: Holding) -> None:
    itemsize, ranks = COMPUTE_DTYPES[settings.train.precision].itemsize, layout.size("data")
    for bucket in holding.arrangement.buckets:
        elements = bucket.stop - bucket.start
        ledger.gather_or_scatter("data", elements * FP32)
        ledger.gather_or_scatter("data", elements * itemsize)
        if bucket.kind.partial_gradient and bucket.kind.replica_axis:
            ledger.reduce(bucket.kind.replica_axis, elements // ranks * FP32)
