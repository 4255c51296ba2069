"""Times causal attention on a GPU with every back end that torch has there, forward and backward, in TFLOP/s.

    PYTHONPATH=. python tests/benchmarks/attention.py
    PYTHONPATH=. python tests/benchmarks/attention.py --dtypes float32 --documents 16 --output runs/attention

Grouped keys and values are passed as they are if a back end supports them, else repeated ("expanded"). ``--documents``
packs each sequence from that many documents and compares a mask with variable-length kernels. The operations of the
causal half are counted: 2 matrix products forward and 5 backward.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagap.ops import attention
from megagap.ops.document_mask import Documents, document_attention
from tests.benchmarks.kernels import DTYPES, ForwardAndBackward, alternate, hardware, installed

SHAPES = {"d64": (4, 4096, 32, 8, 64), "d128": (2, 4096, 32, 8, 128)}
"""Batch, sequence, heads, key heads, head size: Gaperon 1B's and 8B's."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--documents", type=int, default=0, help="documents per sequence; 0: no mask (0)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for attention.json")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    results = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            inputs, grad = random_inputs(SHAPES[shape], DTYPES[dtype], device)
            arms = document_arms(inputs, options.documents) if options.documents else whole_arms(inputs)
            results.append(measure(f"{shape} {dtype}", arms, inputs, grad, SHAPES[shape], options))
            torch.cuda.empty_cache()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"attention_documents_{options.documents}.json" if options.documents else "attention.json"
        report = {"results": results, "hardware": hardware(device)}
        (options.output / name).write_text(json.dumps(report, indent=2) + "\n")


def random_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    batch, length, heads, key_heads, size = shape
    q, k, v = (
        torch.randn(batch, length, count, size, device=device).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )
    return [q, k, v], torch.randn_like(q)


def whole_arms(inputs: list[Tensor]) -> dict[str, Callable[..., Any]]:
    arms: dict[str, Callable[..., Any]] = {"megagap": attention}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        arms[f"{name}, grouped"] = partial(sdpa, backend, None, True)
        arms[f"{name}, expanded"] = partial(sdpa, backend, None, False)
    if inputs[0].dtype == torch.float32 and inputs[0].shape[1] <= 4096:
        arms["math, grouped"] = partial(sdpa, SDPBackend.MATH, None, True)
    return arms | flash_libraries()


def flash_libraries() -> dict[str, Callable[..., Any]]:
    arms: dict[str, Callable[..., Any]] = {}
    if flash2 := installed("flash_attn"):
        arms["flash-attn 2"] = lambda q, k, v: flash2.flash_attn_func(q, k, v, causal=True)
    if flash3 := installed("flash_attn_interface"):
        arms["flash-attn 3"] = lambda q, k, v: flash3.flash_attn_func(q, k, v, causal=True)
    return arms


def document_arms(inputs: list[Tensor], documents: int) -> dict[str, Callable[..., Any]]:
    batch, length = inputs[0].shape[:2]
    places = torch.arange(length) % -(-length // documents)
    packed = Documents.of(places.expand(batch, length)).to(inputs[0].device)
    number = (packed.positions == 0).cumsum(1)
    earlier = torch.ones(length, length, dtype=torch.bool, device=inputs[0].device).tril_()
    mask = (number[:, None, :, None] == number[:, None, None, :]) & earlier
    arms: dict[str, Callable[..., Any]] = {
        "megagap": lambda q, k, v: document_attention(q, k, v, packed),
        "mask, efficient, expanded": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION, mask, False),
        "mask, cuDNN, expanded": partial(sdpa, SDPBackend.CUDNN_ATTENTION, mask, False),
    }
    if inputs[0].dtype != torch.float32:
        arms["flash, variable length, grouped"] = partial(variable_length, packed, True)
        arms["flash, variable length, expanded"] = partial(variable_length, packed, False)
    return arms


def sdpa(backend: SDPBackend, mask: Tensor | None, grouped: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def variable_length(documents: Documents, grouped: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own flash kernel, by its operator."""
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    borders, longest = documents.borders, documents.longest
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    y: Tensor = torch.ops.aten._flash_attention_forward(*flat, borders, borders, longest, longest, 0.0, True, False)[0]
    return y.view_as(q)


def measure(
    title: str,
    arms: dict[str, Callable[..., Any]],
    inputs: list[Tensor],
    grad: Tensor,
    shape: tuple[int, ...],
    options: argparse.Namespace,
) -> dict[str, Any]:
    runs = {}
    for name, function in arms.items():
        run = ForwardAndBackward(function, inputs, [grad])
        try:
            run()
        except (RuntimeError, TypeError) as error:
            print(f"note: {title}: {name} is not supported: {str(error).splitlines()[0][:160]}", file=sys.stderr)
            continue
        runs[name] = run
    device = inputs[0].device
    both = {arm: statistics.median(s) for arm, s in alternate(dict(runs), device, options.rounds).items()}
    forwards = {arm: run.forward for arm, run in runs.items()}
    forward = {arm: statistics.median(s) for arm, s in alternate(dict(forwards), device, options.rounds).items()}
    batch, length, heads, _, size = shape
    products = 2 * batch * heads * length * length * size / 2 / max(1, options.documents)  # of one product's half
    table = Table("back end", "forward ms", "both ms", "forward TFLOP/s", "backward TFLOP/s", title=title)
    result: dict[str, Any] = {"case": title, "forward_ms": {}, "both_ms": {}}
    for arm in both:
        ahead = forward.get(arm, float("nan"))
        rates = 2 * products / ahead / 1e12, 5 * products / max(both[arm] - ahead, 1e-9) / 1e12
        table.add_row(arm, f"{ahead * 1e3:.3f}", f"{both[arm] * 1e3:.3f}", f"{rates[0]:.0f}", f"{rates[1]:.0f}")
        result["forward_ms"][arm], result["both_ms"][arm] = ahead * 1e3, both[arm] * 1e3
    Console().print(table)
    return result


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU: on CPU, tests/benchmarks/kernels.py --ops attention")
    main()
