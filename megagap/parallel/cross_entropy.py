"""The output projection and its cross-entropy in one, over a vocabulary split by tp, in bounded memory.

For some tokens at a time (a chunk):

1. logits of this rank's columns, ``x Wᵀ``;
2. the softmax's statistics, and the logits' gradient in place of the logits: in one pass, or, where tp exceeds 1, in
   two, between which the statistics are combined over tp;
3. the gradient's products with W and x: the gradients of the input and of the weight.

The loss follows from the statistics of all tokens. So the logits of a whole step never exist, and nothing is computed
twice (as in Liger-Kernel; Hsu et al. 2024, section 3.2). The weight gradient is accumulated in fp32, in the weight's
own sink if it has one, during the forward pass. The input enters the region here, so that its gradient is summed over
tp in the forward pass too: under sequence parallelism only this rank's part is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.ops import cross_entropy_, losses_of, softmax_gradient_, softmax_statistics
from megagap.ops.wide import wide
from megagap.parallel.collectives import all_reduce
from megagap.parallel.mesh import Axis
from megagap.parallel.shard import GradientSink, Shard, ShardedParameter
from megagap.parallel.tensor import Region

IGNORED_TARGET = -100
"""A target with this id counts neither in the loss nor in its gradient; to `ops`, any id below 0 is such a one."""

WORKSPACE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Approximate memory for a chunk's logits, by device type."""

MIN_CHUNK_TOKENS = {"cpu": 64, "cuda": 2048}
"""Whatever the vocabulary size: matrix products of fewer rows are slow (docs/performance.md)."""

CHUNK_MULTIPLE = 256
"""Larger chunks are a multiple of this many tokens, which suits the tile sizes of matrix products."""


def linear_cross_entropy(
    x: Tensor,
    weight: ShardedParameter,
    targets: Tensor,
    scale: Tensor,
    tp: Axis,
    sequence_parallel: bool = False,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale`` · the sum over tokens of cross-entropy and z-loss of ``x Wᵀ``; and each token's cross-entropy and
    z-loss, unscaled, without gradient.

    x: residual stream [b, s or s / tp, h]. weight: this rank's rows of W [vocab, h], padding after them. targets:
    [b, s] global ids, or ``IGNORED_TARGET``, whose losses are 0. scale: fp32 scalar. z_loss: the coefficient of
    ``logsumexp(x Wᵀ)²``. Returns an fp32 scalar and twice fp32 [b, s] (float64 for x in float64), the same on every tp
    rank.

    If the weight has a sink, its gradient is there after the forward pass: the loss must then be the root of the
    backward pass, with a gradient of 1.
    """
    need_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    region = Region(tp, sequence_parallel)
    loss, losses, z_losses = _LinearCrossEntropy.apply(
        x, weight, targets, scale, z_loss, weight.shard, weight.sink, region, need_gradients
    )
    return loss, losses, z_losses


def chunk_tokens(columns: int, itemsize: int, device: str) -> int:
    """How many tokens' logits fit in the workspace on this device type."""
    tokens = max(MIN_CHUNK_TOKENS[device], WORKSPACE_BYTES[device] // max(1, columns * itemsize))
    return tokens - tokens % CHUNK_MULTIPLE if tokens > CHUNK_MULTIPLE else tokens


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: Tensor,
        z_loss: float,
        shard: Shard,
        sink: GradientSink | None,
        region: Region,
        need_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, columns = shard.offsets[0], shard.sizes[0]  # sizes: without padding
        whole = region.gather(x).wait()
        rows, inputs, ids = weight[:columns], whole.reshape(-1, x.shape[-1]), targets.reshape(-1)
        statistics = []
        grad_x = torch.empty_like(inputs) if need_gradients else None
        own_sum = None if sink is not None or not need_gradients else _ProductSum(weight, columns)
        products: GradientSink | _ProductSum | None = sink if own_sum is None else own_sum
        # Counts padded rows, which are equal on every tp rank, so the number of chunks is, too.
        step = chunk_tokens(weight.shape[0], x.element_size(), x.device.type)
        for start in range(0, len(ids), step):
            chunk = slice(start, start + step)
            logits = inputs[chunk] @ rows.T
            if grad_x is None:
                statistics.append(_statistics(logits, ids[chunk], first, region.tp))
            else:
                assert products is not None
                statistics.append(_gradient_(logits, ids[chunk], scale, z_loss, first, region.tp))
                torch.mm(logits, rows, out=grad_x[chunk])
                products.add_product(logits, inputs[chunk])
            del logits  # else they would be live until the next chunk's are there
        ctx.save_for_backward(
            region.sum(grad_x.view_as(whole)).wait() if grad_x is not None else None,
            own_sum.gradient() if own_sum is not None else None,
        )
        ctx.sink = sink
        losses, z_losses = losses_of(torch.cat(statistics, 1), ids, z_loss)
        loss = (losses + z_losses).sum() * scale
        losses, z_losses = losses.view(targets.shape), z_losses.view(targets.shape)
        ctx.mark_non_differentiable(losses, z_losses)
        return loss, losses, z_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *saved_gradients(ctx, grad), *[None] * 7


def saved_gradients(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    """What the forward pass of a loss has saved: the gradients of its input and, without a sink, of its weight."""
    gradients: Sequence[Tensor | None] = ctx.saved_tensors
    if ctx.sink is not None:
        _require_one(grad)
        ctx.sink.finished()
    # A loss is usually the root, with a gradient of 1. Skipped on GPU: ``item()`` would synchronise.
    elif grad.is_cuda or grad.item() != 1:
        gradients = [None if part is None else part * grad.to(part.dtype) for part in gradients]
    return gradients


class _ProductSum:
    """The gradient of a weight without a sink: one product, or a sum of several in fp32."""

    def __init__(self, weight: Tensor, columns: int) -> None:
        self._weight, self._columns = weight, columns
        self._sum: Tensor | None = None

    def add_product(self, left: Tensor, right: Tensor) -> None:
        product = left.T @ right
        self._sum = product if self._sum is None else wide(self._sum).add_(product)

    def gradient(self) -> Tensor | None:
        """With rows of zeros for padding."""
        padding = self._weight.shape[0] - self._columns
        return None if self._sum is None else torch.nn.functional.pad(self._sum, (0, 0, 0, padding))


def _require_one(grad: Tensor) -> None:
    """The weight's gradient was added before this factor was known. On GPU the check runs on the device."""
    if grad.is_cuda:
        torch._assert_async(grad == 1)
    else:
        assert grad.item() == 1, "the loss must be the root of the backward pass"


def _gradient_(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float, first: int, tp: Axis) -> Tensor:
    """Overwrite this rank's columns of the logits with their gradient; returns :func:`_statistics`."""
    if tp.size == 1:
        return cross_entropy_(logits, targets, scale, z_loss)
    statistics = _statistics(logits, targets, first, tp)
    softmax_gradient_(logits, targets, statistics, scale, z_loss, first)
    return statistics


def _statistics(logits: Tensor, targets: Tensor, first: int, tp: Axis) -> Tensor:
    """Of the whole vocabulary [3, n], from each rank's columns of the logits."""
    statistics = softmax_statistics(logits, targets, first)
    return statistics if tp.size == 1 else _over_vocabulary(statistics, tp)


def _over_vocabulary(statistics: Tensor, tp: Axis) -> Tensor:
    """Combine statistics of each rank's columns, in place."""
    maximum, sums = statistics[0], statistics[1:]
    own = maximum.clone()
    all_reduce(maximum, tp, dist.ReduceOp.MAX)
    sums[0].mul_((own - maximum).exp_())
    all_reduce(sums, tp)
    return statistics
