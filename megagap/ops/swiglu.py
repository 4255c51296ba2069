"""SwiGLU's elementwise part (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, elementwise, in the dtype of the inputs."""
    return F.silu(gate) * up
