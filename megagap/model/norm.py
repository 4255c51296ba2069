"""RMSNorm as a module: its gain, and the residual addition before it."""

from torch import Tensor, nn

from megagap.config import Model
from megagap.ops import add_rms_norm, rms_norm
from megagap.parallel.tensor import Again, TensorParallel


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learnt gain (Zhang & Sennrich 2019), outside of regions."""

    def __init__(self, name: str, model: Model, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        shard = tensor_parallel.replicated(f"{name}.weight", (model.hidden_size,))
        self.weight = tensor_parallel.parameter(shard)
        self.eps, self.gain_scale = model.rms_norm_eps, model.norm_gain_scale

    def forward(self, residual: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The norm of residual + update, and that sum. Without an update, of the residual."""
        if update is None:
            return rms_norm(residual, self.weight, self.eps, self.gain_scale), residual
        return add_rms_norm(update, residual, self.weight, self.eps, self.gain_scale)

    def again(self, total: Tensor) -> Again:
        """How to make its first result again from the second."""
        return Again(self._normalised, (total.detach(),), (self.weight,))

    def _normalised(self, total: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(total, weight, self.eps, self.gain_scale)
