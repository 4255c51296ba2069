"""Tokens per second of each parallelism over one process, and of the same model by torch's own, on two cores.

    PYTHONPATH=. python tests/benchmarks/parallel.py
    PYTHONPATH=. python tests/benchmarks/parallel.py --rounds 2 --steps 3 --hidden 64 --layers 2 --length 64
    PYTHONPATH=. python tests/benchmarks/parallel.py --arms "one process" dp2 "torch DDP dp2" --json

One process has two threads, two processes have one each, on gloo. Every arm has the same model in fp32, microbatches,
AdamW, clipping and allocator settings; accumulates gradients, and communicates them, or not, as its library does
best. All arms are measured in turn, and each is compared with one process of the same round. The steps of megagap are
the trainer's, with reading and recording; those of torch have a batch at hand.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tomli_w
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagap.config.loading import override_faults
from megagap.process.allocator import keep_freed_memory
from tests.launching import free_port

ROOT = Path(__file__).parents[2]
BASE = "one process"


@dataclass(frozen=True)
class Shape:
    """Of the model and the batch."""

    hidden: int
    layers: int
    vocabulary: int
    length: int
    micro: int
    microbatches: int

    heads = 8

    @property
    def intermediate(self) -> int:
        return self.hidden * 11 // 4

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.micro * self.microbatches


MEGAGAP: dict[str, tuple[int, list[str]]] = {
    BASE: (1, []),
    "tp2": (2, ["parallel.tp=2"]),
    "tp2 without sequence parallelism": (2, ["parallel.tp=2", "parallel.sequence_parallel=false"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
    "cp2 ring": (2, ["parallel.cp=2", "parallel.context_mode=ring"]),
    "cp2 allgather": (2, ["parallel.cp=2", "parallel.context_mode=allgather"]),
    "zero 3": (2, ["optim.zero=3"]),
}
"""Processes and settings by arm. One with a setting or value that does not exist is left out."""


# The same model, by torch's own means


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(shape.hidden, shape.hidden, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [b, heads, s, d]; cos, sin: [s, d / 2]."""
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.self_attn, self.mlp = Attention(shape), FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Layers ``[first, last)``; with the embedding and the head at the ends of the model."""

    def __init__(self, shape: Shape, first: int = 0, last: int | None = None) -> None:
        super().__init__()
        last = shape.layers if last is None else last
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden) if first == 0 else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(first, last))
        is_end = last == shape.layers
        self.norm = nn.RMSNorm(shape.hidden) if is_end else None
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False) if is_end else None
        half = shape.hidden // shape.heads // 2
        angles = torch.outer(torch.arange(shape.length), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or hidden states to hidden states or logits."""
        x = x if self.embed_tokens is None else self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return x if self.norm is None or self.lm_head is None else self.lm_head(self.norm(x))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Step = Callable[[Tensor], None]
"""One update from tokens [m, b, s + 1]."""


def accumulated(model: nn.Module, of: Callable[[Tensor, Tensor], Tensor], last: Callable[[bool], Any]) -> Step:
    """Forward and backward of every microbatch; ``last`` is told before each whether it is the last, and may return a
    context to compute it in."""

    def step(tokens: Tensor) -> None:
        for number, part in enumerate(tokens):
            with last(number == len(tokens) - 1) or nullcontext():
                (of(model(part[:, :-1]), part[:, 1:]) / len(tokens)).backward()

    return step


def one_process(shape: Shape) -> tuple[list[nn.Parameter], Step]:
    model = Llama(shape)
    return list(model.parameters()), accumulated(model, loss_of, lambda is_last: None)


def ddp(shape: Shape) -> tuple[list[nn.Parameter], Step]:
    model = nn.parallel.DistributedDataParallel(Llama(shape), gradient_as_bucket_view=True)
    return list(model.parameters()), accumulated(model, loss_of, lambda last: None if last else model.no_sync())


def fsdp(shape: Shape) -> tuple[list[nn.Parameter], Step]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (2,)), Llama(shape)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    sharded = fully_shard(model, mesh=mesh)
    return list(model.parameters()), accumulated(model, loss_of, sharded.set_requires_gradient_sync)


def tensor_parallel(shape: Shape) -> tuple[list[nn.Parameter], Step]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh, model = init_device_mesh("cpu", (2,)), Llama(shape)
    column, row = ColwiseParallel, RowwiseParallel
    for layer in model.layers:
        attention = {f"self_attn.{name}_proj": column() for name in "qkv"} | {"self_attn.o_proj": row()}
        feed_forward = {"mlp.gate_proj": column(), "mlp.up_proj": column(), "mlp.down_proj": row()}
        parallelize_module(layer, mesh, attention | feed_forward)
    head = column(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"embed_tokens": row(input_layouts=Replicate()), "lm_head": head})
    return list(model.parameters()), accumulated(model, loss_of, lambda last: loss_parallel())


def pipeline(shape: Shape) -> tuple[list[nn.Parameter], Step]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, half = dist.get_rank(), shape.layers // 2
    model = Llama(shape, rank * half, half if rank == 0 else None)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, shape.microbatches, loss_fn=loss_of)

    def step(tokens: Tensor) -> None:
        flat = tokens.flatten(0, 1)
        if rank == 0:
            schedule.step(flat[:, :-1].contiguous())
        else:
            schedule.step(target=flat[:, 1:].contiguous(), losses=[])

    return list(model.parameters()), step


TORCH: dict[str, tuple[int, Callable[[Shape], tuple[list[nn.Parameter], Step]], int]] = {
    "torch one process": (1, one_process, 1),
    "torch DDP dp2": (2, ddp, 2),
    "torch FSDP2 dp2": (2, fsdp, 2),
    "torch DTensor tp2": (2, tensor_parallel, 1),
    "torch pipelining pp2": (2, pipeline, 1),
}
"""Processes, the model, and over how many processes the microbatches are spread, by arm."""

COMPARED = {
    "tp2": "torch DTensor tp2",
    "tp2 without sequence parallelism": "torch DTensor tp2",
    "pp2": "torch pipelining pp2",
    "dp2": "torch DDP dp2",
    "zero 3": "torch FSDP2 dp2",
    BASE: "torch one process",
}


def time_torch(arm: str, shape: Shape, warmup: int, steps: int, output: Path) -> None:
    """One process of an arm; writes the seconds of its steps. Ends the process: gloo may abort in its own end."""
    processes, build, spread = TORCH[arm]
    torch.set_num_threads(2 // processes)
    keep_freed_memory()
    rank = int(os.environ["RANK"])
    if processes > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    parameters, step = build(shape)
    # DTensor's parameters and those that no tensor parallelism splits are two kinds, which foreach cannot mix.
    kinds = [[p for p in parameters if type(p.data) is kind] for kind in {type(p.data) for p in parameters}]
    optimizer = torch.optim.AdamW(({"params": kind} for kind in kinds), lr=3e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(shape.vocabulary, (shape.microbatches // spread, shape.micro, shape.length + 1))
    seconds = []
    for number in range(warmup + steps):
        if processes > 1:
            dist.barrier()
        start = time.perf_counter()
        step(tokens)
        for kind in kinds:
            nn.utils.clip_grad_norm_(kind, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if processes > 1:
            dist.barrier()
        if number >= warmup:
            seconds.append(time.perf_counter() - start)
    if rank == 0:
        output.write_text(json.dumps(seconds))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def write_recipe(folder: Path, shape: Shape) -> Path:
    """The model and batch of all arms; the data do not exist, so that tokens are random."""
    recipe = {
        "model": {
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.length,
        },
        "data": {"sources": [{"path": str(folder / "random")}]},
        "train": {
            "steps": 1000,
            "global_batch_size": shape.micro * shape.microbatches,
            "micro_batch_size": shape.micro,
            "sequence_length": shape.length,
        },
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path


def seconds_of(arm: str, shape: Shape, warmup: int, steps: int) -> float:
    """The median step of one run of an arm."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if arm in MEGAGAP:
            processes, overrides = MEGAGAP[arm]
            recipe = str(write_recipe(folder, shape))
            command = [str(ROOT / "tools/benchmark_mfu.py"), recipe, "--output", name, "--warmup", str(warmup)]
            command += ["--steps", str(steps), *(f"--{override}" for override in overrides)]
            read = folder / "benchmark.json"
        else:
            processes, read = TORCH[arm][0], folder / "seconds.json"
            command = [__file__, "--worker", json.dumps([arm, vars(shape), warmup, steps, str(read)])]
        run([sys.executable, *command], processes)
        found = json.loads(read.read_text())
    return statistics.median(found["step_seconds"] if arm in MEGAGAP else found)


def run(command: list[str], processes: int) -> None:
    """``command`` once per rank. Fails with the output of the first that fails."""
    surroundings = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": str(2 // processes),
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            command,
            env=surroundings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=1800)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output}")


def possible_arms() -> list[str]:
    known = [arm for arm, (_, given) in MEGAGAP.items() if not any(map(override_faults, given))]
    return [*known, *TORCH]


def report(rates: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """Each arm's tokens per second, and the ratios to one process and to torch's own, round by round."""
    for arm, found in rates.items():
        row: dict[str, Any] = {"arm": arm, "tokens_per_second": statistics.median(found)}
        for name, other in (("of_one_process", BASE), ("of_torch", COMPARED.get(arm, ""))):
            if other in rates:
                ratios = [mine / theirs for mine, theirs in zip(found, rates[other], strict=True)]
                row[name] = {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each arm (5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts (3)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per run (10)")
    parser.add_argument("--arms", nargs="+", choices=[*MEGAGAP, *TORCH], help="only these (all that exist)")
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 16 (512)")
    parser.add_argument("--layers", type=int, default=8, help="even (8)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="even (8,192)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, a multiple of 4 (512)")
    parser.add_argument("--micro", type=int, default=2, help="sequences of a microbatch (2)")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step, even (4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        arm, sizes, warmup, steps, output = json.loads(options.worker)
        time_torch(arm, Shape(**sizes), warmup, steps, Path(output))
    shape = Shape(*(getattr(options, name) for name in Shape.__dataclass_fields__))
    rates: dict[str, list[float]] = {arm: [] for arm in options.arms or possible_arms()}
    for number in range(options.rounds):
        for arm, found in rates.items():
            found.append(shape.tokens / seconds_of(arm, shape, options.warmup, options.steps))
            print(f"round {number + 1}: {arm}: {found[-1]:,.0f} tokens per second", file=sys.stderr, flush=True)
    rows = list(report(rates))
    if options.json:
        print(json.dumps({"shape": vars(shape), "rounds": options.rounds, "arms": rows}))
        return
    for row in rows:
        line = f"{row['arm']:34} {row['tokens_per_second']:>9,.0f} tokens/s"
        for name, words in (("of_one_process", "of one process"), ("of_torch", "of torch's own")):
            if name in row:
                lowest, highest = row[name]["range"]
                line += f" | {row[name]['median']:.2f} {words} ({lowest:.2f} to {highest:.2f})"
        print(line)


if __name__ == "__main__":
    main()
