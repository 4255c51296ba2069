"""Clipping by the global gradient norm (Pascanu et al. 2013, algorithm 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from megagap.ops.wide import wide_dtype

ROW = 1024
"""Elements whose norm is computed at once on CPU."""

BLOCK = 1 << 20
"""Elements in half precision that are copied at a time there."""


def clip_divisor(norm: Tensor, limit: float) -> Tensor:
    """What gradients of global ``norm`` are divided by so that it does not exceed ``limit`` (0: no clipping).

    The inverse of ``torch.nn.utils.clip_grad_norm_``'s coefficient, its 1e-6 included. fp32 device scalar.
    """
    return ((norm + 1e-6) / limit).clamp(min=1.0) if limit else torch.ones_like(norm)


def squared_norm(parts: Sequence[Tensor]) -> Tensor:
    """The sum of squares of flat tensors, at least one, in one pass over memory; scalar, fp32 at least."""
    return torch.cat([_norms(part) for part in parts]).square().sum()


def _norms(part: Tensor) -> Tensor:
    """Of the whole of [n] on a GPU; on CPU of its rows, since there a norm has so few accumulators that over millions
    of elements it loses four digits."""
    dtype = wide_dtype(part.dtype)
    if part.is_cuda:
        return vector_norm(part, dtype=dtype)[None]
    if part.dtype != dtype and len(part) > BLOCK:  # torch makes a copy in dtype
        return torch.cat([_norms(block) for block in part.split(BLOCK)])
    whole = part.numel() // ROW * ROW
    rows = vector_norm(part[:whole].view(-1, ROW), dim=1, dtype=dtype)
    return torch.cat([rows, vector_norm(part[whole:], dtype=dtype)[None]])
