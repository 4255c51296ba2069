"""The feed-forward block of a layer."""

from torch import Tensor, nn

from megagap.config import Model
from megagap.ops import swiglu
from megagap.parallel.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x)); a region."""

    def __init__(self, name: str, model: Model, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        narrow, wide, bias = model.hidden_size, model.intermediate_size, model.mlp_bias
        self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", narrow, wide, tensor_parallel, bias=bias)
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", narrow, wide, tensor_parallel, bias=bias)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", wide, narrow, tensor_parallel, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*column_parallel(x, self.gate_proj, self.up_proj)))
