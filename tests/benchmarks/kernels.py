"""Times each operation, forward and backward, against its rivals on this machine, and against copying memory.

    python tests/benchmarks/kernels.py
    python tests/benchmarks/kernels.py --ops rms_norm rotary --dtypes bfloat16 --rows 8192 --size 4096
    python tests/benchmarks/kernels.py --device cuda --output runs/kernels

Rivals: plain torch (eager), transformers' own operations, torch.compile of the plain form, and Liger-Kernel and apex
and quack where they are installed. All arms run in one process in turn, so that they share its noise; medians count.
Speed is given in the bytes that the operation must move at least (each input read once, each output written once,
forward and backward; a tensor that both need is read twice), and as a share of the speed of copying as many bytes.

On a GPU each arm is recorded as a CUDA graph and its replays are timed by events, so that launching costs nothing, and
the forward pass is also timed separately. Choose --rows so that tensors are several times as large as the L2 cache.
"""

import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megagap import ops
from megagap.ops import compiled
from megagap.ops.random_bits import Segment
from megagap.process.allocator import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5
HEAD = 64


@dataclass
class Case:
    """One operation at one size."""

    arms: dict[str, Callable[[], object]]
    """Each does a forward and a backward pass; the first is ours."""
    bytes: int
    """The minimum that must be moved."""
    forward_bytes: int = 0
    """Of these, by the forward pass."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=4096, help="tokens (4096)")
    parser.add_argument("--size", type=int, default=2048, help="hidden size; also of the vocabulary (2048)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds over all arms (11)")
    parser.add_argument("--without", nargs="+", default=[], help="arms to leave out")
    parser.add_argument("--output", type=Path, help="folder for kernels.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    same_allocator = device.type == "cpu" and keep_freed_memory()
    results = []
    for name in options.ops:
        for dtype in options.dtypes:
            torch.manual_seed(0)
            case = CASES[name](options.rows, options.size, DTYPES[dtype], device)
            arms = {arm: run for arm, run in case.arms.items() if arm not in options.without}
            forwards = {arm: run.forward for arm, run in arms.items() if isinstance(run, ForwardAndBackward)}
            seconds = alternate(arms, device, options.rounds)
            copying = copy_bandwidth(case.bytes, device, options.rounds)
            results.append(summary(name, dtype, case, seconds, copying))
            if device.type == "cuda" and forwards and case.forward_bytes:
                part = alternate(forwards, device, options.rounds)
                add_parts(results[-1], case, {arm: statistics.median(found) for arm, found in part.items()})
            Console().print(table(results[-1]))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        report = {
            "results": results,
            "hardware": hardware(device),
            "same_allocator": same_allocator,
            "rows": options.rows,
        }
        (options.output / "kernels.json").write_text(json.dumps(report | {"size": options.size}, indent=2) + "\n")
    print(f"{hardware(device)}", file=sys.stderr)


def alternate(arms: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm, one run of each in turn; the first two rounds, which compile and warm up, do not count.

    On a GPU a run is some replays of its graph; an arm that cannot be recorded is left out, with a note.
    """
    if device.type == "cuda":
        return _alternate_graphs(arms, rounds)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 2):
        for name, run in arms.items():
            _synchronise(device)
            start = time.perf_counter()
            run()
            _synchronise(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


REPLAYS = 10


def _alternate_graphs(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    graphs = {}
    for name, run in arms.items():
        try:
            graphs[name] = _recorded(run)
        except Exception as error:  # one rival's error must not hide the others' times
            print(f"note: {name} is left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            if turn:
                seconds[name].append(start.elapsed_time(end) / 1e3 / REPLAYS)
    return seconds


def _recorded(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``run`` as a graph; before, it runs where it may compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def copy_bandwidth(size: int, device: torch.device, rounds: int) -> float:
    """Bytes per second of copying one buffer to another, ``size`` bytes read and written together."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, device, rounds)["copy"]
    return 2 * source.numel() / statistics.median(seconds)


def summary(op: str, dtype: str, case: Case, seconds: dict[str, list[float]], copying: float) -> dict[str, Any]:
    medians = {arm: statistics.median(values) for arm, values in seconds.items()}
    ours = medians["megagap"]
    # Per round, so that noise that lasts for a while cancels.
    ratios = {
        arm: statistics.median(theirs / mine for theirs, mine in zip(values, seconds["megagap"], strict=True))
        for arm, values in seconds.items()
    }
    return {
        "op": op,
        "dtype": dtype,
        "megabytes": case.bytes / 1e6,
        "copy_gb_per_second": copying / 1e9,
        "share_of_copy": case.bytes / ours / copying,
        "milliseconds": {arm: value * 1e3 for arm, value in medians.items()},
        "gb_per_second": {arm: case.bytes / value / 1e9 for arm, value in medians.items()},
        "times_megagap": ratios,
    }


def add_parts(result: dict[str, Any], case: Case, forward: dict[str, float]) -> None:
    """GB/s of the forward pass, and of the backward pass, whose time is what remains of both."""
    both = {arm: ms / 1e3 for arm, ms in result["milliseconds"].items()}
    backward_bytes = case.bytes - case.forward_bytes
    result["forward_gb_per_second"] = {arm: case.forward_bytes / time / 1e9 for arm, time in forward.items()}
    result["backward_gb_per_second"] = {
        arm: backward_bytes / (both[arm] - time) / 1e9
        for arm, time in forward.items()
        if arm in both and both[arm] > time
    }


def table(result: dict[str, Any]) -> Table:
    title = (
        f"{result['op']} {result['dtype']}, {result['megabytes']:.0f} MB (copy {result['copy_gb_per_second']:.1f} GB/s)"
    )
    parts = [result.get(f"{part}_gb_per_second", {}) for part in ("forward", "backward")]
    drawn = Table("arm", "ms", "GB/s", "of copy", "time : megagap", "forward GB/s", "backward GB/s", title=title)
    for arm, ms in result["milliseconds"].items():
        speed = result["gb_per_second"][arm]
        share = f"{speed / result['copy_gb_per_second']:.0%}"
        by_part = [f"{part[arm]:.0f}" if arm in part else "" for part in parts]
        drawn.add_row(arm, f"{ms:.3f}", f"{speed:.1f}", share, f"{result['times_megagap'][arm]:.2f}", *by_part)
    return drawn


def hardware(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = torch.get_num_threads()
    return {
        "device": name,
        "threads": threads,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------ the cases


@dataclass
class ForwardAndBackward:
    """A run of ``function(*inputs)`` and the gradients of those inputs that require one."""

    function: Callable[..., Any]
    inputs: list[Tensor]
    grads: list[Tensor]

    def __call__(self) -> object:
        outputs = self.function(*self.inputs)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        return torch.autograd.grad(outputs, [x for x in self.inputs if x.requires_grad], self.grads)

    def forward(self) -> object:
        return self.function(*self.inputs)


def plain(module: str) -> Any:
    """The file of an operation, whose ``reference`` is the plain form."""
    return importlib.import_module(f"megagap.ops.{module}")


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def arms_of(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    others: dict[str, Callable[..., Any] | None],
    inputs: list[Tensor],
    grads: list[Tensor],
) -> dict[str, Callable[[], object]]:
    torch._dynamo.reset()
    functions = {
        "megagap": ours,
        "eager": reference,
        "torch.compile": torch.compile(reference, dynamic=False),
        **others,
    }
    return {arm: ForwardAndBackward(f, inputs, grads) for arm, f in functions.items() if f is not None}


def rms_norm_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, grad = (torch.randn(rows, size, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(size, device=device).to(dtype).requires_grad_()
    x.requires_grad_()

    def transformers(x: Tensor, weight: Tensor) -> Tensor:
        return LlamaRMSNorm.forward(_Weight(weight), x)  # type: ignore[arg-type]

    liger = installed("liger_kernel.ops.rms_norm") if device.type == "cuda" else None
    apex = installed("apex.normalization.fused_layer_norm") if device.type == "cuda" else None
    quack = installed("quack.rmsnorm") if device.type == "cuda" else None
    others = {
        "quack": quack and (lambda x, w: quack.rmsnorm(x, w, eps=EPS)),
        "transformers": transformers,
        "torch F.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
        "liger": liger and (lambda x, w: liger.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)),
        "apex": apex and (lambda x, w: apex.fused_rms_norm_affine(x, w, w.shape, EPS)),
    }
    arms = arms_of(ops.rms_norm, plain("rms_norm").reference, others, [x, weight], [grad])
    return Case(arms, 5 * rows * size * dtype.itemsize, 2 * rows * size * dtype.itemsize)  # x, y; grad, x, grad_x


@dataclass
class _Weight:
    """The attributes of itself that LlamaRMSNorm's forward uses."""

    weight: Tensor
    variance_epsilon: float = EPS


def add_rms_norm_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    x, residual, grad, grad_total = (torch.randn(rows, size, device=device).to(dtype) for _ in range(4))
    weight = torch.rand(size, device=device).to(dtype).requires_grad_()
    x.requires_grad_()
    residual.requires_grad_()

    def reference(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return plain("rms_norm").reference(total, weight), total

    arms = arms_of(ops.add_rms_norm, reference, {}, [x, residual, weight], [grad, grad_total])
    # x, residual, y, total; grad, grad_total, total, grad_x
    return Case(arms, 8 * rows * size * dtype.itemsize, 4 * rows * size * dtype.itemsize)


def rotary_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """q has three quarters of the heads, k the rest: their sizes together are ``size``."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads = size // HEAD
    batch = 4 if rows % 4 == 0 else 1
    shapes = [(batch, rows // batch, count, HEAD) for count in (heads - heads // 4, heads // 4)]
    q, k, grad_q, grad_k = (torch.randn(shape, device=device).to(dtype) for shape in (*shapes, *shapes))
    angles = torch.outer(torch.arange(rows // batch).float(), 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
    angles = torch.cat([angles, angles], -1).to(device)
    cos, sin = angles.cos(), angles.sin()
    q.requires_grad_()
    k.requires_grad_()

    def transformers(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.to(q.dtype).unsqueeze(0), sin.to(q.dtype).unsqueeze(0)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    arms = arms_of(
        ops.rotary, plain("rotary").reference, {"transformers": transformers}, [q, k, cos, sin], [grad_q, grad_k]
    )
    return Case(arms, 4 * rows * size * dtype.itemsize, 2 * rows * size * dtype.itemsize)


def swiglu_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    gate, up, grad = (torch.randn(rows, size, device=device).to(dtype) for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    liger = installed("liger_kernel.ops.swiglu") if device.type == "cuda" else None
    others = {"liger": liger and (lambda gate, up: liger.LigerSiLUMulFunction.apply(gate, up))}
    arms = arms_of(ops.swiglu, plain("swiglu").reference, others, [gate, up], [grad])
    # gate, up, y; grad, gate, up, and both gradients
    return Case(arms, 8 * rows * size * dtype.itemsize, 3 * rows * size * dtype.itemsize)


def cross_entropy_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Loss and gradient of given logits."""
    logits = torch.randn(rows, size, device=device).to(dtype).requires_grad_()
    targets = torch.randint(size, (rows,), device=device)
    scale = torch.full((), 1 / rows, device=device)

    # In place: the next round's logits are this one's gradients, which cost the same.
    def ours() -> object:
        statistics = ops.cross_entropy_(logits.detach(), targets, scale)
        return ops.losses_of(statistics, targets)[0].mean()

    def in_two_passes() -> object:
        """As between them tp ranks combine the statistics."""
        kept = logits.detach()
        statistics = ops.softmax_statistics(kept, targets)
        ops.softmax_gradient_(kept, targets, statistics, scale)
        return ops.losses_of(statistics, targets)[0].mean()

    def reference(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    liger = installed("liger_kernel.ops.cross_entropy") if device.type == "cuda" else None
    quack = installed("quack.cross_entropy") if device.type == "cuda" else None

    def liger_loss(logits: Tensor) -> Tensor:
        loss: Tensor = liger.LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "mean", None)[0]
        return loss

    others = {
        # In place, as megagap's: on a copy, whose time it counts.
        "liger": liger and liger_loss,
        "quack": quack and (lambda logits: quack.cross_entropy(logits, targets).mean()),
    }
    one = [torch.ones((), device=device)]
    arms = arms_of(reference, reference, others, [logits], one)
    arms |= {"megagap": ours, "megagap, two passes": in_two_passes}
    return Case(arms, 2 * rows * size * dtype.itemsize)  # read and written


def adamw_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Parameters in ``dtype``; a bf16 one without a master, rounded to the nearest or stochastically, and with the
    remainder of one. Rivals: fp32 only."""
    count = rows * size
    parameter = torch.randn(count, device=device).to(dtype)
    grad, first, second = (torch.rand(count, device=device) for _ in range(3))
    one, zero = (torch.full((), value, device=device) for value in (1.0, 0.0))
    numbers = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    segments = [Segment.of(1, "weight", (rows, size), (0, 0), (rows, size), first=0, begin=0, end=count)]
    remainder = torch.zeros(count, dtype=torch.int16, device=device)

    def update(**rounding: object) -> None:
        scalars = dict(divisor=one, reject=zero, updates=one)
        ops.adamw_(parameter, first, second, grad, **scalars, **numbers, **rounding)  # type: ignore[arg-type]

    arms: dict[str, Callable[[], object]] = {"megagap": update}
    if dtype == torch.float32:
        for name, form in (("torch fused", dict(fused=True)), ("torch foreach", dict(foreach=True))):
            form["capturable"] = device.type == "cuda"
            own = torch.nn.Parameter(parameter.clone())
            own.grad = grad.clone()
            arms[name] = torch.optim.AdamW([own], **numbers, **form).step  # type: ignore[arg-type]
    elif dtype == torch.bfloat16:
        arms["megagap stochastic"] = partial(update, stochastic=segments)
        arms["megagap remainder"] = partial(update, remainder=remainder)
    moved = 2 * dtype.itemsize + 4 + 2 * 2 * 4
    return Case(arms, count * moved)


def attention_case(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Sequences of 512; bytes are those of q, k, v, the result and the gradients, which no attention is bound by."""
    heads, length = max(2, size // HEAD // 2), 512
    shapes = [(max(1, rows // length), length, count, HEAD) for count in (heads, heads // 2, heads // 2)]
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    grad = torch.randn(shapes[0], device=device).to(dtype)
    functions = {"megagap": ops.attention, "torch SDPA": plain("attention").reference}
    arms = {arm: ForwardAndBackward(f, [q, k, v], [grad]) for arm, f in functions.items()}
    return Case(dict(arms), (4 * q.numel() + 2 * 2 * k.numel() * 2) * dtype.itemsize)


CASES: dict[str, Callable[[int, int, torch.dtype, torch.device], Case]] = {
    "rms_norm": rms_norm_case,
    "add_rms_norm": add_rms_norm_case,
    "rotary": rotary_case,
    "swiglu": swiglu_case,
    "cross_entropy": cross_entropy_case,
    "adamw": adamw_case,
    "attention": attention_case,
}


if __name__ == "__main__":
    if not compiled.AVAILABLE:
        sys.exit("the compiled kernels are not built: there is nothing to time")
    main()
