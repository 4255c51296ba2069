"""Whether ranks that hold the same parameters hold the same bits: where not, the memory or the arithmetic of one is
faulty, and no number of the step need show it.

Compared are the parameters as the model reads them over the data ranks (but where ``optim.zero`` 3 shards them), this
rank's slice with the remainder of its masters over the parts of the data ranks that each hold everything, and whatever
tp, kv or embedding ranks hold alike.
"""

from collections import Counter, defaultdict

import torch
from torch import Tensor

from megagap.optim.gradient_hash import hash_of
from megagap.optim.gradient_store import GradientStore
from megagap.parallel.collectives import all_gather_flat_async
from megagap.parallel.mesh import Axis

OUTVOTED, TIED = 1.0, 2.0
"""What a rank is found to be: unlike most of its replicas, or unlike as many as it is like."""


def differing_replicas(store: GradientStore) -> Tensor:
    """Compare: fp32 [world], at this rank's place 0, :data:`OUTVOTED` or :data:`TIED`, elsewhere 0; the sum over the
    world says it of all ranks. Collective; waits for parameters that are being gathered. The host waits for nothing."""
    store.wait_for_parameters()
    sharding, device = store.sharding, store.mesh.device
    hashes: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.int64, device=device))
    axes: dict[str, Axis] = {}
    counts: Counter[str] = Counter()
    """Tensors hashed for each axis, by which they are told apart: ranks along it may have other buckets, too."""

    def add(axis: Axis, tensor: Tensor) -> None:
        if axis.size > 1:
            axes[axis.name] = axis
            hashes[axis.name] += hash_of(tensor, key=counts[axis.name])
            counts[axis.name] += 1

    for bucket in store.buckets:
        held = bucket.own_values if sharding.parameters else bucket.values
        if not sharding.parameters and sharding.shard.size > 1:
            add(store.mesh.data, held)
        add(sharding.replicate, bucket.own_values)
        if bucket.remainder is not None:
            add(sharding.replicate, bucket.remainder)
        if bucket.replicas is not None:
            add(bucket.replicas, held)
    found = torch.zeros(store.mesh.world.size, device=device)
    for name, axis in sorted(axes.items()):
        own, rank = _standing(hashes[name], axis), store.mesh.world.rank
        found[rank] = torch.maximum(found[rank], own)
    return found


def _standing(value: Tensor, axis: Axis) -> Tensor:
    """What this rank is among the members of an axis by its hash ``value``: fp32 scalar."""
    every = value.new_empty(axis.size)
    if (work := all_gather_flat_async(every, value.reshape(1), axis)) is not None:
        work.wait()
    alike = (every[:, None] == every).sum(1)
    own, most = alike[axis.rank], alike.max()
    is_tied = (alike == most).sum() > most
    return torch.where(own < most, OUTVOTED, torch.where(is_tied, TIED, 0.0))
