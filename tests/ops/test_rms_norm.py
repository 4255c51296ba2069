import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megagap.ops import add_rms_norm, compiled, rms_norm
from megagap.ops.rms_norm import reference

needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")
SHAPES = [(3, 5, 64), (7, 1), (1, 33), (129, 37), (200, 2, 17), (5,)]
"""Sizes that vector lengths do not divide, more rows than blocks of the weight gradient, and a single row."""


def in_float64(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y and the gradients of x and weight, from the formulas written out."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    rstd = 1 / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    normalised, wanted = x * rstd, grad * weight
    grad_x = rstd * (wanted - normalised * (wanted * normalised).sum(-1, keepdim=True) / x.shape[-1])
    grad_weight = (grad * normalised).reshape(-1, x.shape[-1]).sum(0)
    return normalised * weight, grad_x, grad_weight


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)
    return x, weight, grad


def run(function, x: Tensor, weight: Tensor, grad: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, eps)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("function", [rms_norm, reference])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)])
def test_result_and_gradients_equal_the_formulas_in_float64(function, shape, dtype, tolerance):
    x, weight, grad = inputs(shape, dtype)
    expected = in_float64(x, weight, grad, 1e-5)
    for name, got, wanted in zip(("y", "grad_x", "grad_weight"), run(function, x, weight, grad), expected, strict=True):
        assert got.dtype == dtype, name
        scale = wanted.abs().max().clamp(min=1.0)
        assert (got.double() - wanted).abs().max() / scale < tolerance, name


@needs_kernels
@pytest.mark.parametrize("size", [1, 15, 64, 333, 2048, 5000, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_those_of_transformers_bit_for_bit(size, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(size, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    x, theirs.weight.data = (torch.randn(shape, generator=generator).to(dtype) for shape in ((67, size), (size,)))
    assert torch.equal(rms_norm(x, theirs.weight), theirs(x))


@needs_kernels
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_give_the_same_bits(capability):
    program = (
        "import torch, hashlib, numpy; from megagap.ops import add_rms_norm, rms_norm\n"
        "random = numpy.random.default_rng(0); digest = hashlib.sha256()\n"  # torch's own depends on the set
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    x, r = (torch.tensor(random.normal(size=(9, 1003))).to(dtype).requires_grad_() for _ in range(2))\n"
        "    w = torch.tensor(random.random(1003)).to(dtype).requires_grad_()\n"
        "    y, total = add_rms_norm(x, r, w, 1e-5, 20.0)\n"
        "    results = [rms_norm(x, w), y, total]\n"
        "    for part in results: digest.update(part.detach().view(torch.uint8).numpy().tobytes())\n"
        "print(torch.backends.cpu.get_cpu_capability().lower(), digest.hexdigest())\n"
    )
    digests = []
    for forced in ({"ATEN_CPU_CAPABILITY": capability}, {}):
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **forced}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.split())
    assert digests[0][0] == capability.replace("default", "no avx") or digests[0][0] == capability
    assert digests[0][1] == digests[1][1]


def test_gaperons_scaled_gain_starts_at_one_and_moves_where_a_plain_one_does_not():
    x = torch.randn(4, 64).bfloat16()
    stored = torch.full((64,), 1 / 20).bfloat16()
    assert float(stored[0]) == 0.050048828125
    assert torch.equal(rms_norm(x, stored, gain_scale=20.0), rms_norm(x, torch.ones(64).bfloat16()))
    # The smallest updates of a gain in bf16 that are not lost to rounding.
    for gain, up, down in ((torch.ones(1), 3.91e-3, 1.96e-3), (torch.full((1,), 1 / 20), 1.23e-4, 1.23e-4)):
        gain = gain.bfloat16()
        assert (gain.float() + up).bfloat16() > gain > (gain.float() - down).bfloat16()
        assert (gain.float() + 0.99 * up).bfloat16() == gain == (gain.float() - 0.99 * down).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_scaled_gain_is_scaled(dtype):
    x, weight, grad = inputs((6, 33), dtype)
    plain = run(rms_norm, x, (weight * 20).to(dtype), grad)
    scaled = run(lambda x, w, eps: rms_norm(x, w, eps, 20.0), x, weight, grad)
    torch.testing.assert_close(scaled[:2], plain[:2])
    torch.testing.assert_close(scaled[2], 20 * plain[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_after_an_addition_equals_the_two_separately(dtype):
    x, weight, grad = inputs((5, 7, 33), dtype)
    residual, grad_total = grad.roll(1, 0), x.roll(1, 0)
    leaves = [part.detach().requires_grad_() for part in (x, residual, weight)]
    y, total = add_rms_norm(*leaves)
    torch.autograd.backward([y, total], [grad, grad_total])
    assert torch.equal(total, x + residual) and torch.equal(y, rms_norm(x + residual, weight))
    grad_weight = run(rms_norm, x + residual, weight, grad)[2]
    # The sum of both gradients is rounded once, not twice.
    wanted = in_float64(x + residual, weight, grad, 1e-5)[1] + grad_total.double()
    torch.testing.assert_close(
        leaves[0].grad.double(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(leaves[2].grad, grad_weight)


@pytest.mark.parametrize("function", [rms_norm, reference])
def test_gradients_follow_finite_differences(function):
    generator = torch.Generator().manual_seed(1)
    x, weight, direction = (torch.randn(n, generator=generator) for n in ((4, 9), (9,), (4, 9)))
    _, grad_x, grad_weight = run(function, x, weight, direction)

    def loss(x: Tensor, weight: Tensor) -> float:
        return float((in_float64(x, weight, direction, 1e-5)[0] * direction.double()).sum())

    for tensor, grad, moved in (
        (x, grad_x, lambda step: loss(x.double() + step, weight)),
        (weight, grad_weight, lambda step: loss(x, weight.double() + step)),
    ):
        for index in range(tensor.numel()):
            step = torch.zeros(tensor.numel(), dtype=torch.float64)
            step[index] = 1e-4
            step = step.view_as(tensor)
            slope = (moved(step) - moved(-step)) / 2e-4
            assert abs(slope - float(grad.flatten()[index])) < 1e-4


@pytest.mark.parametrize("function", [rms_norm, reference])
def test_input_without_rows_gives_no_rows_and_a_zero_weight_gradient(function):
    y, grad_x, grad_weight = run(function, torch.empty(0, 8), torch.ones(8), torch.empty(0, 8))
    assert y.shape == grad_x.shape == (0, 8)
    assert torch.equal(grad_weight, torch.zeros(8))


@pytest.mark.parametrize("function", [rms_norm, reference])
def test_rows_of_zeros_stay_zero_and_have_finite_gradients(function):
    y, grad_x, grad_weight = run(function, torch.zeros(3, 8), torch.ones(8), torch.ones(3, 8))
    assert torch.equal(y, torch.zeros(3, 8))
    assert grad_x.isfinite().all()
    assert torch.equal(grad_weight, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_the_inputs_do_not_matter(dtype):
    x, weight, grad = inputs((6, 10, 24), dtype)
    expected = run(rms_norm, x, weight, grad)
    spread = torch.stack([weight, -weight], dim=1)[:, 0]
    strided = run(rms_norm, x.transpose(0, 1).contiguous().transpose(0, 1), spread, grad[:1].expand(6, 10, 24))
    assert torch.equal(strided[0], expected[0])
    assert torch.equal(strided[1], run(rms_norm, x, weight, grad[:1].expand(6, 10, 24).contiguous())[1])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 65, 1000])
def test_results_are_bit_identical_for_any_number_of_threads_and_when_repeated(dtype, rows):
    before = torch.get_num_threads()
    x, weight, grad = inputs((rows, 333), dtype)
    try:
        results = []
        for threads in (1, 2, 3, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(rms_norm, x, weight, grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_and_plain_agree_in_fp32(shape):
    x, weight, grad = inputs(shape, torch.float32)
    for got, wanted in zip(run(rms_norm, x, weight, grad), run(reference, x, weight, grad), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


@needs_kernels
def test_inputs_that_the_kernel_does_not_support_are_computed_by_plain_torch():
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    assert torch.equal(rms_norm(x, weight), reference(x, weight))
    assert rms_norm(torch.randn(3, 8).bfloat16(), torch.ones(8)).dtype == torch.float32


@needs_kernels
@pytest.mark.parametrize(
    ("x", "weight", "error"),
    [
        (torch.ones(3, 8), torch.ones(9), ValueError),
        (torch.ones(3, 8), torch.ones(8).bfloat16(), TypeError),
        (torch.ones(3, 8).int(), torch.ones(8).int(), NotImplementedError),
    ],
)
def test_kernel_refuses_mismatched_inputs(x, weight, error):
    with pytest.raises(error, match=r"rms_norm|megagap"):
        torch.ops.megagap.rms_norm(x, weight, 1e-5, 1.0)


def test_without_kernels_one_warning_is_given_and_plain_torch_computes():
    program = (
        "import sys, warnings\n"
        "sys.modules['megagap._C'] = None\n"  # importing it raises ModuleNotFoundError
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch, megagap.ops as ops, megagap.ops.rms_norm\n"
        "seen = [str(w.message) for w in seen if 'megagap' in str(w.message)]\n"
        "assert len(seen) == 1 and 'plain torch' in seen[0], seen\n"
        "x, weight = torch.randn(3, 8), torch.rand(8)\n"
        "assert torch.equal(ops.rms_norm(x, weight), sys.modules['megagap.ops.rms_norm'].reference(x, weight))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
