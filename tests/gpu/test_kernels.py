"""The kernels on a real GPU against plain torch in float64 on the same GPU, in sizes of real models and odd ones.

That each formula is right in every corner is shown without a GPU in tests/ops/gpu_source.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.ops.remainder import join, split_

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
SHAPES = [(4096, 2048), (1000, 4096), (3, 8192), (77, 16384), (5, 33), (4099, 129), (2, 40008), (0, 64)]
"""(0, 64) has no rows; 40,008 elements do not fit in registers; 33 and 129 are not a multiple of 16-byte accesses."""


def label(value: object) -> str | None:
    """Test names with sizes, by which tests/gpu/run_all.sh selects small ones."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed + len(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def norm(x: Tensor, weight: Tensor, wide: torch.dtype = torch.float32) -> Tensor:
    values = x.to(wide)
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def error(got: Tensor, exact: Tensor) -> float:
    """Root mean square error, relative to the exact result's root mean square."""
    return float((got.double() - exact).norm() / exact.norm())


def assert_no_worse(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Than plain torch in the same dtype (a hundredth aside: single roundings are luck), or than one rounding."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    if not exact.any():
        assert not got.any()
    else:
        assert error(got, exact) <= max(1.01 * error(plain, exact), torch.finfo(got.dtype).eps / 4, 1e-6)


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The result, then the gradients."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    result = function(*inputs)
    return result.detach(), *torch.autograd.grad(result, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_rms_norm_and_its_gradients(device: torch.device, shape: tuple[int, int], dtype: torch.dtype):
    x, grad = (random(device, *shape, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(device, shape[1], dtype=dtype)
    y, rstd = torch.ops.megagap.rms_norm(x, weight, EPS, 1.0)
    got = y, *torch.ops.megagap.rms_norm_backward(grad, x, weight, rstd, 1.0)
    plain = gradients(norm, (x, weight), grad)
    exact = gradients(lambda *given: norm(*given, torch.float64), (x.double(), weight.double()), grad.double())
    for ours, theirs, wanted in zip(got, plain, exact, strict=True):
        assert_no_worse(ours, theirs, wanted)
    if dtype != torch.float32 and y.numel():
        assert (y != plain[0]).float().mean() < 0.01  # the roundings of transformers' LlamaRMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_residual_addition_fused_with_the_norm(device: torch.device, shape: tuple[int, int], dtype: torch.dtype):
    x, residual, grad, grad_total = (random(device, *shape, dtype=dtype, seed=seed) for seed in range(4))
    weight = random(device, shape[1], dtype=dtype)
    y, total, rstd = torch.ops.megagap.add_rms_norm(x, residual, weight, EPS, 1.0)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, torch.ops.megagap.rms_norm(total, weight, EPS, 1.0)[0])
    grad_x, grad_weight = torch.ops.megagap.add_rms_norm_backward(grad, grad_total, total, weight, rstd, 1.0)
    alone = torch.ops.megagap.rms_norm_backward(grad, total, weight, rstd, 1.0)
    assert torch.equal(grad_weight, alone[1])
    exact = gradients(lambda *given: norm(*given, torch.float64), (total.double(), weight.double()), grad.double())
    assert_no_worse(grad_x, (alone[0] + grad_total), exact[1] + grad_total.double())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1024, 32, 8, 128), (1, 333, 6, 2, 64), (3, 7, 5, 5, 6)], ids=label)
def test_rotary(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool):
    batch, length, q_heads, k_heads, size = shape
    packed = random(device, batch, length, q_heads + 2 * k_heads, size, dtype=dtype)
    q, k = packed[:, :, :q_heads], packed[:, :, q_heads : q_heads + k_heads]
    angles = random(device, length, size)
    positions = torch.arange(length, device=device).flip(0).expand(batch, length)
    got = torch.ops.megagap.rotary(q, k, angles.cos(), angles.sin(), positions, interleaved, False)
    cos, sin = (table[positions].double().unsqueeze(2) for table in (angles.cos(), angles.sin()))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for ours, x in zip(got, (q.double(), k.double()), strict=True):
        first, second = x.chunk(2, -1)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        wanted = x * cos + (turned if interleaved else torch.cat((-second, first), -1)) * sin
        assert (ours.double() - wanted).abs().max() <= (rounding + 1e-6) * wanted.abs().max()
    untouched = packed[:, :, q_heads + k_heads :].clone()
    arguments = (angles.cos(), angles.sin(), positions, interleaved, False)
    assert torch.equal(torch.ops.megagap.rotary_pack(q, k, untouched, *arguments), torch.cat((*got, untouched), 2))
    torch.ops.megagap.rotary_(packed, angles.cos(), angles.sin(), positions, q_heads + k_heads, interleaved, False)
    assert torch.equal(packed, torch.cat((*got, untouched), 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_backward_undoes_the_rotation(device: torch.device, dtype: torch.dtype):
    q, k = random(device, 2, 64, 8, 128, dtype=dtype), random(device, 2, 64, 2, 128, dtype=dtype)
    half = random(device, 64, 64)
    cos, sin = (torch.cat((table, table), -1) for table in (half.cos(), half.sin()))
    there = torch.ops.megagap.rotary(q, k, cos, sin, None, False, False)
    back = torch.ops.megagap.rotary(*there, cos, sin, None, False, True)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(back, (q, k), rtol=rounding, atol=4 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 14336), (7, 13), (100, 1003), (0, 8)], ids=label)
def test_swiglu_and_its_gradients(device: torch.device, shape: tuple[int, int], dtype: torch.dtype):
    grad, packed = random(device, *shape, dtype=dtype), random(device, shape[0], 2 * shape[1], dtype=dtype, seed=1)
    gate, up = packed.chunk(2, -1)
    got = torch.ops.megagap.swiglu(gate, up), *torch.ops.megagap.swiglu_backward(grad, gate, up).chunk(2, -1)
    plain = gradients(lambda gate, up: F.silu(gate) * up, (gate, up), grad)
    exact = gradients(lambda gate, up: F.silu(gate) * up, (gate.double(), up.double()), grad.double())
    for ours, theirs, wanted in zip(got, plain, exact, strict=True):
        assert_no_worse(ours, theirs, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 128256, 128256), (33, 1003, 1003), (5, 40, 64), (0, 9, 9)], ids=label)
def test_cross_entropy_rows_and_gradient(device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype):
    rows, size, stride = shape
    logits = 4 * random(device, rows, stride, dtype=dtype)[:, :size]
    targets = torch.randint(-1, size, (rows,), device=device)
    statistics = torch.ops.megagap.cross_entropy_rows(logits, targets, 0)
    maximum, total, at_target = statistics
    exact = logits.double()
    lse = exact.logsumexp(-1)
    torch.testing.assert_close((maximum + total.log()).double(), lse, rtol=1e-6, atol=1e-5)
    here = targets >= 0
    assert torch.equal(at_target, torch.where(here, logits.float().gather(1, targets.clamp(min=0)[:, None])[:, 0], 0))
    scale, z_loss = torch.tensor(0.7, device=device), 0.01
    wanted = (exact - lse[:, None]).exp() * (1 + 2 * z_loss * lse[:, None])
    wanted[here, targets[here]] -= 1
    wanted *= here[:, None] * scale.double()
    in_one_pass = torch.empty_strided(logits.shape, logits.stride(), dtype=dtype, device=device).copy_(logits)
    found = torch.ops.megagap.cross_entropy_(in_one_pass, targets, scale, z_loss)
    torch.testing.assert_close(found, statistics, rtol=1e-6, atol=0)
    torch.ops.megagap.cross_entropy_rows_gradient_(logits, targets, 0, statistics, scale, z_loss)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for gradient in (logits, in_one_pass):
        torch.testing.assert_close(gradient.double(), wanted, rtol=rounding + 1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1 << 22, 100_003, 1, 0])
def test_adamw_follows_torchs_fused_adamw(device: torch.device, size: int):
    parameter = random(device, size)
    average, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
    theirs = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, fused=True)
    scale, nothing = torch.tensor(4.0, device=device), torch.tensor(0.0, device=device)
    for step in range(1, 6):
        grad = random(device, size, seed=step)
        number = torch.tensor(float(step), device=device)
        torch.ops.megagap.adamw_(
            parameter, average, square, 4 * grad, scale, nothing, number, 1e-2, 0.9, 0.999, 1e-8, 0.1, None
        )
        theirs.grad = grad
        optimizer.step()
    torch.testing.assert_close(parameter, theirs.detach(), rtol=2e-6, atol=2e-6)
    before = parameter.clone()
    infinite = torch.tensor(1.0, device=device)
    torch.ops.megagap.adamw_(
        parameter, average, square, before, scale, infinite, scale, 1e-2, 0.9, 0.999, 1e-8, 0.1, None
    )
    assert torch.equal(parameter, before)


def test_stochastic_rounding_has_the_bits_of_the_cpus(device: torch.device):
    parameter = random(device, 10_001, dtype=torch.bfloat16)
    state = [parameter, torch.zeros_like(parameter).float(), torch.zeros_like(parameter).float(), parameter.float()]
    scalars = [torch.tensor(value, device=device) for value in (1.0, 0.0, 3.0)]
    settings = (1e-2, 0.0, 0.0, 1e-8, 0.0, (2**40 + 5, 3, 700, 1000, 11))
    on_cpu = [tensor.cpu() for tensor in (*state, *scalars)]
    torch.ops.megagap.adamw_(*state, *scalars, *settings)
    torch.ops.megagap.adamw_(*on_cpu, *settings)
    # The updates differ in their last bits, which sometimes decide the rounding.
    assert (parameter.cpu() != on_cpu[0]).float().mean() < 1e-2


def test_moments_in_bf16_have_the_bits_of_the_cpus(device: torch.device):
    """With decay rates of 0 they are the gradient and its square, the same on both before they are rounded."""
    parameter = random(device, 10_001)
    state = [parameter, *(torch.zeros_like(parameter).bfloat16() for _ in range(2)), random(device, 10_001, seed=1)]
    scalars = [torch.tensor(value, device=device) for value in (1.0, 0.0, 3.0)]
    settings = (1e-2, 0.0, 0.0, 1e-8, 0.0, (2**40 + 5, 3, 700, 1000, 11))
    on_cpu = [tensor.cpu() for tensor in (*state, *scalars)]
    torch.ops.megagap.adamw_(*state, *scalars, *settings)
    torch.ops.megagap.adamw_(*on_cpu, *settings)
    for mine, other in zip(state[1:3], on_cpu[1:3], strict=True):
        assert torch.equal(mine.cpu(), other)


@pytest.mark.parametrize("size", [1 << 22, 100_003, 1, 0])
def test_a_parameter_with_a_remainder_is_updated_as_its_master_bit_for_bit(device: torch.device, size: int):
    master, grad = random(device, size), random(device, size, seed=1)
    values, remainder = master.bfloat16(), torch.zeros(size, dtype=torch.int16, device=device)
    split_(master, values, remainder)
    one, zero = torch.tensor(1.0, device=device), torch.tensor(0.0, device=device)
    settings = (one, zero, one, 1e-2, 0.9, 0.999, 1e-8, 0.1, None)
    moments, others = ([torch.zeros_like(grad) for _ in range(2)] for _ in range(2))
    for _ in range(3):
        torch.ops.megagap.adamw_(master, *moments, grad, *settings)
        torch.ops.megagap.adamw_(values, *others, grad, *settings, remainder)
    assert torch.equal(join(values, remainder), master)
    assert all(torch.equal(mine, other) for mine, other in zip(moments, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_are_bit_identical(device: torch.device, dtype: torch.dtype):
    x, grad = (random(device, 4099, 4096, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, targets = random(device, 4096, dtype=dtype), torch.randint(0, 4096, (4099,), device=device)

    def results() -> list[Tensor]:
        y, rstd = torch.ops.megagap.rms_norm(x, weight, EPS, 1.0)
        backward = torch.ops.megagap.rms_norm_backward(grad, x, weight, rstd, 1.0)
        gradient = x.clone()
        statistics = torch.ops.megagap.cross_entropy_(gradient, targets, torch.ones((), device=device), 0.0)
        return [y, rstd, *backward, torch.ops.megagap.cross_entropy_rows(x, targets, 0), statistics, gradient]

    first = results()
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


def test_more_than_two_to_the_31_elements(device: torch.device):
    if torch.cuda.mem_get_info(device)[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    rows, size = (1 << 31) // 4096 + 5, 4096
    x = torch.ones(rows, size, dtype=torch.bfloat16, device=device)
    x[-1] = 2
    y, rstd = torch.ops.megagap.rms_norm(x, x[0], EPS, 1.0)
    assert torch.equal(y[-1], x[0]) and rstd[-1].item() == pytest.approx((4 + EPS) ** -0.5)
    assert torch.equal(torch.ops.megagap.swiglu(x, x)[-1], F.silu(x[-1]) * x[-1])


def test_kernels_run_on_the_current_stream_and_in_cuda_graphs(device: torch.device):
    x, weight = random(device, 64, 1024), random(device, 1024)
    expected, rstd = torch.ops.megagap.rms_norm(x, weight, EPS, 1.0)
    # Kernels are loaded at first use, which no graph records.
    torch.ops.megagap.rms_norm_backward(x, x, weight, rstd, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records what runs on its stream, and nothing else
        y, rstd = torch.ops.megagap.rms_norm(x, weight, EPS, 1.0)
        grad_x, _ = torch.ops.megagap.rms_norm_backward(x, x, weight, rstd, 1.0)
    y.zero_(), grad_x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected) and grad_x.abs().sum() > 0


def test_inputs_on_the_second_gpu_are_computed_there(device: torch.device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda", 1)
    x, weight = random(other, 5, 64), torch.ones(64, device=other)
    torch.testing.assert_close(torch.ops.megagap.rms_norm(x, weight, EPS, 1.0)[0], norm(x, weight))
    with pytest.raises(ValueError, match="tensors on"):
        torch.ops.megagap.rms_norm(x, weight.to("cuda:0"), EPS, 1.0)
