"""The distributed optimizer: flat buckets whose gradients are reduce-scattered while backward still runs.

Each data-parallel rank owns an equal slice of every bucket: its fp32 master weights, its AdamW moments and its summed
gradient (ZeRO stage 1; Rajbhandari et al. 2020, section 5.1). After the update the slices are all-gathered into the
parameters, which are views of the bucket.

A bucket holds parameters of one kind (same decay, same replicas), so that every operation on it is on whole flat
tensors: one weight decay, one reduction over replicas, one answer to "does this rank count it in the norm".
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.config import Optim
from megagap.ops import adamw_
from megagap.ops.products import add_product
from megagap.ops.wide import wide_dtype
from megagap.optim.adamw import Moments
from megagap.optim.clipping import squared_norm
from megagap.parallel.collectives import all_gather_flat_async, all_reduce, reduce_scatter_flat_async
from megagap.parallel.mesh import Axis, Mesh
from megagap.parallel.shard import ShardedParameter, Slice

BUCKET_ELEMENTS = 25_000_000
"""Elements after which a bucket is closed: large enough for bandwidth, small enough to start early."""

_ALIGNMENT = 64
"""Elements; slices are aligned to 256 bytes in fp32, 128 in bf16."""


@dataclass(frozen=True)
class Kind:
    """What all parameters of a bucket have in common."""

    decayed: bool
    replica_axis: str | None
    partial_gradient: bool


class Bucket:
    """Parameters laid out end to end in one flat buffer, of which this data rank owns a slice."""

    def __init__(self, kind: Kind, parameters: list[ShardedParameter], mesh: Mesh, dtype: torch.dtype) -> None:
        """``parameters``: in fp32 with their initial values; they become views of the bucket in ``dtype``."""
        self.kind, self.parameters, self.data = kind, parameters, mesh.data
        self.replicas: Axis | None = mesh.axis(kind.replica_axis) if kind.replica_axis else None
        self.starts: list[int] = []
        length = 0
        for parameter in parameters:
            self.starts.append(length)
            length += parameter.numel()
        length = -(-length // (self.data.size * _ALIGNMENT)) * self.data.size * _ALIGNMENT
        slice_length = length // self.data.size
        self.first = self.data.rank * slice_length

        sums = wide_dtype(dtype)
        initial = torch.zeros(length, dtype=sums, device=mesh.device)
        for parameter, start in zip(parameters, self.starts, strict=True):
            initial[start : start + parameter.numel()].view_as(parameter).copy_(parameter.detach())
        self.values = initial.to(dtype)
        self.own_values = self.values[self.first : self.first + slice_length]
        for parameter, start in zip(parameters, self.starts, strict=True):
            parameter.data = self.values[start : start + parameter.numel()].view_as(parameter)
        # In fp32 the parameters are their own masters.
        self.master = self.own_values if dtype == sums else initial[self.first : self.first + slice_length].clone()
        self.gradients = torch.zeros(length, dtype=sums, device=mesh.device)
        self.moments = Moments.zeros_like(self.master)
        self.own_gradient = self.gradients if self.data.size == 1 else torch.zeros_like(self.master)
        self.missing: list[int] = []
        """For each parameter, how many of its uses have yet to report in the last backward."""
        self.reduction: dist.Work | None = None
        self.gathering: dist.Work | None = None

    @property
    def is_owned(self) -> bool:
        """Whether this rank, among the ranks with the same parameters, counts and saves them."""
        return self.replicas is None or self.replicas.rank == 0

    def gradient(self, index: int) -> Tensor:
        """Where a parameter's gradient is summed: fp32, shaped like it."""
        parameter, start = self.parameters[index], self.starts[index]
        return self.gradients[start : start + parameter.numel()].view_as(parameter)

    def start_reduction(self) -> None:
        if self.data.size > 1:
            self.reduction = reduce_scatter_flat_async(self.own_gradient, self.gradients, self.data)

    def finish_reduction(self) -> None:
        """``own_gradient`` is then the sum over data ranks and over replicas with partial gradients."""
        if self.reduction is not None:
            self.reduction.wait()
            self.reduction = None
        # Replicas lay out their buckets alike, so slices can be summed: 1 / data of the traffic of whole gradients.
        if self.kind.partial_gradient and self.replicas is not None:
            all_reduce(self.own_gradient, self.replicas)

    @property
    def rounded(self) -> Tensor | None:
        """This rank's slice of the parameters, if they are the masters rounded to another dtype."""
        return None if self.master is self.own_values else self.own_values

    def start_gather(self) -> None:
        """Publish this rank's slice."""
        if self.data.size > 1:
            self.gathering = all_gather_flat_async(self.values, self.own_values, self.data)

    def finish_gather(self) -> None:
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def slices(self, kind: str, tensor: Tensor) -> Iterator[Slice]:
        """The parts of parameters, without padding, that this rank's slice ``tensor`` covers."""
        for parameter, start in zip(self.parameters, self.starts, strict=True):
            begin = max(self.first, start)
            end = min(self.first + tensor.numel(), start + parameter.shard.numel)
            if begin < end:
                part = tensor[begin - self.first : end - self.first]
                yield Slice(kind, parameter.shard, begin - start, end - start, part)


class _Sink:
    """A parameter's part of its bucket, as operations and autograd add to it."""

    def __init__(self, bucket: Bucket, index: int, report: Callable[[Bucket, int], None]) -> None:
        self.bucket, self.index, self.report = bucket, index, report

    def add_product(self, left: Tensor, right: Tensor) -> None:
        add_product(self.bucket.gradient(self.index)[: left.shape[1]], left, right)

    def finished(self) -> None:
        self.report(self.bucket, self.index)

    def collect(self, parameter: Tensor) -> None:
        """Autograd's hook: move the gradient into the bucket."""
        if parameter.grad is None:  # an operation added it itself, or will: some releases of torch run the hook too
            return
        self.bucket.gradient(self.index).add_(parameter.grad)
        parameter.grad = None
        self.finished()


def _collect(parameter: Tensor) -> None:
    """Autograd's hook. A method of the sink would do, but torch hides what a hook refers to from Python's garbage
    collector: the optimizer, its memory and its process groups would then live as long as the process."""
    parameter.sink.collect(parameter)  # type: ignore[attr-defined]


class DistributedOptimizer:
    """AdamW over this rank's slices. Parameters become views of flat buckets: build it before anything reads them."""

    def __init__(
        self,
        parameters: Iterable[ShardedParameter],
        optim: Optim,
        mesh: Mesh,
        dtype: torch.dtype = torch.float32,
        bucket_elements: int = BUCKET_ELEMENTS,
    ) -> None:
        """``parameters``: in fp32, with their initial values; they are in ``dtype`` afterwards, their masters fp32."""
        self.optim, self.mesh = optim, mesh
        self.buckets = _fill_buckets(list(parameters), optim, mesh, dtype, bucket_elements)
        self._next_reduction = len(self.buckets)
        self._last_backward = False
        for bucket in self.buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.sink = _Sink(bucket, index, self._reported)
                parameter.register_post_accumulate_grad_hook(_collect)

    # -- gradients

    def zero_gradients(self) -> None:
        """Before the first backward of a step."""
        for bucket in self.buckets:
            bucket.gradients.zero_()
            bucket.missing = [parameter.uses for parameter in bucket.parameters]
        self._next_reduction = 0
        self._last_backward = False

    def expect_last_backward(self) -> None:
        """The next backward is the last: a bucket is reduced as soon as all its gradients have arrived."""
        self._last_backward = True

    def finish_gradients(self) -> None:
        """Wait until every bucket's ``own_gradient`` is complete."""
        self._start_ready_reductions(all_buckets=True)
        for bucket in self.buckets:
            bucket.finish_reduction()

    def squared_norm(self) -> Tensor:
        """This rank's share of the squared global gradient norm, fp32 scalar: the sum over the world is the total."""
        squares = [squared_norm(bucket.own_gradient) for bucket in self.buckets if bucket.is_owned]
        return torch.stack(squares).sum() if squares else torch.zeros((), device=self.mesh.device)

    def _reported(self, bucket: Bucket, index: int) -> None:
        if self._last_backward:
            bucket.missing[index] -= 1
            assert bucket.missing[index] >= 0, f"{bucket.parameters[index].shard.name} is used more than .uses times"
            self._start_ready_reductions()

    def _start_ready_reductions(self, all_buckets: bool = False) -> None:
        # In bucket order, the same on all data ranks: collectives must be issued in the same order.
        while self._next_reduction < len(self.buckets):
            bucket = self.buckets[self._next_reduction]
            if any(bucket.missing) and not all_buckets:
                return
            bucket.start_reduction()
            self._next_reduction += 1

    # -- update

    def step(self, lr: float, divisor: Tensor, accept: Tensor) -> None:
        """Update this rank's slices with gradients / ``divisor``, where ``accept`` (a device bool); start gathering."""
        reject = (~accept).float()
        for bucket in self.buckets:
            adamw_(
                bucket.master,
                bucket.moments.exp_avg,
                bucket.moments.exp_avg_sq,
                bucket.own_gradient,
                divisor=divisor,
                reject=reject,
                updates=bucket.moments.updates,
                lr=lr,
                betas=self.optim.betas,
                eps=self.optim.eps,
                weight_decay=self.optim.weight_decay if bucket.kind.decayed else 0.0,
                rounded=bucket.rounded,
            )
        self._start_gathers()

    def gather_parameters(self) -> None:
        """Start copying changed masters into every rank's parameters."""
        for bucket in self.buckets:
            if bucket.rounded is not None:
                bucket.rounded.copy_(bucket.master)
        self._start_gathers()

    def _start_gathers(self) -> None:
        for bucket in reversed(self.buckets):  # in the order of the next forward
            bucket.start_gather()

    def wait_for_parameters(self) -> None:
        """Before parameters are read."""
        for bucket in self.buckets:
            bucket.finish_gather()

    # -- state

    @property
    def updates(self) -> int:
        """Updates made, skipped steps not counted."""
        return int(self.buckets[0].moments.updates.item())

    @updates.setter
    def updates(self, value: int) -> None:
        for bucket in self.buckets:
            bucket.moments.updates.fill_(value)

    def slices(self, owned_only: bool) -> list[Slice]:
        """Everything a checkpoint needs: ``weight`` (masters), ``exp_avg``, ``exp_avg_sq``, as views of this rank's
        slices. ``owned_only`` for saving, where every element must come from one rank only."""
        return [
            part
            for bucket in self.buckets
            if bucket.is_owned or not owned_only
            for kind, tensor in (
                ("weight", bucket.master),
                ("exp_avg", bucket.moments.exp_avg),
                ("exp_avg_sq", bucket.moments.exp_avg_sq),
            )
            for part in bucket.slices(kind, tensor)
        ]


def _fill_buckets(
    parameters: list[ShardedParameter], optim: Optim, mesh: Mesh, dtype: torch.dtype, bucket_elements: int
) -> list[Bucket]:
    """Buckets in the order in which backward completes them."""
    open_groups: dict[Kind, list[ShardedParameter]] = {}
    closed: list[tuple[int, Kind, list[ShardedParameter]]] = []
    backward_order = list(reversed(parameters))
    for position, parameter in enumerate(backward_order):
        shard = parameter.shard
        kind = Kind(optim.decay_embeddings or not shard.is_embedding, shard.replica_axis, shard.partial_gradient)
        group = open_groups.setdefault(kind, [])
        group.append(parameter)
        if sum(p.numel() for p in group) >= bucket_elements:
            closed.append((position, kind, open_groups.pop(kind)))
    end = len(backward_order)
    closed += [(end, kind, group) for kind, group in open_groups.items()]
    return [Bucket(kind, group, mesh, dtype) for _, kind, group in sorted(closed, key=lambda entry: entry[0])]
