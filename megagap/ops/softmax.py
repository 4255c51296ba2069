"""Row statistics of a softmax over some columns of a vocabulary, and the gradient that replaces the logits."""

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.wide import wide, wide_dtype

ABSENT = -1
"""Target of a row whose target is in none of the columns, or is ignored."""


def softmax_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [n, v] and targets [n] (a column, or :data:`ABSENT`), in fp32 [n]: the maximum, the sum of
    ``exp(logit - maximum)``, and the logit at the target (0 where it is absent). v may be 0."""
    if compiled.supports(logits) and logits.shape[1]:
        statistics: tuple[Tensor, Tensor, Tensor] = torch.ops.megagap.cross_entropy_rows(logits, targets)
        return statistics
    return reference_statistics(logits, targets)


def softmax_gradient_(logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor) -> None:
    """Overwrite logits [n, v] with ``(softmax - one_hot(target)) · scale``; log_sum_exp, scale: fp32 [n]."""
    if compiled.supports(logits) and logits.shape[1]:
        torch.ops.megagap.cross_entropy_rows_gradient_(logits, targets, log_sum_exp, scale)
    else:
        reference_gradient_(logits, targets, log_sum_exp, scale)


def reference_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not logits.shape[1]:
        nothing = targets.new_zeros(targets.shape, dtype=wide_dtype(logits.dtype))
        return nothing - float("inf"), nothing, nothing
    values = wide(logits)
    maximum = values.amax(-1)
    total = (values - maximum.unsqueeze(-1)).exp_().sum(-1)
    at_target = values.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return maximum, total, at_target.where(targets != ABSENT, 0)


def reference_gradient_(logits: Tensor, targets: Tensor, log_sum_exp: Tensor, scale: Tensor) -> None:
    if not logits.shape[1]:
        return
    softmax = (wide(logits) - log_sum_exp.unsqueeze(-1)).exp_()
    hit = (targets != ABSENT).to(softmax.dtype).unsqueeze(-1)
    softmax.scatter_add_(-1, targets.clamp(min=0).unsqueeze(-1), -hit)
    logits.copy_(softmax.mul_(scale.unsqueeze(-1)))


def _statistics_shapes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (targets.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    return first, second, third


def _no_shapes(logits: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> None:
    return None


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::cross_entropy_rows", _statistics_shapes)
    torch.library.register_fake("megagap::cross_entropy_rows_gradient_", _no_shapes)
