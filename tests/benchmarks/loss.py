"""Times the output projection and its loss on a GPU, forward and backward, by chunk size.

    PYTHONPATH=. python tests/benchmarks/loss.py
    PYTHONPATH=. python tests/benchmarks/loss.py --tokens 8192 --megabytes 64 512 --output runs/loss

Rivals: Liger-Kernel's fused linear cross-entropy and quack's, where they are installed. The floor is three matrix
products (logits, gradient of the input, gradient of the weight) at the rate of one large product measured beside them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megagap.ops.products import add_product
from megagap.parallel import cross_entropy
from megagap.parallel.embedding import vocab_shard
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter
from tests.benchmarks.kernels import hardware, installed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[64, 256, 512, 1024, 2048], help="megabytes of logits per chunk"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for loss.json")
    options = parser.parse_args(arguments)
    mesh = Mesh.single(torch.device("cuda"))
    shard = vocab_shard("lm_head.weight", options.vocabulary, options.hidden, mesh.tp)
    weight = ShardedParameter(shard, mesh.device, torch.bfloat16)
    torch.nn.init.normal_(weight, std=0.02)
    x = torch.randn(1, options.tokens, options.hidden, device=mesh.device).bfloat16().requires_grad_()
    weight.sink = _Sum(weight)
    targets = torch.randint(options.vocabulary, (1, options.tokens), device=mesh.device)
    scale = torch.full((), 1 / options.tokens, device=mesh.device)

    def ours(megabytes: int) -> Callable[[], object]:
        def run() -> object:
            cross_entropy.WORKSPACE_BYTES["cuda"] = megabytes << 20
            loss, *_ = cross_entropy.linear_cross_entropy(x, weight, targets, scale, mesh.tp)
            return torch.autograd.grad(loss, [x])

        return run

    arms = {f"megagap, parts of {size} MiB": ours(size) for size in options.megabytes}
    if liger := installed("liger_kernel.ops.fused_linear_cross_entropy"):

        def run_liger() -> object:
            flat, ids = x.flatten(0, 1), targets.flatten()
            loss = liger.LigerFusedLinearCrossEntropyFunction.apply(flat, weight, ids)[0]
            return torch.autograd.grad(loss, [x, weight])

        arms["Liger-Kernel"] = run_liger
    if quack := installed("quack.linear_cross_entropy"):

        def run_quack() -> object:
            flat, ids = x.flatten(0, 1), targets.flatten()
            loss = quack.chunked_linear_cross_entropy(flat, weight, ids, chunk_size=4096)
            return torch.autograd.grad(loss, [x, weight])

        arms["quack"] = run_quack

    def products() -> object:
        logits = x[0, :4096] @ weight.T
        return logits @ weight, logits.T @ x[0, :4096]

    seconds = {name: found for name, run in arms.items() if (found := median_seconds(name, run, options.rounds))}
    floor = median_seconds("products", products, options.rounds) * options.tokens / 4096
    table = Table("arm", "ms", "times the products alone", title="output projection and loss")
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.1f}", f"{value / floor:.2f}")
    table.add_row("its three products alone", f"{floor * 1e3:.1f}", "1")
    Console().print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        report = {"seconds": seconds, "products": floor, "hardware": hardware(mesh.device), "tokens": options.tokens}
        (options.output / "loss.json").write_text(json.dumps(report, indent=2) + "\n")


class _Sum:
    """A gradient sink as the optimizer's: fp32."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.total = torch.zeros(weight.shape, device=weight.device)

    def add_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        add_product(self.total, left, right)

    def finished(self) -> None:
        pass


def median_seconds(name: str, run: Callable[[], object], rounds: int) -> float:
    """0 if it cannot run."""
    try:
        run()
    except Exception as error:  # one rival's error must not hide the others' times
        print(f"note: {name} is left out: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return 0.0
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    main()
