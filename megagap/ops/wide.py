"""The precision in which sums are made: fp32 at least."""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32; float64 for float64, in which layouts are compared."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in :func:`wide_dtype`."""
    return tensor.to(wide_dtype(tensor.dtype))
