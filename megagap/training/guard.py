"""Decides, on the device and identically on every rank, whether a step's update is applied."""

import torch
from torch import Tensor


def accept_update(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """A device bool: both numbers, which are the same on all ranks, are finite, and there is a gradient.

    A loss without a gradient comes from weights so large that a norm's squares overflow: x / inf hides it as 0.
    """
    return torch.isfinite(loss) & torch.isfinite(grad_norm) & ((grad_norm > 0) | (loss == 0))
