"""The distributed optimizer: an update rule over the slices that this rank owns of the gradient store's buckets."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megagap.config import Optim
from megagap.optim.buckets import BUCKET_ELEMENTS
from megagap.optim.gradient_store import Bucket, GradientStore
from megagap.optim.loss_scale import LossScale, NoLossScale
from megagap.optim.precision import has_masters
from megagap.optim.rules import RULES
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Block, ShardedParameter, Slice

Updating = Callable[[Bucket], AbstractContextManager[None]]
"""What observes the update of a bucket."""


def unobserved(bucket: Bucket) -> AbstractContextManager[None]:
    return nullcontext()


class DistributedOptimizer:
    """Updates this rank's slices and publishes them. :attr:`store` has the gradients, and the order of a step."""

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        optim: Optim,
        mesh: Mesh,
        dtype: torch.dtype = torch.float32,
        bucket_elements: int = BUCKET_ELEMENTS,
        blocks: Sequence[Sequence[Block]] = (),
        seed: int = 0,
        gradient_dtype: torch.dtype | None = None,
    ) -> None:
        """``seed``: of rounding stochastically. The others: see :class:`GradientStore`."""
        self.store = GradientStore(
            parameters,
            mesh,
            dtype,
            gradient_dtype,
            exact=has_masters(optim),
            zero=optim.zero,
            decay_embeddings=optim.decay_embeddings,
            bucket_elements=bucket_elements,
            blocks=blocks,
        )
        self._rule = RULES[optim.name](optim)
        assert not self._rule.wants_matrices, "the store hands out slices of any shape"
        self.states = [self._rule.new_state(bucket.own_gradient) for bucket in self.store.buckets]
        """The rule's state of each bucket's slice, by kind."""
        self._segments = [bucket.segments(seed) for bucket in self.store.buckets]
        self.loss_scale = LossScale(mesh.device) if dtype == torch.float16 else NoLossScale()
        self._updates = torch.zeros((), dtype=torch.float32, device=mesh.device)
        """Updates made, counted on the device."""

    def step(self, lr: float, divisor: Tensor, accept: Tensor, updating: Updating = unobserved) -> None:
        """Update this rank's slices with gradients / ``divisor``, where ``accept`` (a device bool); start gathering.

        The update of each bucket is in a ``with updating(bucket)``.
        """
        reject = (~accept).float()
        self._updates += accept
        # What the next forward pass needs first is updated first, and on its way while the rest is updated.
        owned = list(zip(self.store.buckets, self.states, self._segments, strict=True))
        for bucket, state, segments in reversed(owned):
            with updating(bucket):
                self._rule.update(
                    bucket.own_values,
                    bucket.remainder,
                    bucket.own_gradient,
                    state,
                    self._updates,
                    segments,
                    lr=lr,
                    divisor=divisor,
                    reject=reject,
                    decayed=bucket.kind.decayed,
                )
            bucket.publish()

    @property
    def updates(self) -> int:
        """Updates made, skipped steps not counted."""
        return int(self._updates.item())

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates.fill_(value)

    def slices(self, owned_only: bool) -> list[Slice]:
        """Everything a checkpoint needs: ``weight`` (masters) and the rule's state, as views of this rank's slices.
        ``owned_only`` for saving, where every element must come from one rank only."""
        return [
            part
            for bucket, state in zip(self.store.buckets, self.states, strict=True)
            if bucket.is_owned or not owned_only
            for kind, tensor, remainder in [
                ("weight", bucket.own_values, bucket.remainder),
                *((kind, tensor, None) for kind, tensor in state.items()),
            ]
            for part in bucket.slices(kind, tensor, remainder)
        ]
