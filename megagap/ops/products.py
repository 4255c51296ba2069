"""Matrix products that are accumulated in fp32, whatever the dtype of their factors."""

import torch
from torch import Tensor


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to ``total`` in place; total: fp32 [r, c], left: [n, r], right: [n, c], both of one dtype.

    On GPU a half-precision product is accumulated inside the matrix product, if torch supports it (from 2.9 on):
    otherwise it is rounded, written, and read again, at three times the memory traffic.
    """
    if left.dtype == total.dtype:
        torch.addmm(total, left.T, right, out=total)
    elif left.is_cuda and _HAS_FP32_SUMS:
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.T @ right)


_HAS_FP32_SUMS = any(
    schema.overload_name == "dtype_out" for schema in torch._C._jit_get_schemas_for_operator("aten::addmm")
)
