"""Which implementation this machine uses for each operation, why, and how fast: ``python -m megagap.ops``.

examples:
  python -m megagap.ops
  python -m megagap.ops --rows 4096 --size 4096
  python -m megagap.ops --deterministic      # what a run with train.deterministic = true uses

``MEGAGAP_OPS=plain`` in the environment selects plain torch for all operations, to rule out a kernel as the cause of a
problem.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from megagap import ops
from megagap.errors import run_tool
from megagap.ops import compiled
from megagap.ops.arithmetic import deterministic_kernels
from megagap.ops.document_mask import Documents, document_attention, masked_attention
from megagap.ops.optional import gpu_library
from megagap.terminal.console import Console

ROUNDS = 5
HEAD, DOCUMENT = 64, 128

CHOICES = {"attention": "megagap.ops.attention", "document_attention": "megagap.ops.document_mask"}
"""Operations whose file says itself what it would choose."""


@dataclass(frozen=True)
class Example:
    """An operation on random inputs."""

    chosen: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: list[Tensor]
    library: str = ""
    """GPU library that is used where megagap has no kernel."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m megagap.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="tokens (2048)")
    parser.add_argument("--size", type=int, default=1024, help="hidden size, a multiple of 256 (1024)")
    parser.add_argument(
        "--deterministic", action="store_true", help="choose as in runs that must repeat bit for bit on a GPU"
    )
    options = parser.parse_args(arguments)
    if options.rows < 1 or options.size < 256 or options.size % 256:
        parser.error("--rows must be at least 1, --size a multiple of 256")
    with deterministic_kernels(options.deterministic):
        show(options.rows, options.size)


def show(rows: int, size: int) -> None:
    """Print the table of all operations on all devices of this machine."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    table = Table("operation", "device", "dtype", "chosen", "why", "ms", "plain torch ms", title="megagap.ops")
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for name, example in examples(rows, size, dtype, device).items():
                choice, why = explain(name, example)
                ours, plain = times(example)
                kind = str(dtype).removeprefix("torch.")
                table.add_row(name, device.type, kind, choice, why, f"{ours:.2f}", f"{plain:.2f}")
    console = Console()
    console.print(table)
    console.print("medians of forward and backward on random inputs; sequences of 512 tokens, documents of 128")
    for device in devices:
        kernels = "compiled" if device.type in compiled.DEVICES else "not compiled"
        capability = f", {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else ""
        console.print(f"kernels for {device.type}: {kernels}{capability}")


def explain(name: str, example: Example) -> tuple[str, str]:
    """What is used for an operation, and why."""
    tensors = [x for x in example.inputs if x.is_floating_point()][:2]
    device = tensors[0].device.type
    if name in CHOICES:
        choice: tuple[str, str] = import_module(CHOICES[name]).choose(*example.inputs[:3])
        return choice
    if compiled.supports(*tensors):
        return "megagap kernel", f"compiled for {device}"
    if example.library and gpu_library(example.library, *tensors):
        return example.library.partition(".")[0], "it is installed, and megagap has no kernel"
    return "plain torch", "kernels are not compiled" if not compiled.AVAILABLE else f"no kernel for {device}"


def times(example: Example) -> tuple[float, float]:
    """Milliseconds of the chosen and of the plain form, timed alternately."""
    seconds: dict[Callable[..., Any], list[float]] = {example.chosen: [], example.plain: []}
    for turn in range(ROUNDS + 1):
        for function, found in seconds.items():
            _synchronise(example.inputs[0])
            start = time.perf_counter()
            _forward_and_backward(function, example.inputs)
            _synchronise(example.inputs[0])
            if turn:
                found.append(time.perf_counter() - start)
    ours, plain = (1e3 * statistics.median(found) for found in seconds.values())
    return ours, plain


def examples(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Example]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def plain(name: str) -> Callable[..., Any]:
        reference: Callable[..., Any] = import_module(f"megagap.ops.{name}").reference
        return reference

    def plain_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return plain("rms_norm")(x + residual, weight), x + residual

    heads, length = size // HEAD, 512
    cos, sin = (torch.rand(rows, HEAD, device=device) for _ in range(2))
    queries, keys = (max(1, rows // length), length, heads, HEAD), (max(1, rows // length), length, heads // 4, HEAD)
    documents = Documents.of((torch.arange(length) % DOCUMENT).repeat(queries[0], 1)).to(device)
    apex = "apex.normalization.fused_layer_norm"
    return {
        "rms_norm": Example(ops.rms_norm, plain("rms_norm"), [random(rows, size), random(size)], apex),
        "add_rms_norm": Example(
            ops.add_rms_norm, plain_add, [random(rows, size), random(rows, size), random(size)], apex
        ),
        "rotary": Example(
            ops.rotary, plain("rotary"), [random(1, rows, heads, HEAD), random(1, rows, heads // 4, HEAD), cos, sin]
        ),
        "swiglu": Example(ops.swiglu, plain("swiglu"), [random(rows, size), random(rows, size)]),
        "attention": Example(ops.attention, plain("attention"), [random(*queries), random(*keys), random(*keys)]),
        "document_attention": Example(
            partial(document_attention, documents=documents),
            partial(masked_attention, positions=documents.positions),
            [random(*queries), random(*keys), random(*keys)],
        ),
    }


def _forward_and_backward(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], [torch.ones_like(y) for y in outputs])


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


if __name__ == "__main__":
    run_tool(main)
