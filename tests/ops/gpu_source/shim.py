"""The launchers of ``csrc/gpu``, compiled for the CPU by its shim and called with torch tensors."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parents[3] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compile_command(output: Path, wave: int, source: Path) -> list[str]:
    compiler = os.environ.get("CXX", "c++").split()
    flags = ["-std=c++17", "-O1", "-fPIC", "-DMEGAGAP_SHIM", f"-DMEGAGAP_WAVE={wave}", "-U_FORTIFY_SOURCE"]
    return [*compiler, *flags, f"-I{SOURCES}", str(source), "-o", str(output)]


def build(folder: Path, waves: Sequence[int]) -> list["Shim"]:
    libraries = {wave: folder / f"shim_{wave}.so" for wave in waves}
    compilations = [
        subprocess.Popen([*compile_command(library, wave, SOURCES / "gpu/cpu_shim.cpp"), "-shared"])
        for wave, library in libraries.items()
    ]
    assert all([compilation.wait() == 0 for compilation in compilations])  # noqa: C419  (waits for all of them)
    return [Shim(library, wave) for wave, library in libraries.items()]


class Rotated(Structure):
    _fields_ = [
        ("input", c_void_p),
        ("output", c_void_p),
        ("heads", c_int64),
        *((f"{side}_{axis}", c_int64) for side in ("input", "output") for axis in ("batch", "token", "head")),
    ]

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Rotated":
        return cls(x.data_ptr(), y.data_ptr(), x.shape[2], *x.stride()[:3], *y.stride()[:3])


P, L, F, N, D = c_void_p, c_int64, c_float, c_int, c_double
SIGNATURES = {
    "rms_norm": [N, P, P, P, P, P, P, L, L, F, F, P],
    "rms_norm_backward": [N, P, P, P, P, P, P, P, P, L, L, L, F, P],
    "rotary": [N, POINTER(Rotated), POINTER(Rotated), P, P, P, L, L, L, L, N, N, P],
    "swiglu": [N, P, P, P, L, L, L, L, P],
    "swiglu_backward": [N, P, P, P, P, P, L, L, L, L, L, L, P],
    "cross_entropy_rows": [N, P, P, L, P, L, L, L, P],
    "cross_entropy_rows_gradient": [N, P, P, L, P, P, F, L, L, L, P],
    "cross_entropy": [N, P, P, P, F, P, L, L, L, P],
    "adamw": [N, N, N, P, P, P, P, P, P, P, L, D, D, D, D, D, P, P, P],
}


class Shim:
    """Functions shaped like ``torch.ops.megagap``'s, on rows [n, h]; results are filled with NaN beforehand."""

    def __init__(self, library: Path, wave: int) -> None:
        self.library, self.wave = library, wave
        self._library = ctypes.CDLL(str(library))
        for name, arguments in SIGNATURES.items():
            getattr(self._library, f"megagap_gpu_{name}").argtypes = arguments
        self._parts = self._library.megagap_gpu_rms_norm_parts
        self._parts.argtypes, self._parts.restype = [N, L, L], L

    def reverse_threads(self, reverse: bool) -> None:
        self._library.megagap_shim_reverse(int(reverse))

    def call(self, name: str, *arguments: object) -> None:
        given = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        error = getattr(self._library, f"megagap_gpu_{name}")(*given, None)
        assert error == 0, f"{name} returned {error}"

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, gain_scale: float = 1.0, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, rstd and, with a residual, the total."""
        y, rstd = filled(x.shape, x.dtype), filled(x.shape[:1], torch.float32)
        total = None if residual is None else filled(x.shape, x.dtype)
        self.call("rms_norm", DTYPES[x.dtype], x, residual, weight, y, total, rstd, *x.shape, eps, gain_scale)
        return y, rstd, total

    def rms_norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        rstd: Tensor,
        gain_scale: float = 1.0,
        grad_total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        code = DTYPES[x.dtype]
        parts = self._parts(code, *x.shape)
        partial = filled((parts, x.shape[1]), torch.float32)
        grad_x, grad_weight = filled(x.shape, x.dtype), filled(weight.shape, x.dtype)
        pointers = (grad, grad_total, x, weight, rstd, grad_x, grad_weight, partial)
        self.call("rms_norm_backward", code, *pointers, parts, *x.shape, gain_scale)
        return grad_x, grad_weight

    def rotary(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None = None,
        interleaved: bool = False,
        backward: bool = False,
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        to_q, to_k = (x if in_place else filled(x.shape, x.dtype) for x in (q, k))
        batch, length, _, size = q.shape
        rows = cos.numel() // size if size else 0
        views = byref(Rotated.of(q, to_q)), byref(Rotated.of(k, to_k))
        shape = (rows, batch, length, size)
        self.call("rotary", DTYPES[q.dtype], *views, cos, sin, positions, *shape, int(interleaved), int(backward))
        return to_q, to_k

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        y = filled(gate.shape, gate.dtype)
        self.call("swiglu", DTYPES[gate.dtype], gate, up, y, *gate.shape, gate.stride(0), up.stride(0))
        return y

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        grad_gate, grad_up = filled((gate.shape[0], 2 * gate.shape[1]), gate.dtype).chunk(2, 1)
        strides = (grad.stride(0), gate.stride(0), up.stride(0), grad_gate.stride(0))
        self.call("swiglu_backward", DTYPES[gate.dtype], grad, gate, up, grad_gate, grad_up, *gate.shape, *strides)
        return grad_gate, grad_up

    def cross_entropy_rows(self, logits: Tensor, targets: Tensor, first: int) -> Tensor:
        statistics, rows = filled((3, *targets.shape), torch.float32), (*logits.shape, logits.stride(0))
        self.call("cross_entropy_rows", DTYPES[logits.dtype], logits, targets, first, statistics, *rows)
        return statistics

    def cross_entropy_rows_gradient_(
        self, logits: Tensor, targets: Tensor, first: int, statistics: Tensor, scale: Tensor, z_loss: float
    ) -> None:
        given, rows = (logits, targets, first, statistics, scale, z_loss), (*logits.shape, logits.stride(0))
        self.call("cross_entropy_rows_gradient", DTYPES[logits.dtype], *given, *rows)

    def cross_entropy_(self, logits: Tensor, targets: Tensor, scale: Tensor, z_loss: float) -> Tensor:
        statistics, rows = filled((3, *targets.shape), torch.float32), (*logits.shape, logits.stride(0))
        self.call("cross_entropy", DTYPES[logits.dtype], logits, targets, scale, z_loss, statistics, *rows)
        return statistics

    def adamw_(
        self,
        parameter: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        *,
        step: int,
        grad_scale: float = 1.0,
        found_inf: float = 0.0,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        rounding: tuple[int, int, int, int, int] | None = None,
        remainder: Tensor | None = None,
    ) -> None:
        scalars = [torch.tensor(float(value)) for value in (grad_scale, found_inf, step)]
        types = [DTYPES[tensor.dtype] for tensor in (parameter, exp_avg, grad)]
        pointers = (parameter, exp_avg, exp_avg_sq, grad, *scalars)
        place = None if rounding is None else torch.tensor(rounding)
        settings = (lr, *betas, eps, weight_decay, place)
        self.call("adamw", *types, *pointers, parameter.numel(), *settings, remainder)


def filled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), torch.nan, dtype=dtype)
