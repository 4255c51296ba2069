"""The distributed optimizer: an update rule over the slices that this rank owns of the gradient store's buckets."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megagap.config import Optim
from megagap.optim.buckets import BUCKET_ELEMENTS
from megagap.optim.gradient_store import Bucket, GradientStore
from megagap.optim.loss_scale import LossScale, NoLossScale
from megagap.optim.matrix_updates import MatrixRound, matrix_rounds
from megagap.optim.precision import has_masters
from megagap.optim.rules import MatrixRule, UpdateRule, rules_of
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
        self._rule, self._matrix_rule = rules_of(optim)
        self.store = GradientStore(
            parameters,
            mesh,
            dtype,
            gradient_dtype,
            exact=has_masters(optim),
            zero=optim.zero,
            decay_embeddings=optim.decay_embeddings,
            matrices_apart=self._matrix_rule is not None,
            bucket_elements=bucket_elements,
            blocks=blocks,
        )
        self.states = [self._rule_of(bucket).new_state(bucket.own_gradient) for bucket in self.store.buckets]
        """The rule's state of each bucket's slice, by kind."""
        self._segments = [bucket.segments(seed) for bucket in self.store.buckets]
        rounds = matrix_rounds(self.store, bucket_elements) if self._matrix_rule else ()
        self.rounds = {each.numbers[-1]: each for each in rounds}
        """Updates of whole matrices, by the last bucket of each."""
        self.loss_scale = LossScale(mesh.device) if dtype == torch.float16 else NoLossScale()
        self._updates = torch.zeros((), dtype=torch.float32, device=mesh.device)
        """Updates made, counted on the device."""

    def _rule_of(self, bucket: Bucket) -> UpdateRule | MatrixRule:
        return self._matrix_rule if self._matrix_rule is not None and bucket.kind.is_matrix else self._rule

    def step(self, lr: float, divisor: Tensor, accept: Tensor, updating: Updating = unobserved) -> None:
        """Update this rank's slices with gradients / ``divisor``, where ``accept`` (a device bool); start gathering.

        The update of each bucket is in a ``with updating(bucket)``.
        """
        reject = (~accept).float()
        self._updates += accept
        # What the next forward pass needs first is updated first, and on its way while the rest is updated.
        for number, bucket in reversed(list(enumerate(self.store.buckets))):
            if number in self.rounds:
                self._update_matrices(self.rounds[number], lr, divisor, reject, updating)
            if bucket.kind.is_matrix:
                continue
            with updating(bucket):
                self._rule.update(
                    bucket.own_values,
                    bucket.remainder,
                    bucket.own_gradient,
                    self.states[number],
                    self._updates,
                    self._segments[number],
                    lr=lr,
                    divisor=divisor,
                    reject=reject,
                    decayed=bucket.kind.decayed,
                )
            bucket.publish()

    def _update_matrices(
        self, round_: MatrixRound, lr: float, divisor: Tensor, reject: Tensor, updating: Updating
    ) -> None:
        rule, numbers, states, segments = self._matrix_rule, round_.numbers, self.states, self._segments
        assert rule is not None
        prepared = [
            rule.prepare(bucket.own_gradient, states[n], self._updates, segments[n], divisor, reject)
            for n, bucket in zip(numbers, round_.buckets, strict=True)
        ]
        update_of = round_.updates(prepared, rule.compute)
        for bucket in round_.buckets:
            with updating(bucket):
                for part in bucket.slices("weight", bucket.own_values, bucket.remainder):
                    rule.apply(part.tensor, part.remainder, update_of(part), lr, reject, bucket.kind.decayed)
            bucket.publish()

    @property
    def master_dtype(self) -> torch.dtype:
        """What an update sees of the weights, and checkpoints hold."""
        bucket = self.store.buckets[0]
        return bucket.own_values.dtype if bucket.remainder is None else torch.float32

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
