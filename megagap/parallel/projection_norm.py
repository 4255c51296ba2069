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
from megagap.parallel.mesh import Axis
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
    first, dtype = norms[0], projections[0].dtype
    if first.tp.size == 1:
        pairs = zip(projections, norms, strict=True)
        return tuple(rms_norm(x, norm.weight, norm.eps, norm.gain_scale) for x, norm in pairs)
    values = [wide(x) for x in projections]
    squares = torch.stack([x.square().sum(-1) / norm.copies for x, norm in zip(values, norms, strict=True)])
    if first.number is not None and torch.compiler.is_compiling():
        squares = torch.ops.megagap_parallel.summed(squares, first.number)
    else:
        squares = _Summed.apply(squares, first.tp)
    results = []
    for x, norm, total in zip(values, norms, squares, strict=True):
        gain = (wide(norm.weight) * norm.gain_scale).to(dtype)
        rstd = torch.rsqrt(total / norm.width + norm.eps).unsqueeze(-1)
        results.append(gain * (x * rstd).to(dtype))
    return tuple(results)


class _Summed(torch.autograd.Function):
    """The sum over an axis, of which each rank uses all: so its gradient is summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.clone(), ctx.axis), None
