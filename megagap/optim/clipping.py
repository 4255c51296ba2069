"""Clipping by the global gradient norm (Pascanu et al. 2013, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megagap.ops.wide import wide, wide_dtype

PIECE = 1 << 20
"""Elements that are copied to be squared in a wider type."""


def clip_divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of global ``norm`` are divided by so that it does not exceed ``limit`` (0: no clipping).

    The inverse of ``torch.nn.utils.clip_grad_norm_``'s coefficient, its 1e-6 included. fp32 device scalar.
    """
    return ((norm + 1e-6) / limit).clamp(min=1.0) if limit else torch.ones_like(norm)


def squared_norm(parts: Sequence[Tensor]) -> Tensor:
    """The sum of squares of flat tensors, at least one, in one pass over memory on a GPU; scalar, fp32 at least.

    Not on CPU: there ``vector_norm`` uses so few accumulators that over millions of elements it loses four digits.
    """
    dtype = wide_dtype(parts[0].dtype)
    if parts[0].is_cuda:
        return torch.stack([torch.linalg.vector_norm(part, dtype=dtype) for part in parts]).square().sum()
    if parts[0].dtype != dtype:
        parts = [piece for part in parts for piece in part.split(PIECE)]
    return torch.stack([wide(part).square().sum() for part in parts]).sum()
