"""Gradients of matrices that are accumulated in fp32, whatever the dtype of what they are computed from."""

from functools import cache

import torch
from torch import Tensor

from megagap.ops.wide import wide_dtype


def set_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Set ``total`` to leftᵀ right; total: fp32 [r, c], left: [n, r], right: [n, c], both of one dtype."""
    if left.dtype == total.dtype:
        torch.mm(left.T, right, out=total)
    elif adds_inside(left.dtype, left.device):
        torch.mm(left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.copy_(left.T @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to ``total`` in place; shapes as in :func:`set_product`.

    On GPU a half-precision product is accumulated inside the matrix product, if torch supports it (from 2.9 on):
    otherwise it is rounded, written, and read again, at three times the memory traffic.
    """
    if left.dtype == total.dtype:
        torch.addmm(total, left.T, right, out=total)
    elif adds_inside(left.dtype, left.device):
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.T @ right)


def adds_inside(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`add_product` of operands in ``dtype`` adds inside of the matrix product, so that the product takes
    no memory of its own."""
    return dtype == wide_dtype(dtype) or (device.type == "cuda" and _sums_in_fp32(dtype))


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows[i] to total[ids[i]] for each i; total: fp32 [r, c], ids: [n], in which an id may recur, rows: [n, c].

    Always in the same order, so that it repeats bit for bit: ``index_add_`` does so on a CPU only, ``index_put_`` on
    a GPU only, where it sorts the ids.
    """
    rows = rows.to(total.dtype)
    if total.is_cuda:
        total.index_put_((ids,), rows, accumulate=True)
    else:
        total.index_add_(0, ids, rows)


@cache
def _sums_in_fp32(dtype: torch.dtype) -> bool:
    """Whether this torch's products of ``dtype`` can have a result in fp32: some builds for AMD's GPUs have the
    operators, and refuse to run them."""
    if not _HAS_OPERATORS:
        return False
    one = torch.ones(16, 16, dtype=dtype, device="cuda")
    total = torch.zeros(16, 16, dtype=torch.float32, device="cuda")
    try:
        torch.mm(one, one, out_dtype=total.dtype, out=total)
        torch.addmm(total, one, one, out_dtype=total.dtype, out=total)
    except RuntimeError:
        return False
    return True


_HAS_OPERATORS = all(
    any(schema.overload_name == "dtype_out" for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"))
    for name in ("mm", "addmm")
)
