"""Times an optimizer step against torch.optim.AdamW(fused=True), FSDP2 and copying memory, in turn.

    python tests/benchmarks/optimizer.py
    python tests/benchmarks/optimizer.py --elements 400000000 --device cuda
    python tests/benchmarks/optimizer.py --fsdp2                       # two processes

Each precision with the torch that does the same: in bf16-mixed, masters in fp32 that are then copied to bf16. "copy" is
a copy of as many bytes as the update must read and write: what the memory allows. "clip": with the norm of all
gradients and the division by it. Bytes per parameter are those of parameters, gradients and state.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagap.config import Optim
from megagap.optim.clipping import clip_divisor
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.collectives import all_reduce
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Block, ShardedParameter, whole

NUMBERS = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SHAPES = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192), (2048,)]
"""Of a layer of Gaperon 1B."""


@dataclass
class Arm:
    update: Callable[[], object]
    clip: Callable[[], object]
    """With clipping."""
    tensors: Sequence[Tensor]


@dataclass(frozen=True)
class Form:
    """A precision, and the torch that does the same."""

    dtype: torch.dtype
    gradients: torch.dtype
    optim: Optim
    moved: int
    """Bytes per element that an update reads and writes."""
    rival: "Callable[[Sequence[Tensor], Form], Arm]"


def megagap(shapes: Sequence[tuple[int, ...]], form: Form, mesh: Mesh, zero: int = 1) -> Arm:
    made = [ShardedParameter(whole(f"{i}.weight", shape), mesh.device, torch.float32) for i, shape in enumerate(shapes)]
    for parameter in made:
        nn.init.normal_(parameter)
    optim = form.optim.model_copy(update=dict(zero=zero))
    blocks = [[Block(nn.Identity(), [parameter], [parameter]) for parameter in made]]
    optimizer = DistributedOptimizer(made, optim, mesh, form.dtype, blocks=blocks, gradient_dtype=form.gradients)
    store, accept, one = optimizer.store, torch.tensor(True, device=mesh.device), torch.ones((), device=mesh.device)
    store.begin(1)
    for bucket in store.buckets:
        bucket.own_gradient.normal_()
    store._complete = True

    def clip() -> None:
        norm = all_reduce(store.squared_norm(), mesh.world).sqrt()
        optimizer.step(1e-4, clip_divisor(norm, 1.0), accept)

    kept = [bucket.remainder for bucket in store.buckets if bucket.remainder is not None]
    kept += [bucket.own_values for bucket in store.buckets] + [bucket.own_gradient for bucket in store.buckets]
    kept += [tensor for state in optimizer.states for tensor in state.values()]
    return Arm(lambda: optimizer.step(1e-4, one, accept), clip, kept)


def torch_alike(parameters: Sequence[Tensor], form: Form) -> Arm:
    """Parameters, gradients and moments all in one dtype."""
    return torch_arm([nn.Parameter(p.to(form.dtype)) for p in parameters], [])


def torch_with_masters(parameters: Sequence[Tensor], form: Form) -> Arm:
    """Masters in fp32, and copies in bf16 that the model computes with."""
    return torch_arm([nn.Parameter(p.clone()) for p in parameters], [p.bfloat16() for p in parameters])


def torch_arm(masters: list[nn.Parameter], copies: list[Tensor]) -> Arm:
    optimizer = torch.optim.AdamW(masters, fused=True, **NUMBERS)  # type: ignore[arg-type]
    for master in masters:
        master.grad = torch.randn_like(master)

    def update() -> None:
        optimizer.step()
        if copies:
            torch._foreach_copy_(copies, [master.detach() for master in masters])

    def clip() -> None:
        nn.utils.clip_grad_norm_(masters, 1.0)
        update()

    update()
    state = [value for kinds in optimizer.state.values() for value in kinds.values() if value.dim()]
    return Arm(update, clip, [*masters, *(m.grad for m in masters if m.grad is not None), *copies, *state])


FULL, HALF = torch.float32, torch.bfloat16
PURE = dict(moments_dtype="bf16", clip_grad=1.0, betas=(0.9, 0.95))
FORMS = {
    "fp32": Form(FULL, FULL, Optim(), 28, torch_alike),
    "bf16-mixed": Form(HALF, FULL, Optim(), 28, torch_with_masters),
    "bf16-pure, nearest": Form(HALF, HALF, Optim(rounding="nearest", **PURE), 14, torch_alike),
    "bf16-pure, stochastic": Form(HALF, HALF, Optim(rounding="stochastic", **PURE), 14, torch_alike),
    "bf16-pure, kahan": Form(HALF, HALF, Optim(rounding="kahan", **PURE), 18, torch_alike),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--elements", type=int, default=60_000_000, help="parameters, whole layers of them (60 million)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each (9)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--fsdp2", action="store_true", help="two processes, against fully_shard")
    options = parser.parse_args()
    if options.fsdp2 and "RANK" not in os.environ:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *sys.argv]
        raise SystemExit(
            subprocess.run([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        )
    device = torch.device(options.device)
    per_layer = sum(torch.Size(shape).numel() for shape in SHAPES)
    shapes = SHAPES * max(1, options.elements // per_layer)
    (compare_sharded if options.fsdp2 else compare)(shapes, options.rounds, device)


def compare(shapes: Sequence[tuple[int, ...]], rounds: int, device: torch.device) -> None:
    count = sum(torch.Size(shape).numel() for shape in shapes)
    print(f"{count:,} parameters; medians of {rounds} rounds (range), times relative to megagap's update")
    baselines: dict[str, float] = {}
    for name, form in FORMS.items():
        initial = [torch.randn(shape, device=device) for shape in shapes]
        ours, theirs = megagap(shapes, form, Mesh.single(device)), form.rival(initial, form)
        del initial
        source = torch.zeros(form.moved * count // 2, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        arms = {
            "megagap": ours.update,
            "torch": theirs.update,
            "copy": lambda target=target, source=source: target.copy_(source),
            "megagap, clip": ours.clip,
            "torch, clip": theirs.clip,
        }
        times = in_turn(arms, rounds)
        baselines[name] = statistics.median(times["megagap"])
        print(f"{name}: {bytes_of(ours) / count:.0f} bytes per parameter, torch {bytes_of(theirs) / count:.0f}")
        for arm in list(arms)[1:]:
            print(f"  {arm:<15} {ratio(times[arm], times['megagap'])}")
    stochastic, nearest = (baselines[f"bf16-pure, {rounding}"] for rounding in ("stochastic", "nearest"))
    print(f"stochastic : nearest {stochastic / nearest:.2f} (not in turn)")


def compare_sharded(shapes: Sequence[tuple[int, ...]], rounds: int, device: torch.device) -> None:
    """fp32, everything sharded over two processes (zero 3)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    ours = megagap(shapes, FORMS["fp32"], Mesh.create(device=device, world_size=world, rank=rank), zero=3)
    module = nn.ParameterList(nn.Parameter(torch.randn(shape, device=device)) for shape in shapes)
    fully_shard(module, mesh=init_device_mesh(device.type, (world,)))
    theirs = torch_arm(list(module.parameters()), [])
    count = sum(torch.Size(shape).numel() for shape in shapes)
    arms = {
        "megagap": ours.update,
        "FSDP2": theirs.update,
        "megagap, clip": ours.clip,
        "FSDP2, clip": theirs.clip,
    }
    times = in_turn(arms, rounds, between=dist.barrier)
    if rank == 0:
        local = sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in theirs.tensors)
        print(f"{count:,} parameters over {world} processes, fp32; times relative to megagap's update")
        print(f"bytes per parameter and rank: megagap {bytes_of(ours) / count:.1f}, FSDP2 {local / count:.1f}")
        for arm in list(arms)[1:]:
            print(f"  {arm:<15} {ratio(times[arm], times['megagap'])}")
    dist.destroy_process_group()


def in_turn(
    arms: dict[str, Callable[[], object]], rounds: int, between: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            between()
            start = time.perf_counter()
            arm()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first round makes what is kept
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], base: list[float]) -> str:
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def bytes_of(arm: Arm) -> int:
    return sum(tensor.nbytes for tensor in arm.tensors)


if __name__ == "__main__":
    main()
