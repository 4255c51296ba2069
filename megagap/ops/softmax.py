"""Cross-entropy over columns of a vocabulary: statistics of its softmax, and the gradient that replaces the logits.

Logits [n, v] are the columns ``first … first + v - 1`` of a vocabulary; targets [n] are ids in the whole of it, and a
row with one below 0 is ignored: its gradient is 0. Statistics [3, n], in fp32 (float64 of logits in float64), are the
maximum, the sum of ``exp(logit - maximum)``, and the logit at the target, 0 where that is in none of the columns.

The gradient is that of ``cross-entropy + z · log_sum_exp²`` times ``scale``, an fp32 scalar. The second term, z-loss
(Chowdhery et al. 2022, section 5), keeps the softmax's normaliser near 1.
"""

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.wide import wide, wide_dtype


def softmax_statistics(logits: Tensor, targets: Tensor, first: int = 0) -> Tensor:
    """The statistics of these columns. v may be 0."""
    if compiled.supports(logits) and logits.shape[1]:
        statistics: Tensor = torch.ops.megagap.cross_entropy_rows(logits, targets, first)
        return statistics
    return reference_statistics(logits, targets, first)


def softmax_gradient_(
    logits: Tensor, targets: Tensor, statistics: Tensor, scale: Tensor, z_loss: float = 0.0, first: int = 0
) -> None:
    """Overwrite logits with their gradient. ``statistics``: of the whole vocabulary."""
    if compiled.supports(logits) and logits.shape[1]:
        torch.ops.megagap.cross_entropy_rows_gradient_(logits, targets, first, statistics, scale, z_loss)
    else:
        reference_gradient_(logits, targets, statistics, scale, z_loss, first)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float = 0.0) -> Tensor:
    """Overwrite logits of a whole vocabulary with their gradient, and return their statistics.

    Compiled, it reads and writes memory once: the second look at a row finds it in a cache. Kernels for CPUs raise
    :class:`IndexError` for a target beyond the columns.
    """
    if compiled.supports(logits) and logits.shape[1]:
        statistics: Tensor = torch.ops.megagap.cross_entropy_(logits, targets, scale, z_loss)
        return statistics
    statistics = reference_statistics(logits, targets)
    reference_gradient_(logits, targets, statistics, scale, z_loss)
    return statistics


def losses_of(statistics: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy and z-loss [n], from the statistics of the whole vocabulary; 0 where it is ignored."""
    maximum, total, at_target = statistics
    log_sum_exp, counted = maximum + total.log(), targets >= 0
    return (log_sum_exp - at_target).where(counted, 0), (z_loss * log_sum_exp.square()).where(counted, 0)


def reference_statistics(logits: Tensor, targets: Tensor, first: int = 0) -> Tensor:
    if not logits.shape[1]:
        nothing = targets.new_zeros(targets.shape, dtype=wide_dtype(logits.dtype))
        return torch.stack([nothing - float("inf"), nothing, nothing])
    values = wide(logits)
    maximum = values.amax(-1)
    total = (values - maximum.unsqueeze(-1)).exp_().sum(-1)
    column, is_here = _columns(logits, targets, first)
    at_target = values.gather(-1, column.unsqueeze(-1)).squeeze(-1)
    return torch.stack([maximum, total, at_target.where(is_here, 0)])


def reference_gradient_(
    logits: Tensor, targets: Tensor, statistics: Tensor, scale: Tensor, z_loss: float = 0.0, first: int = 0
) -> None:
    if not logits.shape[1]:
        return
    log_sum_exp = statistics[0] + statistics[1].log()
    gradient = (wide(logits) - log_sum_exp.unsqueeze(-1)).exp_()
    gradient.mul_((1 + 2 * z_loss * log_sum_exp).unsqueeze(-1))
    column, is_here = _columns(logits, targets, first)
    gradient.scatter_add_(-1, column.unsqueeze(-1), -is_here.to(gradient.dtype).unsqueeze(-1))
    logits.copy_(gradient.mul_(((targets >= 0) * scale).unsqueeze(-1)))


def _columns(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Where each row's target is among the columns, 0 where it is not; and whether it is."""
    column = targets - first
    is_here = (column >= 0) & (column < logits.shape[1])
    return column.where(is_here, 0), is_here


# -------------------------------------------------------------------------------------------- shapes of the kernels


def _rows_shape(logits: Tensor, targets: Tensor, first: int) -> Tensor:
    return targets.new_empty((3, *targets.shape), dtype=torch.float32)


def _one_pass_shape(logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float) -> Tensor:
    return targets.new_empty((3, *targets.shape), dtype=torch.float32)


def _no_shape(logits: Tensor, targets: Tensor, first: int, statistics: Tensor, scale: Tensor, z_loss: float) -> None:
    return None


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::cross_entropy_rows", _rows_shape)
    torch.library.register_fake("megagap::cross_entropy_rows_gradient_", _no_shape)
    torch.library.register_fake("megagap::cross_entropy_", _one_pass_shape)
