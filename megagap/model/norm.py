"""RMSNorm as a module: its gain, and the residual addition before it."""

from torch import Tensor, nn

from megagap.config import Model
from megagap.ops import add_rms_norm, rms_norm
from megagap.parallel.tensor import TensorParallel


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt gain (Zhang & Sennrich 2019), outside of regions."""

    def __init__(self, name: str, model: Model, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        shard = tensor_parallel.replicated(f"{name}.weight", (model.hidden_size,))
        self.weight = tensor_parallel.parameter(shard)
        self.eps, self.gain_scale = model.rms_norm_eps, model.norm_gain_scale

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.gain_scale)

    def after_adding(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum. Without an x, of the residual."""
        if x is None:
            return self(residual), residual
        return add_rms_norm(x, residual, self.weight, self.eps, self.gain_scale)
