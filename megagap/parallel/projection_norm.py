"""RMSNorm over the whole width of projections whose columns are split over tp: OLMo 2's norms of queries and keys.

Inside of a region each rank has the part of a row that belongs to its heads, but the mean square is that of the whole
row. So one number per token and projection is summed over tp, all projections' at once, in the forward and in the
backward pass. Ranks that share key/value heads have the same part of a row, which counts once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagap.ops import rms_norm
from megagap.ops.wide import wide
from megagap.parallel.collectives import all_reduce
from megagap.parallel.shard import Shard
from megagap.parallel.tensor import ColumnParallelLinear, TensorParallel


class ProjectionNorm(nn.Module):
    """The learnt gain of a projection's norm, split as the rows of the projection are; :func:`normalised` applies it.

    Ranks that share rows use them for different queries, so each has a part of the gain's gradient, as of the weight's.
    """

    def __init__(
        self, name: str, of: ColumnParallelLinear, tensor_parallel: TensorParallel, eps: float, gain_scale: float
    ) -> None:
        super().__init__()
        rows, self.tp = of.weight.shard, tensor_parallel.mesh.tp
        first = rows.shape[:1], rows.offsets[:1], rows.sizes[:1], rows.local_shape[:1]
        self.weight = tensor_parallel.parameter(
            Shard(f"{name}.weight", *first, rows.replica_axis, rows.partial_gradient)
        )
        self.eps, self.gain_scale = eps, gain_scale
        self.width = rows.shape[0]
        """Of the whole projection."""
        self.copies = tensor_parallel.mesh.kv.size if rows.replica_axis else 1
        """Ranks that have the same part."""
        self.number: Tensor | None = None
        """Where compiled, what stands for the norm in the graph (``opaque.py``)."""


def normalised(projections: Sequence[Tensor], norms: Sequence[ProjectionNorm]) -> tuple[Tensor, ...]:
    """``gain · x / sqrt(mean(x²) + eps)`` of each projection, this rank's columns [b, s, width / tp], the mean over the
    whole width; rounded as by :func:`megagap.ops.rms_norm`."""
    if norms[0].tp.size == 1:
        pairs = zip(projections, norms, strict=True)
        return tuple(rms_norm(x, norm.weight, norm.eps, norm.gain_scale) for x, norm in pairs)
    weights = [norm.weight for norm in norms]
    if norms[0].number is not None and torch.compiler.is_compiling():
        numbers = [norm.number for norm in norms]
        made = torch.ops.megagap_parallel.normalised(list(projections), weights, numbers)
        return tuple(made[: len(norms)])
    return _Normalised.apply(norms, *projections, *weights)


class _Normalised(torch.autograd.Function):
    """Of each projection, followed by the gains."""

    @staticmethod
    def forward(ctx: Any, norms: Sequence[ProjectionNorm], *tensors: Tensor) -> tuple[Tensor, ...]:
        projections, weights = tensors[: len(norms)], tensors[len(norms) :]
        results, rstds = forward(norms, projections, weights)
        ctx.norms = norms
        ctx.save_for_backward(*tensors, *rstds)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, count = ctx.saved_tensors, len(ctx.norms)
        return None, *backward(ctx.norms, grads, saved[:count], saved[count : 2 * count], saved[2 * count :])


def forward(
    norms: Sequence[ProjectionNorm], projections: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and 1 / sqrt(mean(x²) + eps) of each, fp32 [b, s] (float64 of float64)."""
    pairs = list(zip(projections, norms, strict=True))
    squares = all_reduce(torch.stack([wide(x).square().sum(-1) / norm.copies for x, norm in pairs]), norms[0].tp)
    rstds = [torch.rsqrt(sums / norm.width + norm.eps) for sums, norm in zip(squares, norms, strict=True)]
    results = [
        _gain(norm, weight).to(x.dtype) * (wide(x) * rstd.unsqueeze(-1)).to(x.dtype)
        for (x, norm), weight, rstd in zip(pairs, weights, rstds, strict=True)
    ]
    return results, rstds


def backward(
    norms: Sequence[ProjectionNorm],
    grads: Sequence[Tensor],
    projections: Sequence[Tensor],
    weights: Sequence[Tensor],
    rstds: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of the projections, then those of the gains.

    With g the gradient of x / rms(x), that of x is rstd · g - x · rstd³ · Σ(g · x) / width, the sum over the whole row.
    Ranks with copies of a part each have their own queries' share of g, and subtract an equal share of the rest.
    """
    inner = [wide(grad) * _gain(norm, weight) for grad, norm, weight in zip(grads, norms, weights, strict=True)]
    dots = torch.stack([(g * wide(x)).sum(-1) for g, x in zip(inner, projections, strict=True)])
    found, of_gains = [], []
    for norm, grad, g, x, weight, rstd, dot in zip(
        norms, grads, inner, projections, weights, rstds, all_reduce(dots, norms[0].tp), strict=True
    ):
        along = (rstd.pow(3) * dot / (norm.width * norm.copies)).unsqueeze(-1)
        found.append((g * rstd.unsqueeze(-1) - wide(x) * along).to(x.dtype))
        product = wide(grad) * wide(x) * rstd.unsqueeze(-1)
        of_gains.append((product.flatten(0, -2).sum(0) * norm.gain_scale).to(weight.dtype))
    return found + of_gains


def _gain(norm: ProjectionNorm, weight: Tensor) -> Tensor:
    """Rounded to the dtype of the weight, in fp32."""
    return wide((wide(weight) * norm.gain_scale).to(weight.dtype))
