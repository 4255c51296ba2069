import pytest
import torch
from torch import Tensor

from tests.ops.gpu_source.shim import Shim

EPS = 1e-5
SHAPES = [(3, 64), (37, 136), (1, 33), (70, 5), (7, 1), (12, 2056), (3, 1001)]
"""Rows that share a block, rows of several waves (more of them than blocks), sizes that 16 bytes do not divide."""
LONG = [(3, 16392, torch.bfloat16), (2, 4101, torch.bfloat16), (3, 8196, torch.float32), (2, 4099, torch.float32)]
"""Rows that do not fit in registers, read in 16 bytes and by elements."""
CASES = [(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16, torch.float16)] + LONG


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, residual, grad, grad_total, weight"""
    generator = torch.Generator().manual_seed(rows * size)
    wide = [torch.randn(rows, size, generator=generator).to(dtype) for _ in range(4)]
    return *wide, (torch.rand(size, generator=generator) + 0.5).to(dtype)


def unfused(x: Tensor, weight: Tensor, gain_scale: float = 1.0, wide: torch.dtype = torch.float32) -> Tensor:
    """As transformers' LlamaRMSNorm computes; wholly in float64 where x is."""
    values = x.to(wide)
    normalised = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)
    return gain_scale * weight * normalised.to(x.dtype)


def gradients(x: Tensor, weight: Tensor, grad: Tensor, gain_scale: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    unfused(x, weight, gain_scale, wide).backward(grad)
    return x.grad, weight.grad


def error(got: Tensor, exact: Tensor) -> float:
    """Root mean square error, relative to the exact result's root mean square."""
    return float((got.double() - exact).norm() / exact.norm())


def assert_no_worse(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Than plain torch in the same dtype (a hundredth aside: single roundings are luck), or than one rounding."""
    assert error(got, exact) <= max(1.01 * error(plain, exact), torch.finfo(got.dtype).eps / 4, 3e-7)


@pytest.mark.parametrize(("rows", "size", "dtype"), CASES)
def test_norm_equals_float64_within_rounding_and_rounds_where_transformers_does(shim: Shim, rows, size, dtype):
    x, _, _, _, weight = inputs(rows, size, dtype)
    y, rstd, _ = shim.rms_norm(x, weight, EPS)
    torch.testing.assert_close(rstd.double(), (x.double().pow(2).mean(-1) + EPS).rsqrt(), rtol=1e-6, atol=0)
    exact = unfused(x.double(), weight.double(), wide=torch.float64)
    assert_no_worse(y, unfused(x, weight), exact)
    # The sum of squares is added up in another order: a value between two roundings may fall either way.
    assert (y != unfused(x, weight)).float().mean() < (0.02 if dtype != torch.float32 else 1)


@pytest.mark.parametrize(("rows", "size", "dtype"), CASES)
def test_gradients_equal_float64_at_least_as_well_as_unfused(shim: Shim, rows, size, dtype):
    x, _, grad, _, weight = inputs(rows, size, dtype)
    rstd = (x.float().pow(2).mean(-1) + EPS).rsqrt()
    got = shim.rms_norm_backward(grad, x, weight, rstd)
    exact = gradients(x.double(), weight.double(), grad.double(), 1.0, torch.float64)
    plain = gradients(x, weight, grad, 1.0, torch.float32)
    for ours, theirs, wanted in zip(got, plain, exact, strict=True):
        assert_no_worse(ours, theirs, wanted)


@pytest.mark.parametrize(
    ("rows", "size", "dtype"), [(37, 136, torch.bfloat16), (5, 33, torch.float32), LONG[1], LONG[2]]
)
def test_residual_is_added_rounded_and_gets_its_gradient(shim: Shim, rows, size, dtype):
    x, residual, grad, grad_total, weight = inputs(rows, size, dtype)
    y, rstd, total = shim.rms_norm(x, weight, EPS, residual=residual)
    assert torch.equal(total, x + residual)
    alone = shim.rms_norm(total, weight, EPS)
    assert torch.equal(y, alone[0]) and torch.equal(rstd, alone[1])
    grad_x, grad_weight = shim.rms_norm_backward(grad, total, weight, rstd, grad_total=grad_total)
    exact = gradients(total.double(), weight.double(), grad.double(), 1.0, torch.float64)
    assert error(grad_x, exact[0] + grad_total.double()) <= (2**-9 if dtype == torch.bfloat16 else 3e-7)
    assert torch.equal(grad_weight, shim.rms_norm_backward(grad, total, weight, rstd)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_gain_is_rounded_before_the_product(shim: Shim, dtype):
    x, _, grad, _, weight = inputs(9, 72, dtype)
    small = weight / 20
    y, rstd, _ = shim.rms_norm(x, small, EPS, 20.0)
    gain = (20 * small.float()).to(dtype)
    assert torch.equal(y, shim.rms_norm(x, gain, EPS)[0])
    grad_x, grad_weight = shim.rms_norm_backward(grad, x, small, rstd, 20.0)
    plain = shim.rms_norm_backward(grad, x, gain, rstd)
    assert torch.equal(grad_x, plain[0])
    torch.testing.assert_close(grad_weight.float(), 20 * plain[1].float(), rtol=2**-7, atol=1e-5)


def test_no_rows_give_a_zero_weight_gradient(shim: Shim):
    x, weight = torch.empty(0, 40), torch.ones(40)
    assert shim.rms_norm(x, weight, EPS)[0].shape == (0, 40)
    assert torch.equal(shim.rms_norm_backward(x, x, weight, torch.empty(0))[1], torch.zeros(40))


def test_unaligned_rows_are_read_by_elements(shim: Shim):
    x, _, grad, _, weight = inputs(4, 64, torch.bfloat16)
    moved = torch.empty(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64).copy_(x)
    whole, apart = shim.rms_norm(x, weight, EPS), shim.rms_norm(moved, weight, EPS)
    torch.testing.assert_close(whole[:2], apart[:2], rtol=2**-7, atol=0)
    for ours, theirs in zip(
        shim.rms_norm_backward(grad, x, weight, whole[1]),
        shim.rms_norm_backward(grad, moved, weight, whole[1]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("rows", "size", "dtype"), [(37, 136, torch.bfloat16), (12, 2056, torch.float32), LONG[0]])
def test_bits_are_the_same_when_repeated_and_with_threads_in_reverse(shim: Shim, rows, size, dtype):
    x, residual, grad, grad_total, weight = inputs(rows, size, dtype)

    def results() -> list[Tensor]:
        y, rstd, total = shim.rms_norm(x, weight, EPS, residual=residual)
        return [y, rstd, total, *shim.rms_norm_backward(grad, x, weight, rstd, grad_total=grad_total)]

    first = results()
    shim.reverse_threads(True)
    assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_rounded_as_by_torch(shim: Shim, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(256, 256)
    other = x.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(256, 256)
    _, _, total = shim.rms_norm(x, x[0], EPS, residual=other)
    torch.testing.assert_close(total, x + other, rtol=0, atol=0, equal_nan=True)
