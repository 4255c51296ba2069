"""Collectives over a mesh axis: the identity where the axis has one member."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.parallel.mesh import Axis
from megagap.parallel.spans import Span

# torch 2.13 renamed these two.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Started:
    """A collective that may still be running, known to the process's spans while it is waited for."""

    work: dist.Work
    span: Span

    def wait(self) -> None:
        with self.span:
            self.work.wait()


def _started(work: dist.Work | None, name: str, axis: Axis) -> Started:
    assert work is not None
    return Started(work, axis.spans.collective(name, axis.name))


@dataclass(frozen=True)
class Pending:
    """The result of a collective that may still be running."""

    tensor: Tensor
    works: Sequence[Started] = ()
    sent: Tensor | None = None
    """What must live, unchanged, until then."""

    def wait(self) -> Tensor:
        """The result, to be used from now on; on a GPU its stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.tensor


def all_reduce(tensor: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over the axis; returns ``tensor``."""
    if axis.group is not None:
        with axis.spans.collective("all-reduce", axis.name):
            dist.all_reduce(tensor, op=op, group=axis.group)
    return tensor


def all_reduce_async(tensor: Tensor, axis: Axis) -> Pending:
    """Start summing over the axis, in place."""
    if axis.group is None:
        return Pending(tensor)
    return Pending(tensor, [_started(dist.all_reduce(tensor, group=axis.group, async_op=True), "all-reduce", axis)])


def all_gather_async(tensor: Tensor, axis: Axis, dim: int) -> Pending:
    """Start concatenating the members' tensors along ``dim``.

    One collective for each index of the dimensions before: the members' parts are then neighbours in the result, and
    nothing is permuted.
    """
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    whole = tensor.new_empty(*tensor.shape[:dim], axis.size * tensor.shape[dim], *tensor.shape[dim + 1 :])
    rows = zip(_rows(whole, dim), _rows(tensor, dim), strict=True)
    works = [_all_gather_flat(into, row, group=axis.group, async_op=True) for into, row in rows]
    return Pending(whole, [_started(work, "all-gather", axis) for work in works])


def reduce_scatter_async(tensor: Tensor, axis: Axis, dim: int) -> Pending:
    """Start summing over the members; each keeps its equal part along ``dim``. In as many collectives as the gather."""
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    mine = tensor.new_empty(*tensor.shape[:dim], tensor.shape[dim] // axis.size, *tensor.shape[dim + 1 :])
    rows = zip(_rows(mine, dim), _rows(tensor, dim), strict=True)
    works = [_reduce_scatter_flat(into, row, group=axis.group, async_op=True) for into, row in rows]
    return Pending(mine, [_started(work, "reduce-scatter", axis) for work in works])


def _rows(tensor: Tensor, dim: int) -> Sequence[Tensor]:
    """Views of a contiguous tensor: a flat one for each index of the dimensions before ``dim``."""
    return tensor.view(prod(tensor.shape[:dim]), -1).unbind()


def reduce_scatter_flat_async(output: Tensor, tensor: Tensor, axis: Axis) -> Started | None:
    """Start summing ``tensor`` [n] over the axis into each member's ``output`` [n / size]."""
    if axis.group is None:
        output.copy_(tensor)
        return None
    work = _reduce_scatter_flat(output, tensor, group=axis.group, async_op=True)
    return _started(work, "reduce-scatter", axis)


def all_gather_flat_async(output: Tensor, tensor: Tensor, axis: Axis) -> Started | None:
    """Start collecting every member's ``tensor`` [n / size] into ``output`` [n]."""
    if axis.group is None:
        output.copy_(tensor)
        return None
    work = _all_gather_flat(output, tensor, group=axis.group, async_op=True)
    return _started(work, "all-gather", axis)


def pass_on_async(tensor: Tensor, axis: Axis) -> Pending:
    """Start sending to the next member of the axis, as a ring, what the member before sends alike."""
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    following, before = axis.ranks[(axis.rank + 1) % axis.size], axis.ranks[axis.rank - 1]
    send = dist.P2POp(dist.isend, tensor, following, axis.group)
    receive = dist.P2POp(dist.irecv, received, before, axis.group)
    works = dist.batch_isend_irecv([send, receive])
    return Pending(received, [_started(work, "ring", axis) for work in works], tensor)


def all_to_all_uneven(tensor: Tensor, given: Sequence[int], taken: Sequence[int], axis: Axis) -> Tensor:
    """Give ``given[i]`` elements of ``tensor`` [n] to each member i, in this order; returns what they give alike, of
    ``taken[i]`` elements each."""
    if axis.group is None:
        return tensor
    received = tensor.new_empty(sum(taken))
    with axis.spans.collective("all-to-all", axis.name):
        dist.all_to_all_single(received, tensor, list(taken), list(given), group=axis.group)
    return received


def all_to_all_async(tensor: Tensor, axis: Axis) -> Pending:
    """Start giving ``tensor[i]`` [members, …] to member i, from each of whom one comes: [members, …]."""
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    received = torch.empty_like(tensor)
    work = dist.all_to_all_single(received, tensor, group=axis.group, async_op=True)
    return Pending(received, [_started(work, "all-to-all", axis)], tensor)
