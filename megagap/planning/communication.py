"""What the ranks of a pipeline stage send each other in a step, by axis and kind, by arithmetic alone.

Counted are the collectives of data parallelism: gradients, their parts in replicas, parameters, and what is exchanged
for updates of whole matrices, over tensor-parallel ranks too (``optim/matrix_updates.py``). Left out are the
few numbers that all ranks agree on in a step, and what tensor and pipeline parallelism send.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from megagap.config import Settings, most_microbatches
from megagap.optim.buckets import BUCKET_ELEMENTS
from megagap.optim.matrix_updates import rounds_of
from megagap.optim.precision import PRECISIONS
from megagap.parallel.layout import Layout
from megagap.planning.memory import stored_parameters
from megagap.planning.transient import BF16, StoredParameters, transient
from megagap.training.mesh import make_layout

Collective = Literal["reduce-scatter", "all-gather", "all-reduce", "all-to-all"]
Tensors = Literal["gradients", "parameters", "updates"]

ROUNDS: dict[Collective, int] = {"reduce-scatter": 1, "all-gather": 1, "all-reduce": 2, "all-to-all": 1}
"""How often a rank passes on its share of the whole in a ring."""


@dataclass(frozen=True)
class Traffic:
    """All collectives of a step of one kind over one axis, of each rank that takes part."""

    axis: str
    ranks: int
    """Of a group of the axis."""
    collective: Collective
    tensors: Tensors
    calls: int
    bytes: int
    """Of the whole tensors, as each rank has them afterwards or before."""

    @property
    def sent_bytes(self) -> int:
        """What a rank sends, and receives, in a ring."""
        return ROUNDS[self.collective] * self.bytes * (self.ranks - 1) // self.ranks


def data_parallel_traffic(settings: Settings, world_size: int, stage: int = 0) -> list[Traffic]:
    """Of a step with the run's largest batch, on the ranks of a pipeline ``stage``; axes of one rank send nothing."""
    stored = stored_parameters(settings, world_size, stage)
    layout = make_layout(settings, world_size)
    found = [
        *_over_data(settings, world_size, stage, stored),
        *_over_replicas(stored),
        *_of_matrices(settings, layout, stored),
    ]
    return [
        Traffic(axis, layout.size(axis), collective, tensors, calls, size)
        for axis, collective, tensors, calls, size in found
        if layout.size(axis) > 1 and calls
    ]


_Entry = tuple[str, Collective, Tensors, int, int]


def _over_data(settings: Settings, world_size: int, stage: int, stored: StoredParameters) -> Iterator[_Entry]:
    sharding, buckets = stored.sharding, stored.buckets.buckets
    itemsize, count = PRECISIONS[settings.train.precision].compute.itemsize, len(buckets)
    if settings.optim.zero == 0:
        yield "data", "all-reduce", "gradients", count, stored.gradient_bytes * stored.elements
        return
    reductions, gathers = dict.fromkeys(buckets, 1), dict.fromkeys(buckets, 1)
    if sharding.gradients:
        placement = settings.placement
        microbatches = most_microbatches(settings, make_layout(settings, world_size).dp)
        actions = list(settings.schedule(stage, placement.ranks, placement.chunks, microbatches))
        held = transient(stored, actions, itemsize)
        reductions = dict(held.reductions)
        gathers = dict(held.gathers) if sharding.parameters else gathers
    size = lambda counts: sum((bucket.stop - bucket.start) * times for bucket, times in counts.items())  # noqa: E731
    yield "shard", "reduce-scatter", "gradients", sum(reductions.values()), stored.gradient_bytes * size(reductions)
    yield "replicate", "all-reduce", "gradients", count, stored.gradient_bytes * stored.elements // sharding.shard.size
    yield "shard", "all-gather", "parameters", sum(gathers.values()), itemsize * size(gathers)


def _over_replicas(stored: StoredParameters) -> Iterator[_Entry]:
    """Of parameters whose replicas each have a part of the gradient: their slices are summed."""
    axes = sorted(
        {b.kind.replica_axis for b in stored.buckets.buckets if b.kind.replica_axis and b.kind.partial_gradient}
    )
    for axis in axes:
        sizes = [
            (bucket.stop - bucket.start) // stored.sharding.shard.size
            for bucket in stored.buckets.buckets
            if bucket.kind.replica_axis == axis and bucket.kind.partial_gradient
        ]
        yield axis, "all-reduce", "gradients", len(sizes), stored.gradient_bytes * sum(sizes)


def _of_matrices(settings: Settings, layout: Layout, stored: StoredParameters) -> Iterator[_Entry]:
    """What updates are computed from, and the updates: in bf16, as on a GPU, and on average over the ranks."""
    sharding = stored.sharding
    shards, data = sharding.shard.size, sharding.shard.size * sharding.replicate.size
    matrices = [p.shard for p, kind in zip(stored.parameters, stored.kinds, strict=True) if kind.is_matrix]
    rounds = len(list(rounds_of(stored.buckets, data * BUCKET_ELEMENTS)))
    parts = BF16 * sum(shard.numel for shard in matrices)
    wholes = BF16 * sum(prod(shard.shape) for shard in matrices)
    yield "shard", "all-to-all", "updates", 2 * rounds if shards > 1 else 0, 2 * parts // data
    # Of ranks that have the same part, one gives it and all take it.
    yield "tp", "all-to-all", "updates", 2 * rounds, (wholes // layout.tp + parts) // data
    copies = "replicate" if settings.optim.zero else "data"
    yield copies, "all-to-all", "updates", rounds, parts // shards
