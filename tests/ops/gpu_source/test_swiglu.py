import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.gpu_source.shim import Shim

SHAPES = [(1, 1), (1, 4099), (1, 9000), (3, 136), (7, 13), (2, 4100)]
"""Rows that are split over blocks, whose size is a multiple of 16 bytes or not."""


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + size)
    grad, gate, up = (3 * torch.randn(rows, size, generator=generator) for _ in range(3))
    return grad.to(dtype), gate.to(dtype), up.to(dtype)


def with_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = F.silu(gate) * up
    y.backward(grad)
    return y.detach(), gate.grad, up.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_result_and_gradients_equal_float64_at_least_as_well_as_unfused(shim: Shim, rows, size, dtype):
    grad, gate, up = inputs(rows, size, dtype)
    got = shim.swiglu(gate, up), *shim.swiglu_backward(grad, gate, up)
    plain, exact = with_gradients(grad, gate, up), with_gradients(grad.double(), gate.double(), up.double())
    for ours, theirs, wanted in zip(got, plain, exact, strict=True):
        error, allowed = ((x.double() - wanted).abs().max() for x in (ours, theirs))
        assert error <= max(allowed, 5e-7 * wanted.abs().max())


@pytest.mark.parametrize("size", [24, 136, 4100])
def test_halves_of_a_packed_projection_are_read_in_place(shim: Shim, size):
    grad, gate, up = inputs(5, size, torch.bfloat16)
    packed = torch.cat((gate, up), 1)
    parts = packed[:, :size], packed[:, size:]
    assert torch.equal(shim.swiglu(*parts), shim.swiglu(gate, up))
    together, apart = shim.swiglu_backward(grad, *parts), shim.swiglu_backward(grad, gate, up)
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_gates_neither_overflow_nor_lose_their_sign(shim: Shim, dtype):
    gate, up = torch.tensor([[-200.0, -90.0, 90.0, 200.0]], dtype=dtype), torch.ones(1, 4, dtype=dtype)
    assert torch.equal(shim.swiglu(gate, up), torch.tensor([[0.0, 0.0, 90.0, 200.0]], dtype=dtype))
    by_gate, _ = shim.swiglu_backward(up, gate, up)
    assert torch.equal(by_gate, torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=dtype))


def test_empty_input_gives_empty_output(shim: Shim):
    nothing = torch.empty(0, 8)
    assert shim.swiglu(nothing, nothing).shape == (0, 8)
