"""Tensor and sequence parallelism: the layers whose matrices are split over the tp axis.

A block of layers is a *region*: activations enter it whole, ``[b, s, h]``, are computed on in split form, and leave it
as partial sums that are added up over tp (Shoeybi et al. 2019, section 3). Outside of regions the residual stream is
replicated over tp, or, under sequence parallelism (Korthikanti et al. 2022, section 4.2.2), split along the sequence:
``[b, s / tp, h]``. A :class:`Region` moves between the two.

The linear layers at a region's borders move and multiply in one operation. So a column-parallel layer keeps no gathered
input for its backward pass, only the part that this rank had. It is gathered again for the weights' gradients (the same
section) while the input's gradient is computed, which in turn is summed over tp while those of the weights are. What
they sum in place is a product that they have just made, which autograd has not seen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagap.ops.adjacent import as_one
from megagap.parallel.collectives import Pending, all_gather_async, all_reduce_async, reduce_scatter_async
from megagap.parallel.layout import ContextMode
from megagap.parallel.mesh import Axis, Mesh
from megagap.parallel.shard import GradientSink, Shard, ShardedParameter, split, whole

SEQUENCE = 1
"""The sequence dimension of activations [b, s, h]."""


class WeightGradientQueue:
    """Defers weight gradients: while deferring, linear layers queue them instead of computing them in backward.

    Zero-bubble schedules (Qi et al. 2023) fill idle time with the queued work. A job may gather over tp. That cannot
    deadlock: the tp ranks of a stage run the same schedule, and each queues and runs its jobs in the order of the same
    backward pass, so that all of them make these calls in one order.
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

    @property
    def is_deferring(self) -> bool:
        """Whether weight gradients are being queued."""
        return self._jobs is not None

    def add(self, job: Callable[[], None]) -> bool:
        """Queue ``job`` if weight gradients are being deferred; False if it must run now."""
        if self._jobs is None:
            return False
        self._jobs.append(job)
        return True


@dataclass(frozen=True)
class Again:
    """How to make an input of a matrix product again in the backward pass, which keeps ``inputs`` instead of it."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    """Without history; kept anyway, or smaller than what they make."""
    parameters: tuple[Tensor, ...] = ()
    """Further arguments, which are read when it is made again. Of those, a deferred weight gradient keeps a copy: where
    parameters are there only while their block is computed, they are gone by then."""


@dataclass(frozen=True)
class Region:
    """The borders of regions, without autograd: the gradient of each passes through the other."""

    tp: Axis
    sequence_parallel: bool

    def whole_length(self, x: Tensor) -> int:
        """Tokens of a whole sequence of the residual stream."""
        return x.shape[SEQUENCE] * self.tp.size if self.sequence_parallel else x.shape[SEQUENCE]

    def own_length(self, y: Tensor) -> int:
        """Tokens of a sequence [b, s, h] that the residual stream holds on this rank."""
        return y.shape[SEQUENCE] // self.tp.size if self.sequence_parallel else y.shape[SEQUENCE]

    def gather(self, x: Tensor) -> Pending:
        """Start making the residual stream [b, s or s / tp, h] whole: [b, s, h]. Without sequence parallelism it is."""
        return all_gather_async(x, self.tp, SEQUENCE) if self.sequence_parallel else Pending(x)

    def sum(self, y: Tensor) -> Pending:
        """Start summing [b, s, h] over tp into the residual stream; in place without sequence parallelism."""
        if self.sequence_parallel:
            return reduce_scatter_async(y, self.tp, SEQUENCE)
        return all_reduce_async(y, self.tp)


@dataclass(frozen=True)
class TensorParallel:
    """How this rank's layers are split: passed to every layer of a stage."""

    mesh: Mesh
    sequence_parallel: bool
    dtype: torch.dtype
    context_mode: ContextMode = "ring"
    """How attention reaches the tokens of other ranks, where cp exceeds 1."""
    queue: WeightGradientQueue = field(default_factory=WeightGradientQueue)

    @property
    def region(self) -> Region:
        return Region(self.mesh.tp, self.sequence_parallel)

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream into a region: [b, s or s / tp, h] -> [b, s, h] whole."""
        return _Enter.apply(x, self.region) if self.mesh.tp.size > 1 else x

    def leave(self, y: Tensor) -> Tensor:
        """Partial sums [b, s, h] out of a region: -> [b, s or s / tp, h] summed over tp. May be computed in place."""
        return _Leave.apply(y, self.region) if self.mesh.tp.size > 1 else y

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

    x: residual stream [b, s or s / tp, in], which enters the region here. y: [b, s, out / tp], this rank's columns.
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
        self.region, self.queue = tensor_parallel.region, tensor_parallel.queue
        self.number: Tensor | None = None
        """Where compiled, what stands for the layer in the graph (``opaque.py``)."""

    def forward(self, x: Tensor) -> Tensor:
        (y,) = column_parallel(x, self)
        return y


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with W [out, in] split by columns over tp; leaves the region (Shoeybi et al. 2019, section 3).

    x: [b, s, in / tp], this rank's columns. y: [b, s or s / tp, out], summed over tp.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, tensor_parallel: TensorParallel, *, bias: bool = False
    ) -> None:
        super().__init__()
        tp = tensor_parallel.mesh.tp
        self.region, self.queue = tensor_parallel.region, tensor_parallel.queue
        self.computes = True
        self.weight = tensor_parallel.parameter(
            split(f"{name}.weight", (out_features, in_features), dim=1, rank=tp.rank, size=tp.size)
        )
        # Added once, after the sum over tp.
        self.bias = (
            tensor_parallel.parameter(tensor_parallel.replicated(f"{name}.bias", (out_features,))) if bias else None
        )
        self.number: Tensor | None = None
        """As of :class:`ColumnParallelLinear`."""

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """``again``: makes x in the backward pass, which then does not keep it."""
        y: Tensor
        if self.number is not None and torch.compiler.is_compiling():
            assert again is None, "what a graph keeps is the compiler's choice"
            length, width = self.region.own_length(x), len(self.weight)
            y = torch.ops.megagap_parallel.row_product(x, self.number, length, width)
        else:
            y = _RowProduct.apply(x, self.region, self.queue, self.weight, again, self.computes)
        return y if self.bias is None else y + self.bias

    @contextmanager
    def only_keeping(self) -> Iterator[None]:
        """Inside, a forward pass keeps what its backward pass needs, but computes and sends nothing: nobody reads its
        result, which is not set."""
        self.computes = False
        try:
            yield
        finally:
            self.computes = True


def column_parallel(x: Tensor, *layers: ColumnParallelLinear, again: Again | None = None) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input, the residual stream, which is gathered once for all of them.

    As if each were called by itself. Weights that lie end to end (:func:`~megagap.parallel.shard.pack`) are multiplied
    as one: the results are columns of one tensor. So are their gradients, where they are columns of one tensor; else
    the input's is accumulated inside of the matrix products. ``again``: makes x in the backward pass, which then does
    not keep it.
    """
    first, weights = layers[0], [layer.weight for layer in layers]
    products: Sequence[Tensor]
    if first.number is not None and torch.compiler.is_compiling():
        assert again is None, "what a graph keeps is the compiler's choice"
        numbers, widths = [layer.number for layer in layers], [len(weight) for weight in weights]
        length = first.region.whole_length(x)
        products = torch.ops.megagap_parallel.column_products(x, numbers, length, widths)
    else:
        products = _ColumnProducts.apply(x, first.region, first.queue, again, _packing_pays(x), *weights)
    return tuple(y if layer.bias is None else y + layer.bias for y, layer in zip(products, layers, strict=True))


def _packing_pays(x: Tensor) -> bool:
    """Whether packed weights are multiplied as one. Not on a CPU, where a step took 1 to 2 % longer by measurement
    (docs/performance.md), but for float64: so what layouts are compared in there is what GPUs do."""
    return x.is_cuda or x.dtype == torch.float64


class _ColumnProducts(torch.autograd.Function):
    """x [b, s or s / tp, in], made whole, times each of several weights [out, in], transposed.

    ``packs``: whether the results may be parts of one tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        region: Region,
        queue: WeightGradientQueue,
        again: Again | None,
        packs: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        _keep(ctx, x, again, weights)
        ctx.region, ctx.queue, ctx.sinks = region, queue, [getattr(weight, "sink", None) for weight in weights]
        whole = region.gather(x).wait()
        packed = as_one(weights, 0) if packs else None
        if packed is None:
            return tuple(F.linear(whole, weight) for weight in weights)
        return F.linear(whole, packed).split([len(weight) for weight in weights], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, input_again = _kept(ctx)
        region, wanted = ctx.region, ctx.needs_input_grad[5:]
        outputs = [grad.flatten(0, -2) for grad in grads]

        def of_weights(gathering: Pending) -> list[Tensor | None]:
            return _weight_gradients(weights, ctx.sinks, wanted, outputs, gathering.wait().flatten(0, -2))

        now = any(wanted) and not _deferred(ctx.queue, weights, lambda: of_weights(region.gather(input_again())))
        gathering = region.gather(input_again()) if now else None  # while the input's gradient is computed
        summing = None
        if ctx.needs_input_grad[0]:
            summing = region.sum(_input_gradient(outputs, weights).view(*grads[0].shape[:-1], -1))
        found = [None] * len(weights) if gathering is None else of_weights(gathering)  # while that is summed
        return None if summing is None else summing.wait(), None, None, None, None, *found


class _RowProduct(torch.autograd.Function):
    """x [b, s, in / tp] times the weight [out, in / tp], transposed, summed over tp: [b, s or s / tp, out].

    A deferred weight gradient keeps the output's gradient as it was given, and gathers it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        region: Region,
        queue: WeightGradientQueue,
        weight: Tensor,
        again: Again | None,
        computes: bool,
    ) -> Tensor:
        _keep(ctx, x, again, [weight])
        ctx.region, ctx.queue, ctx.sink = region, queue, getattr(weight, "sink", None)
        if not computes:
            return x.new_empty(()).expand(x.shape[0], region.own_length(x), weight.shape[0])
        return region.sum(F.linear(x, weight)).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        region, wanted = ctx.region, ctx.needs_input_grad[3]
        gathering = region.gather(grad)  # while x, or its whole layer, is computed again if it was not kept
        (weight,), input_again = _kept(ctx)

        def of_weight(whole: Tensor, x: Tensor) -> list[Tensor | None]:
            return _weight_gradients([weight], [ctx.sink], [wanted], [whole.flatten(0, -2)], x.flatten(0, -2))

        def later() -> list[Tensor | None]:
            return of_weight(region.gather(grad).wait(), input_again())

        now = wanted and not _deferred(ctx.queue, [weight], later)
        x = input_again() if now else None
        whole = gathering.wait()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _input_gradient([whole.flatten(0, -2)], [weight]).view(*whole.shape[:-1], -1)
        return grad_x, None, None, *([None] if x is None else of_weight(whole, x)), None, None


def _keep(ctx: Any, x: Tensor, again: Again | None, weights: Sequence[Tensor]) -> None:
    """For :func:`_kept`: the input, or what makes it, and the weights."""
    inputs = (x,) if again is None else again.inputs
    ctx.save_for_backward(*weights, *inputs)
    ctx.weight_count, ctx.make_input = len(weights), _itself if again is None else again.function
    ctx.read_again = () if again is None else again.parameters


def _kept(ctx: Any) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """The weights, and what returns the input: each call makes it again if it was not kept."""
    saved, make_input = ctx.saved_tensors, ctx.make_input
    weights, inputs = saved[: ctx.weight_count], saved[ctx.weight_count :]
    parameters = [p.detach().clone() for p in ctx.read_again] if ctx.queue.is_deferring else ctx.read_again
    return list(weights), lambda: make_input(*inputs, *parameters)


def _itself(x: Tensor) -> Tensor:
    return x


def _input_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum over all pairs of grad [n, out] times weight [out, in]: [n, in]."""
    packed_grad, packed_weight = as_one(grads, 1), as_one(weights, 0)
    if packed_grad is not None and packed_weight is not None:
        return packed_grad @ packed_weight
    total = grads[0] @ weights[0]
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        torch.addmm(total, grad, weight, out=total)
    return total


def _weight_gradients(
    weights: Sequence[Tensor],
    sinks: Sequence[GradientSink | None],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
    x: Tensor,
) -> list[Tensor | None]:
    """gradᵀ x of each weight for autograd; None if it went into the weight's sink, or is not wanted."""
    found: list[Tensor | None] = [None] * len(weights)
    known = [sink for sink in sinks if sink is not None]
    packed = as_one(grads, 1) if all(wanted) and len(known) == len(sinks) else None
    if packed is not None:
        known[0].add_product(packed, x, known[1:])
        for its_sink in known:
            its_sink.finished()
        return found
    for i, (sink, grad) in enumerate(zip(sinks, grads, strict=True)):
        if wanted[i] and sink is not None:
            sink.add_product(grad, x)
            sink.finished()
        elif wanted[i]:
            found[i] = grad.T @ x
    return found


def _deferred(
    queue: WeightGradientQueue, weights: Sequence[Tensor], gradients: Callable[[], list[Tensor | None]]
) -> bool:
    """Whether the weights' gradients are queued, to be accumulated in the weights by the job itself: in leaves only."""

    def job() -> None:
        for weight, found in zip(weights, gradients(), strict=True):
            if found is not None:
                torch.autograd.backward(weight, found)

    return all(weight.is_leaf for weight in weights) and queue.add(job)


class _Enter(torch.autograd.Function):
    """Gather forward, sum backward (f of Shoeybi et al. 2019, figure 3; g of Korthikanti et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: Region) -> Tensor:
        ctx.region = region
        whole = region.gather(x).wait()
        return x.view_as(x) if whole is x else whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not ctx.region.sequence_parallel:
            # What is summed in place must be a copy: autograd may have given the same gradient to others.
            grad = grad.clone(memory_format=torch.contiguous_format)
        return ctx.region.sum(grad).wait(), None


class _Leave(torch.autograd.Function):
    """Sum forward, gather backward (g of Shoeybi et al. 2019, figure 3; ḡ of Korthikanti et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, region: Region) -> Tensor:
        ctx.region = region
        if not region.sequence_parallel:
            ctx.mark_dirty(y)  # summed in place: autograd refuses it if an earlier operation has kept y
        return region.sum(y).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.region.gather(grad).wait(), None
