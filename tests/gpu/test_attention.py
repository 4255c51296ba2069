"""Attention and sums of products on a GPU, with whatever kernel is chosen there, against float64 on the CPU."""

import pytest
import torch
from torch import Tensor

from megagap.ops import attention
from megagap.ops.arithmetic import deterministic_kernels
from megagap.ops.document_mask import Documents, document_attention
from megagap.ops.products import add_product

pytestmark = pytest.mark.gpu

ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Root mean square error, relative to the exact result's root mean square."""


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double().cpu() - exact).norm() / exact.norm())


def both_passes(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("heads", [(8, 8, 64), (8, 2, 128), (6, 3, 20)], ids=str)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_values_and_gradients_equal_float64(gpu, dtype, heads, packed):
    count, key_count, size = heads
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(2, 200, n, size, generator=generator).to(dtype) for n in (count, key_count, key_count, count)
    )
    places = torch.cat([torch.arange(n) for n in (1, 70, 129)]).expand(2, -1)
    documents = Documents.of(places) if packed else None
    on_gpu = documents.to(gpu) if documents else None

    def run(packing, *inputs):
        return attention(*inputs) if packing is None else document_attention(*inputs, packing)

    exact = both_passes(lambda *x: run(documents, *x), [x.double() for x in (q, k, v)], grad.double())
    got = both_passes(lambda *x: run(on_gpu, *x), [x.to(gpu) for x in (q, k, v)], grad.to(gpu))
    for ours, wanted in zip(got, exact, strict=True):
        assert error(ours, wanted) < ERRORS[dtype]


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_parts_of_one_projection_give_what_copies_give(gpu, dtype):
    parts = torch.randn(2, 256, 12, 64, device=gpu).to(dtype).split([8, 2, 2], 2)
    grad = torch.randn(2, 256, 8, 64, device=gpu).to(dtype)
    views, copies = (both_passes(attention, given, grad) for given in (parts, [x.contiguous() for x in parts]))
    for one, other in zip(views, copies, strict=True):
        assert error(one, other.double().cpu()) < ERRORS[dtype]


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_gradients_repeat_bit_for_bit_where_they_must(gpu, dtype, packed):
    """Many blocks of keys for each block of queries, whose sums would otherwise be added as they come."""
    q, k, v, grad = (torch.randn(2, 2048, n, 64, device=gpu).to(dtype) for n in (8, 2, 2, 8))
    documents = Documents.of(torch.arange(2048).remainder(1500).expand(2, -1)).to(gpu)

    def run(*inputs):
        return document_attention(*inputs, documents) if packed else attention(*inputs)

    with deterministic_kernels(True):
        first = both_passes(run, [q, k, v], grad)
        for _ in range(3):
            assert all(map(torch.equal, both_passes(run, [q, k, v], grad), first))


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_products_are_added_up_in_fp32(gpu, dtype):
    left, right = (torch.randn(512, n, device=gpu).to(dtype) for n in (96, 200))
    total = torch.randn(96, 200, device=gpu)
    exact = total.double().cpu() + 3 * (left.double().T @ right.double()).cpu()
    for _ in range(3):
        add_product(total, left, right)
    # A product that was rounded to half precision on the way would miss this by far.
    assert error(total, exact) < 1e-5
