"""Tensors that lie next to each other in memory, as one: what makes one matrix product of several, without a copy."""

from collections.abc import Sequence

from torch import Tensor


def as_one(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """What ``torch.cat(tensors, dim)`` returns, as a view of their memory; None if that is not possible.

    It is if all are parts of one storage with the same strides, each where the one before ends along ``dim``. They must
    agree in all other dimensions.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    storage, strides, length = first.untyped_storage()._cdata, first.stride(), 0
    for tensor in tensors:
        place = first.storage_offset() + length * strides[dim]
        if tensor.untyped_storage()._cdata != storage or tensor.stride() != strides or tensor.storage_offset() != place:
            return None
        length += tensor.shape[dim]
    shape = list(first.shape)
    shape[dim] = length
    return first.as_strided(shape, strides)
