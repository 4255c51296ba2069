"""Times the trainer's own steps of a recipe on this machine, and compares them with what the hardware could do."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from megagap.config import Settings, Source, sources_of, spans
from megagap.data.loader import Batch
from megagap.model.flops import flops_per_token
from megagap.observe.run_directory import RunDirectory, environment
from megagap.observe.utilisation import peak_memory_bytes, peak_tflops
from megagap.optim.precision import COMPUTE_DTYPES
from megagap.parallel.mesh import Mesh
from megagap.training.datasets import training_data
from megagap.training.recorder import Recorder
from megagap.training.step import train_step
from megagap.training.trainer import build_state, make_loader


@dataclass(frozen=True)
class Report:
    """What was measured; :meth:`as_dict` is the content of benchmark.json."""

    settings: Settings
    mesh: Mesh
    step_seconds: list[float]
    """Every timed step."""
    measured_peak: float
    """TFLOP/s of a large matrix product in the dtype of the run, on one device while all others do the same."""
    memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, from the median step."""
        tokens = self.settings.train.global_batch_size * sequence_length(self.settings)
        return tokens / statistics.median(self.step_seconds)

    def as_dict(self) -> dict[str, Any]:
        flops = flops_per_token(self.settings.model, sequence_length(self.settings))
        per_device = self.tokens_per_second / self.mesh.world.size / 1e12
        achieved = {"full": flops.full * per_device, "causal": flops.causal * per_device}
        peaks = {"datasheet": peak_tflops(self.mesh.device), "measured": self.measured_peak}
        return {
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.step_seconds,
            "flops_per_token": {"full": flops.full, "causal": flops.causal},
            "tflops_per_device": achieved["full"],
            "peak_tflops": peaks,
            "mfu": {
                name: None if peak is None else {formula: tflops / peak for formula, tflops in achieved.items()}
                for name, peak in peaks.items()
            },
            "memory_bytes": self.memory_bytes,
            "tokens": "random" if missing_data(self.settings) else "recipe",
            "hardware": environment(self.mesh),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "recipe": self.settings.model_dump(mode="json"),
        }

    def table(self) -> Table:
        """For a person."""
        numbers = self.as_dict()
        table = Table(title="training step", show_header=False)
        seconds = sorted(self.step_seconds)
        rows = [
            ("tokens a second", f"{numbers['tokens_per_second']:,.0f}"),
            ("step", f"{statistics.median(seconds):.3f} s (fastest {seconds[0]:.3f}, slowest {seconds[-1]:.3f})"),
            ("TFLOP/s a device", f"{numbers['tflops_per_device']:.3f}"),
            ("memory a device", f"{numbers['memory_bytes'] / 2**30:.2f} GiB"),
            ("tokens", f"random: {missing}" if (missing := missing_data(self.settings)) else "the recipe's"),
        ]
        for name, peak in numbers["peak_tflops"].items():
            shares = numbers["mfu"][name]
            rows.append(
                (
                    f"MFU of the {name} peak",
                    "peak unknown for this device"
                    if shares is None
                    else f"{shares['full']:.1%} full attention square, {shares['causal']:.1%} causal half "
                    f"(peak {peak:,.3f} TFLOP/s)",
                )
            )
        for row in rows:
            table.add_row(*row)
        return table


def benchmark(settings: Settings, mesh: Mesh, warmup: int, steps: int) -> Report:
    """Run ``warmup`` and then ``steps`` timed steps in the recipe's layout, with all that the trainer does at a step:
    read the batch, update, record. Where the recipe's data files do not exist, tokens are random.
    """
    state = build_state(settings, mesh)
    seconds = []
    with TemporaryDirectory(prefix="megagap_benchmark_") as folder, batches(settings, mesh) as next_batch:
        recorder = Recorder(settings, mesh, RunDirectory(Path(folder), is_writer=mesh.world.rank == 0), state.step)
        for step in tqdm(range(warmup + steps), desc="steps", unit="step", disable=mesh.world.rank != 0):
            batch = next_batch(state.consumed_samples).to(mesh.device)
            result = train_step(state, batch, lambda: (False, False))
            # On a GPU this waits for the step before only, as in training; the sum over steps is right all the same.
            elapsed = recorder.step_done(state.step, result)
            if step >= warmup:
                seconds.append(elapsed)
        recorder.close()
    return Report(settings, mesh, seconds, measure_peak(settings, mesh), peak_memory_bytes(mesh.device))


def sequence_length(settings: Settings) -> int:
    """Of the first phase, whose steps are timed."""
    return spans(settings.data, settings.train, settings.model.rope_theta)[0].sequence_length


def sources(settings: Settings) -> list[Source]:
    """Of all phases."""
    return sources_of(spans(settings.data, settings.train, settings.model.rope_theta))


def missing_data(settings: Settings) -> str | None:
    """Why the recipe's own data cannot be read, if so."""
    paths = [path for source in sources(settings) for path in source.paths]
    missing = [f"{path}.idx does not exist" for path in paths if not Path(f"{path}.idx").exists()]
    return missing[0] if missing else None if paths else "the recipe names none"


@contextmanager
def batches(settings: Settings, mesh: Mesh) -> Iterator[Callable[[int], Batch]]:
    """From the number of a step's first sample to this rank's batch; what reads ahead ends with the block."""
    if missing_data(settings) is None:
        with make_loader(settings, mesh, training_data(settings)) as loader:
            yield loader.step
    else:
        batch = random_batch(settings, mesh)
        yield lambda first_sample: batch


def random_batch(settings: Settings, mesh: Mesh) -> Batch:
    """What the loader would give, with random tokens: speed does not depend on the text."""
    train = settings.train
    shape = (train.global_batch_size // (train.micro_batch_size * mesh.dp.size), train.micro_batch_size)
    generator = torch.Generator().manual_seed(train.seed + mesh.dp.rank)
    tokens = torch.randint(settings.model.vocab_size, (*shape, sequence_length(settings) + 1), generator=generator)
    return Batch(tokens, torch.zeros(shape, dtype=torch.int64), max(1, len(sources(settings)))).to(mesh.device)


def measure_peak(settings: Settings, mesh: Mesh, repeats: int = 8) -> float:
    """TFLOP/s of the fastest of several large square matrix products: what no training step can exceed."""
    size = 8192 if mesh.device.type == "cuda" else 2048
    dtype = COMPUTE_DTYPES[settings.train.precision]
    a, b = (torch.randn(size, size, device=mesh.device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        _synchronise(mesh)
        start = time.perf_counter()
        a @ b
        _synchronise(mesh)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def _synchronise(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
