"""Decides, on the device and equally on every rank, whether a step's update is made."""

import torch
from torch import Tensor


def accept_update(loss: Tensor, grad_norm: Tensor) -> Tensor:
    """A device bool: both numbers, which are the same on all ranks, are finite."""
    return torch.isfinite(loss) & torch.isfinite(grad_norm)
