"""Clipping by the global gradient norm (Pascanu et al. 2013, algorithm 1)."""

import torch
from torch import Tensor


def clip_divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of global ``norm`` are divided by so that it does not exceed ``limit`` (0: no clipping).

    The inverse of ``torch.nn.utils.clip_grad_norm_``'s coefficient, its 1e-6 included. fp32 device scalar.
    """
    return ((norm + 1e-6) / limit).clamp(min=1.0) if limit else torch.ones_like(norm)


def squared_norm(flat: Tensor) -> Tensor:
    """The sum of squares of a flat fp32 tensor, in one pass over memory on a GPU; fp32 scalar.

    Not on CPU: there ``vector_norm`` uses so few accumulators that over millions of elements it loses four digits.
    """
    return torch.linalg.vector_norm(flat).square() if flat.is_cuda else flat.square().sum()
