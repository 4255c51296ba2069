"""The feed-forward block of a layer."""

from torch import Tensor, nn

from megagap.config import Model
from megagap.ops import swiglu
from megagap.parallel.shard import pack
from megagap.parallel.tensor import Again, ColumnParallelLinear, RowParallelLinear, TensorParallel, column_parallel


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x)); a region."""

    def __init__(self, name: str, model: Model, tensor_parallel: TensorParallel, *, keep_product: bool = True) -> None:
        """``keep_product``: of gate and up for the backward pass; else it is computed again."""
        super().__init__()
        self.keep_product = keep_product
        narrow, wide, bias = model.hidden_size, model.intermediate_size, model.mlp_bias
        self.gate_proj = ColumnParallelLinear(f"{name}.gate_proj", narrow, wide, tensor_parallel, bias=bias)
        self.up_proj = ColumnParallelLinear(f"{name}.up_proj", narrow, wide, tensor_parallel, bias=bias)
        pack(self.gate_proj.weight, self.up_proj.weight)
        self.down_proj = RowParallelLinear(f"{name}.down_proj", wide, narrow, tensor_parallel, bias=bias)

    def forward(self, x: Tensor, again: Again | None = None) -> Tensor:
        """``again``: makes x in the backward pass, which then does not keep it."""
        gate, up = column_parallel(x, self.gate_proj, self.up_proj, again=again)
        y: Tensor = self.down_proj(
            swiglu(gate, up), None if self.keep_product else Again(swiglu, (gate.detach(), up.detach()))
        )
        return y
