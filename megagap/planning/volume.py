"""How much each rank sends in a step, by axis, by arithmetic. ``tests/planning/test_certificate.py`` holds it against
the calls of a simulated step."""

from collections import defaultdict
from dataclasses import dataclass
from math import gcd

from megagap.config import Settings, most_microbatches, timeline_of
from megagap.optim.precision import PRECISIONS
from megagap.parallel.layout import Layout
from megagap.planning.communication import Traffic, data_parallel_traffic
from megagap.planning.transient import FP32

ID = 4
"""Bytes of a token's id that ranks exchange."""


@dataclass(frozen=True)
class Volume:
    """Of one rank in one step, on one axis."""

    given: int
    """Bytes of the whole tensors that its collectives and messages are about."""
    sent: int
    """Bytes that it sends if collectives go around a ring: (n - 1) / n of a gather or a scatter, twice that of a
    reduction to all."""


def volume_by_axis(settings: Settings, layout: Layout, stage: int) -> dict[str, Volume]:
    """Of the first rank of a pipeline stage. A few scalars, such as the loss, are left out."""
    ledger = _Ledger(layout)
    _tensor_parallel(ledger, settings, layout, stage)
    _context(ledger, settings, layout, stage)
    _pipeline(ledger, settings, layout, stage)
    for traffic in data_parallel_traffic(settings, layout.world_size, stage):
        ledger.add(traffic)
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

    def add(self, traffic: Traffic) -> None:
        self._given[traffic.axis] += traffic.bytes
        self._sent[traffic.axis] += traffic.sent_bytes

    def _add(self, axis: str, size: int, passes: int) -> None:
        members = self.layout.size(axis)
        if members > 1:
            self._given[axis] += size
            self._sent[axis] += passes * size * (members - 1) / members

    def volumes(self) -> dict[str, Volume]:
        return {axis: Volume(given, round(self._sent[axis])) for axis, given in self._given.items() if given}


def _sizes(settings: Settings, layout: Layout) -> tuple[int, int, int]:
    """Microbatches of a rank, its tokens of one, and bytes of an activation [b, s / cp, h]."""
    train = settings.train
    tokens = train.micro_batch_size * timeline_of(settings).sequence_lengths[-1] // layout.cp
    microbatches = most_microbatches(settings, layout.dp)
    return microbatches, tokens, tokens * settings.model.hidden_size * PRECISIONS[train.precision].compute.itemsize


def _tensor_parallel(ledger: _Ledger, settings: Settings, layout: Layout, stage: int) -> None:
    """Two regions a layer, each entered and left forward and backward (docs/parallelism.md)."""
    if layout.tp == 1:
        return
    microbatches, tokens, activation = _sizes(settings, layout)
    splits, again = bool(settings.parallel.sequence_parallel), settings.train.recompute == "full"
    headless = settings.model.headless
    last_too = settings.model.norm_position == "post"  # the product that a layer which runs again leaves out otherwise
    wide = max(FP32, PRECISIONS[settings.train.precision].compute.itemsize)
    for virtual in settings.placement.stages_of(stage):
        layers = len(virtual.layers)
        if splits:
            # Forward: gather and scatter. Backward: gather the input again and scatter its gradient; gather. A layer
            # that runs again leaves out its last product.
            regions = layers * (2 * 5 + (3 + last_too if again else 0))
            crossings = regions + 2 * virtual.has_embedding + (0 if headless else 2 * virtual.has_head)
            ledger.gather_or_scatter("tp", activation, crossings * microbatches)
        else:
            crossings = (4 + (1 + last_too if again else 0)) * layers + virtual.has_embedding + virtual.has_head
            ledger.reduce("tp", activation, crossings * microbatches)
        if settings.model.qk_norm:  # a number per token for queries and one for keys, forward and backward
            ledger.reduce("tp", 2 * tokens * wide, (2 + again) * layers * microbatches)
        if virtual.has_head:  # maximum, sum and target of every token, or its loss
            ledger.reduce("tp", (1 if headless else 3) * tokens * wide, microbatches)
            if headless:  # the embeddings of the targets of whole sequences, and their gradients
                embeddings = layout.cp * tokens * settings.model.hidden_size
                ledger.reduce("tp", layout.cp * activation + embeddings * wide, microbatches)


def _context(ledger: _Ledger, settings: Settings, layout: Layout, stage: int) -> None:
    """Attention of every layer (docs/context_parallelism.md), and the targets of a headless model."""
    if layout.cp == 1:
        return
    model, mode, cp = settings.model, settings.parallel.context_mode, layout.cp
    microbatches, tokens, _ = _sizes(settings, layout)
    itemsize = PRECISIONS[settings.train.precision].compute.itemsize
    key_heads = max(1, model.num_key_value_heads // layout.tp)
    queries = tokens * model.num_attention_heads // layout.tp * model.head_dim
    keys = 2 * tokens * key_heads * model.head_dim  # and values
    forwards = 2 if settings.train.recompute == "full" else 1
    stages = settings.placement.stages_of(stage)
    if model.headless and any(virtual.has_head for virtual in stages):  # ids of targets
        ledger.gather_or_scatter("cp", cp * tokens * ID, microbatches)
    layers = sum(len(virtual.layers) for virtual in stages)
    times = layers * microbatches
    if mode == "alltoall":
        repeats = cp // gcd(cp, key_heads)
        ledger.gather_or_scatter("cp", (2 * queries + keys * repeats) * itemsize, (forwards + 1) * times)
    elif mode == "allgather":
        ledger.gather_or_scatter("cp", cp * keys * itemsize, (forwards + 1) * times)
        ledger.gather_or_scatter("cp", cp * keys * FP32, times)
    else:
        ledger.send("cp", (cp - 1) * keys * itemsize * (forwards + 1) * times)
        ledger.send("cp", cp * keys * FP32 * times)


def _pipeline(ledger: _Ledger, settings: Settings, layout: Layout, stage: int) -> None:
    microbatches, _, activation = _sizes(settings, layout)
    message = activation // layout.tp if settings.parallel.sequence_parallel and layout.tp > 1 else activation
    placement = settings.placement
    for index, place in enumerate(placement.places):
        if place.rank == stage:
            for neighbour in (index - 1, index + 1):  # a gradient down, an activation up
                if 0 <= neighbour < len(placement.places) and placement.places[neighbour].rank != stage:
                    ledger.send("pp", message * microbatches)
