"""The bindings of the GPU kernels, with the shim's kernels on CPU tensors, against the CPU's kernels."""

import re
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from megagap.ops import compiled
from tests.ops.gpu_source.shim import SOURCES, Shim, compile_command

pytestmark = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")
OPERATIONS = re.findall(r'm\.impl\("(\w+)"', (SOURCES / "gpu/bindings.cpp").read_text())


@pytest.fixture(scope="session")
def gpu(shims: dict[int, Shim], tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """``torch.ops.megagap_shim``: the operations that csrc/gpu/bindings.cpp registers, declared like megagap's."""
    library, kernels = tmp_path_factory.mktemp("bindings") / "bindings.so", shims[32].library
    torch_flags = [
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *(f"-L{path}" for path in cpp_extension.library_paths()),
    ]
    build = compile_command(library, 32, SOURCES / "gpu/bindings.cpp")
    build += [str(kernels), f"-Wl,-rpath,{kernels.parent}", *torch_flags, "-std=c++20", "-O0", "-shared"]
    subprocess.run([*build, "-ltorch_cpu", "-lc10"], check=True)
    declarations = torch.library.Library("megagap_shim", "DEF")
    for name in OPERATIONS:
        schema = getattr(torch.ops.megagap, name).default._schema
        declarations.define(str(schema).removeprefix("megagap::"))
    torch.ops.load_library(str(library))
    yield torch.ops.megagap_shim


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape))).to(dtype)


def norm(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad, x and another like it, weight, rstd; grad is spread out as autograd may leave it"""
    x, other = random(2, 5, 24, dtype=dtype), random(5, 2, 24, dtype=dtype).transpose(0, 1)
    return random(24, dtype=dtype).expand(2, 5, 24), x, other, random(24, dtype=dtype), random(2, 5).abs()


def rotation(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = random(2, 4, 3, 8, dtype=dtype).transpose(1, 2)
    return q, random(2, 3, 2, 8, dtype=dtype), random(7, 8), random(7, 8, seed=1)


def packed_halves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return random(3, 2, 40, dtype=dtype).chunk(2, -1)


POSITIONS = torch.tensor([[0, 6, 1], [2, 2, 3]])
TARGETS = torch.tensor([3, -1, 19])
STATISTICS, SCALE = torch.stack([random(3), random(3).abs() + 40, random(3)]), torch.tensor(0.7)


def norm_cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    grad, x, other, weight, rstd = norm(dtype)
    yield "rms_norm", (other, weight, 1e-5, 1.5)
    yield "rms_norm_backward", (grad, x, weight, rstd, 1.5)
    yield "add_rms_norm", (x, other, weight, 1e-5, 1.0)
    yield "add_rms_norm_backward", (grad, other, x, weight, rstd, 1.0)
    yield "rms_norm_backward", (grad[:0], x[:0], weight, rstd[:0], 1.0)


def cases(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    yield from norm_cases(dtype)
    q, k, cos, sin = rotation(dtype)
    yield "rotary", (q, k, cos[:3], sin[:3], None, False, False)
    yield "rotary", (q, k, cos[:6].view(2, 3, 8), sin[:6].view(2, 3, 8), None, True, False)
    yield "rotary", (q, k, cos, sin, POSITIONS, False, True)
    yield "rotary_", (random(2, 3, 5, 8, dtype=dtype), cos, sin, POSITIONS, 4, False, False)
    yield "rotary_pack", (q, k, k[:, :, 1:], cos, sin, POSITIONS, False, True)
    yield "swiglu", packed_halves(dtype)
    yield "swiglu_backward", (random(3, 2, 20, dtype=dtype), *packed_halves(dtype))
    yield "cross_entropy_rows", (random(3, 24, dtype=dtype)[:, :20], TARGETS, 3)
    yield "cross_entropy_rows_gradient_", (random(3, 20, dtype=dtype), TARGETS, 3, STATISTICS, SCALE, 0.01)
    yield "cross_entropy_", (random(3, 20, dtype=dtype), TARGETS, SCALE, 0.01)


def updates() -> Iterator[tuple[str, tuple]]:
    scalars = (torch.tensor(2.0), torch.tensor(0.0), torch.tensor(3.0), 1e-2, 0.9, 0.95, 1e-8, 0.1)
    moments = random(33), random(33, seed=1).square()
    place = (2**40 + 3, 2, 7, 30, 11)
    for dtype, rounding in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, place)):
        yield "adamw_", (random(33, dtype=dtype), *moments, random(33), *scalars, rounding, None)
    remainder = torch.arange(-16, 17, dtype=torch.int16)
    yield "adamw_", (random(33, dtype=torch.bfloat16), *moments, random(33), *scalars, None, remainder)
    small = [moment.bfloat16() for moment in moments]
    yield "adamw_", (random(33), *small, random(33), *scalars, place, None)
    yield "adamw_", (random(33, dtype=torch.bfloat16), *small, random(33), *scalars, place, remainder)


def run(operation: Callable, arguments: tuple) -> tuple[Tensor, ...]:
    """Results, then the arguments as they are left."""
    given = [argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments]
    for at, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and not argument.is_contiguous():
            given[at] = argument  # only what is contiguous is written to
    results = operation(*given)
    results = () if results is None else results if isinstance(results, tuple) else (results,)
    return *results, *(argument for argument in given if isinstance(argument, Tensor))


ALL = [
    pytest.param(name, arguments, id=f"{name}-{dtype}-{number}")
    for dtype in (torch.float32, torch.bfloat16)
    for number, (name, arguments) in enumerate(cases(dtype))
] + [pytest.param(name, arguments, id=f"{name}-{number}") for number, (name, arguments) in enumerate(updates())]


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_tensors_reach_the_gpu_kernels_as_they_reach_the_cpus(gpu, name: str, arguments: tuple):
    ours, theirs = (run(getattr(library, name), arguments) for library in (gpu, torch.ops.megagap))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        # A remainder counts units in the last place.
        rtol, atol = {torch.float32: (1e-5, 1e-5), torch.int16: (0, 4)}.get(one.dtype, (2**-7, 2**-7))
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def test_every_operation_has_a_case():
    assert {parameters.values[0] for parameters in ALL} == set(OPERATIONS)


def faults() -> Iterator[tuple[str, tuple, type[Exception]]]:
    grad, x, other, weight, rstd = norm(torch.float32)
    yield "rms_norm", (x, weight[1:], 1e-5, 1.0), ValueError
    yield "rms_norm", (x, weight.bfloat16(), 1e-5, 1.0), TypeError
    yield "rms_norm", (x.double(), weight.double(), 1e-5, 1.0), NotImplementedError
    yield "rms_norm_backward", (grad, x, weight, rstd[1:], 1.0), ValueError
    yield "add_rms_norm", (x, other[1:], weight, 1e-5, 1.0), ValueError
    q, k, cos, sin = rotation(torch.float32)
    yield "rotary", (q, k[1:], cos[:3], sin[:3], None, False, False), ValueError
    yield "rotary", (q, k, cos, sin, None, False, False), ValueError
    yield "rotary", (q, k, cos.double(), sin.double(), POSITIONS, False, False), TypeError
    yield "rotary", (q, k, cos, sin, POSITIONS.int(), False, False), TypeError
    yield "rotary_", (k.clone(), cos, sin, POSITIONS, 3, False, False), ValueError
    yield "rotary_pack", (q, k, k[1:], cos, sin, POSITIONS, False, True), ValueError
    yield "rotary_pack", (q, k, k.bfloat16(), cos, sin, POSITIONS, False, True), TypeError
    yield "swiglu", (x, other.bfloat16()), TypeError
    yield "cross_entropy_rows", (random(3, 20), TARGETS[1:], 0), ValueError
    yield "cross_entropy_rows", (random(3, 20), TARGETS.int(), 0), TypeError
    yield "cross_entropy_rows_gradient_", (random(20, 3).t(), TARGETS, 0, STATISTICS, SCALE, 0.0), ValueError
    yield "cross_entropy_rows_gradient_", (random(3, 20), TARGETS, 0, STATISTICS[:2], SCALE, 0.0), ValueError
    yield "cross_entropy_", (random(20, 3).t(), TARGETS, SCALE, 0.0), ValueError
    yield "cross_entropy_", (random(3, 20), TARGETS, random(3), 0.0), ValueError
    name, update = next(updates())
    place = (1, 0, 1, 1, 0)
    yield name, (update[0][1:], *update[1:]), ValueError
    yield name, (*update[:-2], place, None), ValueError
    bf16 = (random(33, dtype=torch.bfloat16), *update[1:])
    yield name, (*bf16[:-2], place[:4], None), ValueError
    remainder = torch.zeros(33, dtype=torch.int16)
    yield name, (*update[:-1], remainder), TypeError
    yield name, (*bf16[:-1], remainder.int()), TypeError
    yield name, (*bf16[:-1], remainder[1:]), ValueError
    yield name, (*bf16[:-2], place, remainder), ValueError
    yield name, (update[0], update[1].bfloat16(), *update[2:]), TypeError
    yield name, (update[0], update[1].half(), update[2].half(), *update[3:]), TypeError
    yield name, (update[0], update[1].bfloat16(), update[2].bfloat16(), *update[3:]), NotImplementedError  # to nearest
    yield name, (update[0].half(), *update[1:]), NotImplementedError


@pytest.mark.parametrize(("name", "arguments", "error"), list(faults()))
def test_mismatched_inputs_are_refused_by_name(gpu, name: str, arguments: tuple, error: type[Exception]):
    with pytest.raises(error, match=name if error is not NotImplementedError else "megagap|adamw_"):
        getattr(gpu, name)(*arguments)
