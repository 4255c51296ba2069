"""Checkpoints beside torch's: how long training stands still for one, and how fast they are written and read.

    PYTHONPATH=. python tests/benchmarks/checkpoint.py [--gigabytes N] [--ranks 1 2] [--folder DIR] [--cold] [--json]

The state is that of AdamW in fp32: weights and two moments, in matrices of 4,096 columns. On two ranks, which are on
gloo, each owns half of every matrix's rows; reshaped, it reads half of the columns. All arms are measured in turn,
round after round, in one run, first the saves, then the loads, and medians are told; what was read is compared with
what was written. No more than three copies of the state are in memory at a time.

Every save is durable: megagap and torch.distributed.checkpoint (DCP, whose writer has ``sync_files``) sync each file
and the list of what is in them by themselves, torch.save's file is synced here. Before each save, what else is to be
written has been (``os.sync``), and what the round before wrote is gone. Only megagap's have checksums, which each load
verifies. DCP's copies for saving in the background keep their memory, as megagap's do. Loads fill tensors that are
there, but torch.load, which makes new ones.
They read what was just written: from memory, unless --cold asks for the disk.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor import Shard as Split

from megagap.checkpoint import Index, load_slices, save_checkpoint
from megagap.checkpoint.background import BackgroundSaver
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Slice, split

KINDS = ("weight", "exp_avg", "exp_avg_sq")
COLUMNS, ROWS = 4096, 8192
"""Of a matrix: 134 MB."""
CPU = torch.device("cpu")
NAMES = {
    "save": "durable save",
    "load": "load in the same layout",
    "reshape": "load reshaped",
    "stall": "training stands still",
    "background": "durable save in the background",
}


class Part:
    """This rank's part of the state, split by rows (0) or columns (1), as each library wants it."""

    def __init__(self, matrices: int, dim: int, rank: int, ranks: int) -> None:
        shape = (ROWS, COLUMNS)
        self.slices, self.tensors = [], {}
        for number in range(matrices):
            name = f"layers.{number}.weight"
            shard = split(name, shape, dim, rank, ranks)
            for kind in KINDS:
                own = _content(len(self.slices), dim, rank, ranks)
                self.tensors[f"{kind}/{name}"] = own
                self.slices.append(Slice(kind, shard, 0, own.numel(), own.view(-1)))
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        self.dim, self.rank, self.ranks = dim, rank, ranks

    def for_dcp(self) -> dict[str, Tensor]:
        """Views of the tensors, distributed where there are several ranks."""
        if self.ranks == 1:
            return dict(self.tensors)
        mesh, placements = init_device_mesh("cpu", (self.ranks,)), [Split(self.dim)]
        return {name: _distributed(tensor, mesh, placements) for name, tensor in self.tensors.items()}

    def clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()

    def compare(self, found: dict[str, Tensor]) -> None:
        for number, name in enumerate(self.tensors):
            expected = _content(number, self.dim, self.rank, self.ranks)
            assert torch.equal(found[name], expected), f"{name} is not what was written"


def _content(number: int, dim: int, rank: int, ranks: int) -> Tensor:
    """What the rank has of the state's tensor of this number."""
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS).add_(number)
    return whole.chunk(ranks, dim)[rank].contiguous()


def _distributed(tensor: Tensor, mesh: Any, placements: list[Placement]) -> Tensor:
    return DTensor.from_local(tensor, mesh, placements, run_check=False)


class Clock:
    """Seconds from when all ranks begin something to when all have ended."""

    def __init__(self, ranks: int) -> None:
        self._wait: Callable[[], object] = dist.barrier if ranks > 1 else lambda: None
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)

    @contextmanager
    def of(self, what: str, arm: str) -> Iterator[None]:
        if what in ("save", "stall"):
            os.sync()
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds[what, arm].append(time.perf_counter() - begin)


class KeptCopies(DefaultStager):
    """One copy of distributed tensors, whose memory is kept: torch's own, in 2.13, fails on those of a CPU."""

    def __init__(self) -> None:
        super().__init__(StagingOptions(False, False, False, False))
        self.copies: dict[str, Tensor] = {}

    def stage(self, state_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        for name, tensor in state_dict.items():
            local = tensor.to_local()
            if name not in self.copies:
                self.copies[name] = _distributed(torch.empty_like(local), tensor.device_mesh, tensor.placements)
            self.copies[name].to_local().copy_(local)
        return self.copies


def start_dcp(
    part: Part, folder: Path, stager: DefaultStager, group: dist.ProcessGroup | None
) -> tuple[Callable[[], bool], Callable[[], object]]:
    """Save in the background; whether that is over, and a function that waits for it."""
    writer = dcp.FileSystemWriter(folder, overwrite=True)
    started = dcp.async_save(part.for_dcp(), storage_writer=writer, async_stager=stager, process_group=group)
    assert isinstance(started, Future)
    return started.done, started.result


def work(seconds: float, is_over: Callable[[], bool] = lambda: False) -> float:
    """Small operations per second, which the interpreter starts one by one, until something is over."""
    a, b = torch.ones(16), torch.ones(16)
    begin, count = time.perf_counter(), 0
    while not is_over() and time.perf_counter() - begin < seconds:
        for _ in range(100):
            a.add_(b)
        count += 100
    return count / (time.perf_counter() - begin)


def step(weights: list[Tensor], tokens: int) -> None:
    """Forward and backward products of a training step."""
    for weight in weights:
        x = torch.ones(tokens, weight.shape[1])
        y = x @ weight.T
        y @ weight
        y.T @ x


def save_by_torch(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Have what a folder holds read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(rank: int, ranks: int, options: argparse.Namespace, folder: Path, store: str, results: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    matrices = max(1, round(options.gigabytes * 1e9 / (len(KINDS) * ROWS * COLUMNS * 4)))
    clock = Clock(ranks)
    size, step_seconds, slower = measure_saves(matrices, rank, ranks, options, folder, clock)
    gc.collect()
    measure_loads(matrices, rank, ranks, options, folder, clock)
    if rank == 0:
        medians = {key: statistics.median(values[1:]) for key, values in clock.seconds.items()}
        results.put((size * ranks, medians, step_seconds, slower))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def measure_saves(
    matrices: int, rank: int, ranks: int, options: argparse.Namespace, folder: Path, clock: Clock
) -> tuple[int, float, dict[str, float]]:
    """Bytes of this rank's part, seconds of a step, and how many times as slow each arm makes small operations."""
    mesh = Mesh.of(Mesh.create(device=CPU, world_size=ranks, rank=rank).layout, rank, CPU, background=True)
    communicator = DistributedCommunicator(mesh)
    part = Part(matrices, 0, rank, ranks)
    saver = BackgroundSaver(part.slices, DistributedCommunicator(mesh, mesh.background_levels), CPU)
    copy = next(iter(part.tensors.values())).clone()
    stager = KeptCopies() if ranks > 1 else DefaultStager(StagingOptions(False, False, False, False))
    group = dist.new_group() if ranks > 1 else None
    speeds, steps = defaultdict(list), []
    weights = [tensor for name, tensor in part.tensors.items() if name.startswith("weight")]
    step(weights[:1], options.tokens)
    paths = Paths(folder, rank)
    writing: dict[str, Callable[[], object]] = {
        "megagap": lambda: save_checkpoint(paths.megagap, part.slices, {}, communicator),
        "DCP": lambda: dcp.save(part.for_dcp(), storage_writer=dcp.FileSystemWriter(paths.dcp, overwrite=True)),
        "torch.save": lambda: save_by_torch(part.tensors, paths.torch),
    }

    for number in range(options.rounds + 1):
        if rank == 0:  # a run replaces no checkpoint: what each arm wrote is removed before it writes again, untimed
            for path in filter(Path.is_dir, folder.iterdir()):
                shutil.rmtree(path)
        begin = time.perf_counter()
        step(weights, options.tokens)
        steps.append(time.perf_counter() - begin)
        with clock.of("stall", "one copy in memory"):
            for tensor in part.tensors.values():
                copy.copy_(tensor)
        for arm in sorted(writing, reverse=number % 2 == 0):  # the first may find more memory free
            with clock.of("save", arm):
                writing[arm]()
        for arm in ("megagap", "DCP"):
            speeds["alone"].append(work(0.5))
            begin = time.perf_counter()
            with clock.of("stall", arm):
                if arm == "megagap":
                    saver.start(folder / "step_00000002", part.slices, {}, lambda seconds: None)
                    is_over, wait = (lambda: saver.is_idle), saver.wait
                else:
                    is_over, wait = start_dcp(part, folder / "dcp_async", stager, group)
            speeds[arm].append(work(600, is_over))
            wait()
            clock.seconds["background", arm].append(time.perf_counter() - begin)
    saver.close()
    slower = {arm: statistics.median(speeds["alone"]) / statistics.median(speeds[arm]) for arm in ("megagap", "DCP")}
    return part.bytes, statistics.median(steps), slower


def measure_loads(
    matrices: int, rank: int, ranks: int, options: argparse.Namespace, folder: Path, clock: Clock
) -> None:
    """Of what the last round of saves left."""
    for what, dim in (("load", 0), ("reshape", 1)) if ranks > 1 else (("load", 0),):
        part = Part(matrices, dim, rank, ranks)
        for number in range(options.rounds + 1):
            for arm in ("megagap", "DCP", "torch.load") if what == "load" else ("megagap", "DCP"):
                part.clear()
                if options.cold:
                    forget(folder)
                with clock.of(what, arm):
                    loaded = read(arm, part, Paths(folder, rank))
                if number == 0:
                    part.compare(loaded)
                del loaded


@dataclass(frozen=True)
class Paths:
    """Where each arm writes."""

    folder: Path
    rank: int

    @property
    def megagap(self) -> Path:
        return self.folder / "step_00000001"

    @property
    def dcp(self) -> Path:
        return self.folder / "dcp"

    @property
    def torch(self) -> Path:
        return self.folder / f"torch/{self.rank}.pt"


def read(arm: str, part: Part, paths: Paths) -> dict[str, Tensor]:
    if arm == "torch.load":
        return cast("dict[str, Tensor]", torch.load(paths.torch, weights_only=True))
    if arm == "megagap":
        load_slices(paths.megagap, Index.read(paths.megagap), part.slices)
    else:
        dcp.load(part.for_dcp(), storage_reader=dcp.FileSystemReader(paths.dcp))
    return part.tensors


def report(ranks: int, size: int, medians: dict[tuple[str, str], float], step: float, slower: dict[str, float]) -> dict:
    print(f"\n{ranks} rank{'s' if ranks > 1 else ''}, {size / 1e9:.2f} GB")
    found: dict[str, Any] = {"bytes": size, "step_seconds": step, "small_operations_slower": slower}
    copy = medians["stall", "one copy in memory"]
    for (what, arm), seconds in sorted(medians.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1])):
        line = f"  {NAMES[what]:31} {arm:19} {seconds:8.3f} s  {size / seconds / 1e9:6.2f} GB/s"
        if what == "stall":
            line += f"  {seconds / copy:5.2f} copies  {100 * seconds / step:5.1f} % of a step of {step:.2f} s"
        if what == "background":
            line += f"  small operations meanwhile {slower[arm]:.2f} times as slow"
        print(line)
        found.setdefault(what, {})[arm] = {"seconds": seconds, "gigabytes_per_second": size / seconds / 1e9}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the state (4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (1 2)")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted (5)")
    parser.add_argument("--tokens", type=int, default=256, help="of a step, which the stall is compared with (256)")
    parser.add_argument("--folder", type=Path, help="where to write: on the disk in question (the temporary folder)")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from memory")
    parser.add_argument("--json", action="store_true", help="also print one JSON object")
    options = parser.parse_args()
    found = {}
    for ranks in options.ranks:
        folder = Path(tempfile.mkdtemp(prefix="checkpoints_", dir=options.folder))
        try:
            results = multiprocessing.get_context("spawn").SimpleQueue()
            arguments = (ranks, options, folder, str(folder / "store"), results)
            multiprocessing.spawn(measure, arguments, nprocs=ranks)
            found[ranks] = report(ranks, *results.get())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
