"""Tensor and sequence parallelism: the layers whose matrices are split over the tp axis.

A block of layers is a *region*: activations enter it whole, ``[b, s, h]``, are computed on in split form, and leave it
as partial sums that are added up over tp (Shoeybi et al. 2019, section 3). Outside of regions the residual stream is
replicated over tp, or, under sequence parallelism (Korthikanti et al. 2022, section 4.2.2), split along the sequence:
``[b, s / tp, h]``. :class:`TensorParallel` moves between the two; the linear layers themselves do not communicate.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagap.parallel.collectives import all_gather, all_reduce, reduce_scatter
from megagap.parallel.mesh import Axis, Mesh
from megagap.parallel.shard import GradientSink, Shard, ShardedParameter, split, whole

SEQUENCE = 1
"""The sequence dimension of activations [b, s, h]."""


class WeightGradientQueue:
    """Defers weight gradients: while deferring, linear layers queue them instead of computing them in backward.

    Zero-bubble schedules (Qi et al. 2023) fill idle time with the queued work.
    """

    def __init__(self) -> None:
        self._jobs: list[Callable[[], None]] | None = None

    @contextmanager
    def deferring(self) -> Iterator[list[Callable[[], None]]]:
        """Collect the jobs queued by the backward inside the block; calling each one later completes it."""
        assert self._jobs is None, "already deferring"
        self._jobs = []
        try:
            yield self._jobs
        finally:
            self._jobs = None

    def add(self, job: Callable[[], None]) -> bool:
        """Queue ``job`` if weight gradients are being deferred; False if it must run now."""
        if self._jobs is None:
            return False
        self._jobs.append(job)
        return True


@dataclass(frozen=True)
class TensorParallel:
    """How this rank's layers are split: passed to every layer of a stage."""

    mesh: Mesh
    sequence_parallel: bool
    dtype: torch.dtype
    queue: WeightGradientQueue = field(default_factory=WeightGradientQueue)

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream into a region: [b, s or s / tp, h] -> [b, s, h] whole."""
        enter = _GatherSequence if self.sequence_parallel else _Replicate
        return enter.apply(x, self.mesh.tp) if self.mesh.tp.size > 1 else x

    def leave(self, y: Tensor) -> Tensor:
        """Partial sums [b, s, h] out of a region: -> [b, s or s / tp, h] summed over tp."""
        leave = _ScatterSequence if self.sequence_parallel else _Sum
        return leave.apply(y, self.mesh.tp) if self.mesh.tp.size > 1 else y

    def sequence_part(self, length: int) -> int:
        """Tokens of a sequence of ``length`` that the residual stream holds on this rank."""
        return length // self.mesh.tp.size if self.sequence_parallel else length

    def replicated(self, name: str, shape: tuple[int, ...]) -> Shard:
        """The record of a parameter outside of regions. Under sequence parallelism each rank sees only its tokens."""
        if self.mesh.tp.size == 1:
            return whole(name, shape)
        return Shard(
            name, shape, (0,) * len(shape), shape, shape, replica_axis="tp", partial_gradient=self.sequence_parallel
        )

    def parameter(self, shard: Shard) -> ShardedParameter:
        return ShardedParameter(shard, self.mesh.device, self.dtype)


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] split by rows over ``axis`` (Shoeybi et al. 2019, section 3).

    x: [b, s, in] whole, from :meth:`TensorParallel.enter`. y: [b, s, out / tp], this rank's columns.
    ``parts``: into how many parts the rows are split; tp unless several ranks share one (key/value heads), in which
    case ``replica_axis`` names the axis of the ranks that do.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        tensor_parallel: TensorParallel,
        *,
        bias: bool = False,
        parts: int | None = None,
        replica_axis: str | None = None,
    ) -> None:
        super().__init__()
        tp = tensor_parallel.mesh.tp
        parts = parts or tp.size
        place = dict(dim=0, rank=tp.rank * parts // tp.size, size=parts)
        # Ranks that share rows use them for different queries, so each has a part of the gradient.
        replicas = dict(replica_axis=replica_axis, partial_gradient=replica_axis is not None)
        self.weight = tensor_parallel.parameter(
            split(f"{name}.weight", (out_features, in_features), **place, **replicas)  # type: ignore[arg-type]
        )
        self.bias = None
        if bias:
            self.bias = tensor_parallel.parameter(
                split(f"{name}.bias", (out_features,), **place, **replicas)  # type: ignore[arg-type]
            )
        self.queue = tensor_parallel.queue

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.queue)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] split by columns over tp; leaves the region (Shoeybi et al. 2019, section 3).

    x: [b, s, in / tp], this rank's columns. y: [b, s or s / tp, out], summed over tp.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, tensor_parallel: TensorParallel, *, bias: bool = False
    ) -> None:
        super().__init__()
        tp = tensor_parallel.mesh.tp
        self.tensor_parallel = tensor_parallel
        self.weight = tensor_parallel.parameter(
            split(f"{name}.weight", (out_features, in_features), dim=1, rank=tp.rank, size=tp.size)
        )
        # Added once, after the sum over tp.
        self.bias = (
            tensor_parallel.parameter(tensor_parallel.replicated(f"{name}.bias", (out_features,))) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.tensor_parallel.leave(linear(x, self.weight, None, self.tensor_parallel.queue))
        return y if self.bias is None else y + self.bias


def column_parallel(x: Tensor, *layers: ColumnParallelLinear) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input.

    As if each were called by itself; the input's gradient is accumulated inside the matrix products.
    """
    products: tuple[Tensor, ...] = _Linears.apply(x, layers[0].queue, *(layer.weight for layer in layers))
    return tuple(y if layer.bias is None else y + layer.bias for y, layer in zip(products, layers, strict=True))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradientQueue) -> Tensor:
    """x Wᵀ + b whose weight gradient may be deferred to ``queue``."""
    (y,) = _Linears.apply(x, queue, weight)
    return y if bias is None else y + bias


class _Linears(torch.autograd.Function):
    """x [.., in] times each of several weights [out, in], transposed.

    A weight's gradient goes into its sink if it has one, else to autograd.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, queue: WeightGradientQueue, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.queue, ctx.sinks = queue, [getattr(weight, "sink", None) for weight in weights]
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        inputs, outputs = x.flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = outputs[0] @ weights[0]
            for grad, weight in zip(outputs[1:], weights[1:], strict=True):
                torch.addmm(grad_x, grad, weight, out=grad_x)
            grad_x = grad_x.view_as(x)
        found = [
            _weight_gradient(weight, grad, inputs, sink, ctx.queue) if wanted else None
            for weight, grad, sink, wanted in zip(weights, outputs, ctx.sinks, ctx.needs_input_grad[2:], strict=True)
        ]
        return grad_x, None, *found


def _weight_gradient(
    weight: Tensor, grad: Tensor, x: Tensor, sink: GradientSink | None, queue: WeightGradientQueue
) -> Tensor | None:
    """The gradient gradᵀ x for autograd; None if it goes into the sink, or is queued."""

    def accumulate() -> None:
        if sink is None:
            torch.autograd.backward(weight, grad.T @ x)
        else:
            sink.add_product(grad, x)
            sink.finished()

    if weight.is_leaf and queue.add(accumulate):
        return None
    if sink is None:
        return grad.T @ x
    accumulate()
    return None


class _Replicate(torch.autograd.Function):
    """Identity forward, sum over the axis backward (f of Shoeybi et al. 2019, figure 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.contiguous().clone(), ctx.axis), None


class _Sum(torch.autograd.Function):
    """Sum over the axis forward, identity backward (g of Shoeybi et al. 2019, figure 3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    """All-gather along the sequence forward, reduce-scatter backward (g of Korthikanti et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.axis, SEQUENCE), None


class _ScatterSequence(torch.autograd.Function):
    """Reduce-scatter along the sequence forward, all-gather backward (ḡ of Korthikanti et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis, SEQUENCE), None
