"""Gradients of matrices, accumulated in the dtype of the sum, whatever the dtype of what they are computed from."""

from functools import cache

import torch
from torch import Tensor

from megagap.ops.wide import wide, wide_dtype


def set_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Set ``total`` to leftᵀ right.

    total: [r, c] in fp32, or in the dtype of left [n, r] and right [n, c].
    """
    if left.dtype == total.dtype:
        torch.mm(left.T, right, out=total)
    elif adds_inside(left, total.dtype):
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
    elif adds_inside(left, total.dtype):
        torch.addmm(total, left.T, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left.T @ right)


def adds_inside(left: Tensor, total_dtype: torch.dtype) -> bool:
    """Whether :func:`add_product` of ``left`` to a sum in ``total_dtype`` adds inside of the matrix product, which then
    takes no memory of its own."""
    return left.dtype == total_dtype or (left.is_cuda and _sums_in_fp32(left.dtype))


def add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows[i] to total[ids[i]] for each i; total: [r, c], ids: [n], in which an id may recur, rows: [n, c].

    Rows of one id are summed in fp32 at least. Always in the same order, so that it repeats bit for bit: ``index_add_``
    does so on a CPU only, ``index_put_`` on a GPU only, where it sorts the ids and sums in fp32.
    """
    if total.is_cuda:
        total.index_put_((ids,), rows.to(total.dtype), accumulate=True)
        return
    if total.dtype != wide_dtype(total.dtype):
        ids, rows = _summed(ids, rows)
    total.index_add_(0, ids, rows.to(total.dtype))


def _summed(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As many ids and rows, in fp32 at least, of which each id has one that is the sum of its rows; others are 0."""
    ids, order = ids.sort(stable=True)
    places = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).cumsum(0)])
    ordered = wide(rows[order])
    sums = torch.zeros_like(ordered).index_add_(0, places, ordered)
    return ids[0].repeat(len(ids)).scatter_(0, places, ids), sums


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
