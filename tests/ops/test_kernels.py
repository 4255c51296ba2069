"""Properties of every compiled operation."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagap import ops
from megagap.ops import compiled

pytestmark = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")

EPS = 1e-5


def plain(name: str):
    return importlib.import_module(f"megagap.ops.{name}")


def plain_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain("rms_norm").reference(x + residual, weight, EPS), x + residual


COS, SIN = (torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
DIFFERENTIABLE = {
    "rms_norm": (
        lambda x, w: ops.rms_norm(x, w, EPS),
        lambda x, w: plain("rms_norm").reference(x, w, EPS),
        [(12, 70), (70,)],
    ),
    "add_rms_norm": (lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), plain_add, [(12, 70), (12, 70), (70,)]),
    "rotary": (
        lambda q, k: ops.rotary(q, k, COS, SIN),
        lambda q, k: plain("rotary").reference(q, k, COS.to(q.dtype), SIN.to(q.dtype))
        if q.dtype == torch.float64
        else plain("rotary").reference(q, k, COS, SIN),
        [(2, 6, 5, 8), (2, 6, 2, 8)],
    ),
    "swiglu": (ops.swiglu, plain("swiglu").reference, [(12, 70), (12, 70)]),
}  # fmt: skip


def formula(name: str, *inputs: Tensor) -> list[Tensor]:
    """The operation written out, for float64."""
    if name == "swiglu":
        gate, up = inputs
        return [gate / (1 + torch.exp(-gate)) * up]
    if name == "rotary":
        results = []
        for x in inputs:
            first, second = x[..., :4], x[..., 4:]
            cos, sin = COS.double()[:, None], SIN.double()[:, None]
            turned = [first * cos[..., :4] - second * sin[..., :4], second * cos[..., 4:] + first * sin[..., 4:]]
            results.append(torch.cat(turned, -1))
        return results
    *parts, weight = inputs
    total = sum(parts)
    normalised = total / torch.sqrt((total * total).sum(-1, keepdim=True) / total.shape[-1] + EPS)
    return [normalised * weight, total][: len(parts)]


def evaluate(function, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def random_case(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in DIFFERENTIABLE[name][2]]
    grads = [torch.randn(y.shape, generator=generator).to(dtype) for y in formula(name, *(x.double() for x in inputs))]
    return inputs, grads


def exact(name: str, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return evaluate(lambda *x: formula(name, *x), [x.double() for x in inputs], [g.double() for g in grads])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_formulas_pass_gradcheck(name):
    inputs, _ = random_case(name, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: tuple(formula(name, *x)), [x[..., :8].requires_grad_() for x in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_errors_against_float64_are_at_most_those_of_plain_torch(name, dtype):
    ours, theirs, _ = DIFFERENTIABLE[name]
    squares = torch.zeros(2, 6, dtype=torch.float64)
    for seed in range(8):
        inputs, grads = random_case(name, dtype, seed)
        wanted = exact(name, inputs, grads)
        for row, function in enumerate((ours, theirs)):
            for column, (got, true) in enumerate(zip(evaluate(function, inputs, grads), wanted, strict=True)):
                squares[row, column] += (got.double() - true).square().sum()
    # If both round alike, the errors differ by the noise of fp32 sums.
    allowed = 1.2 if dtype == torch.float32 else 1.001
    assert (squares[0] <= allowed * squares[1]).all(), squares.sqrt()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_results_repeat_bit_for_bit_on_any_number_of_threads(name):
    before = torch.get_num_threads()
    inputs, grads = random_case(name, torch.bfloat16)
    try:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(DIFFERENTIABLE[name][0], inputs, grads))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    size=st.integers(1, 300),
    order=st.integers(0, 2),
    pad=st.integers(0, 3),
    data=st.data(),
)
def test_any_shape_and_stride_gives_what_plain_torch_gives(leading, size, order, pad, data):
    """Strided rows, dimensions in another order."""
    generator = torch.Generator().manual_seed(0)

    def laid_out() -> Tensor:
        x = torch.randn(*leading, size + pad, generator=generator)[..., :size]
        if leading and order:
            x = (
                x.transpose(0, len(leading) - 1)
                .clone(memory_format=torch.preserve_format)
                .transpose(0, len(leading) - 1)
            )
        return x

    name = data.draw(st.sampled_from(["rms_norm", "add_rms_norm", "swiglu"]))
    ours, theirs, shapes = DIFFERENTIABLE[name]
    inputs = [laid_out() for shape in shapes if len(shape) > 1]
    inputs += [torch.rand(size, generator=generator) for shape in shapes if len(shape) == 1]
    outputs = 2 if name == "add_rms_norm" else 1
    grads = [laid_out() for _ in range(outputs)]
    for got, wanted in zip(evaluate(ours, inputs, grads), evaluate(theirs, inputs, grads), strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def registered() -> dict[str, tuple]:
    """Arguments for each operation of the library."""
    x, residual, grad = (torch.randn(4, 9) for _ in range(3))
    weight, rstd = torch.rand(9), torch.rand(4)
    q, k, packed = torch.randn(2, 6, 3, 8), torch.randn(2, 6, 1, 8), torch.randn(2, 6, 4, 8)
    logits, targets = torch.randn(4, 9), torch.tensor([0, 8, -1, 3])
    flat = [torch.rand(10) for _ in range(4)]
    one, zero = torch.ones(()), torch.zeros(())
    return {
        "rms_norm": (x.requires_grad_(), weight.requires_grad_(), EPS, 1.0),
        "rms_norm_backward": (grad, x.detach(), weight.detach(), rstd, 1.0),
        "add_rms_norm": (x, residual.requires_grad_(), weight, EPS, 20.0),
        "add_rms_norm_backward": (grad, grad, x.detach(), weight.detach(), rstd, 20.0),
        "rotary": (q.requires_grad_(), k.requires_grad_(), COS, SIN, None, False, False),
        "rotary_": (packed, COS, SIN, torch.randint(0, 6, (2, 6)), 3, True, False),
        "rotary_pack": (q.detach(), k.detach(), packed, COS, SIN, None, False, True),
        "swiglu": (x, residual),
        "swiglu_backward": (grad, x.detach(), residual.detach()),
        "cross_entropy_rows": (logits, targets, 3),
        "cross_entropy_rows_gradient_": (logits, targets, 3, torch.rand(3, 4), torch.ones(()), 0.01),
        "cross_entropy_": (logits, targets, torch.ones(()), 0.01),
        "adamw_": (*flat, one, zero, one, 1e-3, 0.9, 0.95, 1e-8, 0.1, None),
    }


@pytest.mark.parametrize("name", registered())
def test_operation_is_registered_correctly(name):
    """torch's opcheck: schema, aliasing, fake tensors, autograd, tracing."""
    torch.library.opcheck(getattr(torch.ops.megagap, name).default, registered()[name])


def test_every_operation_of_the_library_is_checked():
    # The lists here are by name; the library's own list is the schemas in csrc/bindings.cpp.
    from pathlib import Path

    source = (Path(__file__).parents[2] / "csrc/bindings.cpp").read_text()
    declared = {part.partition("(")[0] for part in source.replace('m.def(\n      "', 'm.def("').split('m.def("')[1:]}
    assert declared == registered().keys()


def test_operations_compile_into_one_graph_with_their_gradients():
    def model(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
        y, total = ops.add_rms_norm(x, r, w)
        return ops.swiglu(y, total).sum()

    inputs = [torch.randn(4, 16), torch.randn(4, 16), torch.rand(16)]
    grads = [torch.ones(())]
    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(evaluate(compiled_model, inputs, grads), evaluate(model, inputs, grads), strict=True):
        torch.testing.assert_close(got, wanted)
