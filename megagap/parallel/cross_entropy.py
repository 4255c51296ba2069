"""The output projection and its cross-entropy in one, over a vocabulary split by tp, in bounded memory.

The logits of a few tokens at a time are computed, turned into their gradient in place and multiplied into the gradients
by input and weight while they are there (as Liger-Kernel does; Hsu et al. 2024, section 3.2): all logits of a step
never exist, and nothing is computed twice.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.ops import softmax_gradient_, softmax_statistics
from megagap.ops.cross_entropy import ABSENT
from megagap.parallel.collectives import all_reduce
from megagap.parallel.mesh import Axis
from megagap.parallel.shard import ShardedParameter

IGNORED_TARGET = -100
"""A target with this id counts neither in the loss nor in its gradient."""

WORKSPACE_BYTES = 64 * 2**20
"""About what the logits of the tokens at hand may take."""

FEWEST_TOKENS = 64
"""At hand at once, however large the vocabulary: matrix products of fewer rows are slow."""


def linear_cross_entropy(
    x: Tensor, weight: ShardedParameter, targets: Tensor, scale: Tensor, tp: Axis
) -> tuple[Tensor, Tensor]:
    """``scale`` · the sum over tokens of the cross-entropy of ``x Wᵀ``; and that of each, unscaled, without gradient.

    x: [b, s, h] whole. weight: this rank's rows of W [vocab, h], padding after them. targets: [b, s] global ids, or
    ``IGNORED_TARGET``, whose loss is 0. scale: fp32 scalar. Returned are an fp32 scalar, and fp32 [b, s], the same on
    every tp rank. The gradient by x is this rank's share: it is summed where x entered the region.
    """
    need_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, losses = _LinearCrossEntropy.apply(x, weight, targets, scale, weight.shard, tp, need_gradients)
    return loss, losses


def tokens_at_once(columns: int, itemsize: int) -> int:
    """How many tokens' logits fit the workspace."""
    return max(FEWEST_TOKENS, WORKSPACE_BYTES // max(1, columns * itemsize))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, shard: Any, tp: Axis, need_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        first, columns = shard.offsets[0], shard.sizes[0]  # sizes: without padding
        rows, inputs, ids = weight[:columns], x.reshape(-1, x.shape[-1]), targets.reshape(-1)
        losses = ids.new_empty(ids.shape, dtype=torch.float32)
        grad_x = torch.empty_like(inputs) if need_gradients else None
        grad_weight: Tensor | None = None
        step = tokens_at_once(columns, x.element_size())
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            logits = inputs[part] @ rows.T
            counted = ids[part] != IGNORED_TARGET
            own = counted & (ids[part] >= first) & (ids[part] < first + columns)
            target = (ids[part] - first).where(own, ABSENT)
            log_sum_exp, at_target = _over_vocabulary(*softmax_statistics(logits, target), tp)
            losses[part] = (log_sum_exp - at_target).where(counted, 0)
            if grad_x is None:
                continue
            softmax_gradient_(logits, target, log_sum_exp, counted * scale.float())
            torch.mm(logits, rows, out=grad_x[part])
            grad_weight = _accumulated(grad_weight, logits, inputs[part], whole=len(ids) <= step)
        if grad_weight is not None and columns < weight.shape[0]:
            grad_weight = torch.nn.functional.pad(grad_weight, (0, 0, 0, weight.shape[0] - columns))
        ctx.save_for_backward(grad_x.view_as(x) if grad_x is not None else None, grad_weight)
        losses = losses.view(targets.shape)
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # A loss is usually the root, with a gradient of 1. A GPU is not asked, which would make the host wait for it.
        if grad.is_cuda or grad.item() != 1:
            gradients = [None if part is None else part * grad.to(part.dtype) for part in gradients]
        return *gradients, None, None, None, None, None


def _over_vocabulary(maximum: Tensor, total: Tensor, at_target: Tensor, tp: Axis) -> tuple[Tensor, Tensor]:
    """Statistics of this rank's columns [n] -> log of the sum of all exponentials, and the target's logit."""
    if tp.size == 1:
        return maximum + total.log(), at_target
    peak = all_reduce(maximum.clone(), tp, dist.ReduceOp.MAX)
    total = total * (maximum - peak).exp()
    total, at_target = all_reduce(torch.stack([total, at_target]), tp)
    return peak + total.log(), at_target


def _accumulated(before: Tensor | None, grad_logits: Tensor, x: Tensor, *, whole: bool) -> Tensor:
    """The gradient by the weight: in one product, in fp32 where it is a sum of several."""
    product = grad_logits.T @ x
    if whole:
        return product
    return product.float() if before is None else before.add_(product)
