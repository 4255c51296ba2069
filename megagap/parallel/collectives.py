"""Collectives over a mesh axis: the identity where the axis has one member."""

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.parallel.mesh import Axis

# torch 2.13 renamed these two.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(tensor: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis; returns ``tensor``."""
    if axis.group is not None:
        dist.all_reduce(tensor, op=op, group=axis.group)
    return tensor


def all_gather(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate the members' tensors along ``dim``."""
    if axis.group is None:
        return tensor
    tensor = tensor.contiguous()
    parts = tensor.new_empty(axis.size, *tensor.shape)
    _all_gather_flat(parts.view(-1), tensor.view(-1), group=axis.group)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum over the members; each keeps its equal part along ``dim``."""
    if axis.group is None:
        return tensor
    parts = tensor.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    _reduce_scatter_flat(mine.view(-1), parts.view(-1), group=axis.group)
    return mine


def reduce_scatter_flat_async(output: Tensor, tensor: Tensor, axis: Axis) -> dist.Work | None:
    """Start summing ``tensor`` [n] over the axis into each member's ``output`` [n / size]."""
    if axis.group is None:
        output.copy_(tensor)
        return None
    return _reduce_scatter_flat(output, tensor, group=axis.group, async_op=True)


def all_gather_flat_async(output: Tensor, tensor: Tensor, axis: Axis) -> dist.Work | None:
    """Start collecting every member's ``tensor`` [n / size] into ``output`` [n]."""
    if axis.group is None:
        output.copy_(tensor)
        return None
    return _all_gather_flat(output, tensor, group=axis.group, async_op=True)
