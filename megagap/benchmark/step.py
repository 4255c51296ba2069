"""Times the trainer's own steps of a recipe on this machine, and compares them with what the hardware could do."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from megagap.config import Settings, timeline_of
from megagap.data.loader import Batch
from megagap.errors import ConfigError
from megagap.model.flops import flops_per_token
from megagap.observe.profile import Profile, profile_steps
from megagap.observe.run_directory import RunDirectory, environment
from megagap.observe.utilisation import peak_memory_bytes, peak_tflops
from megagap.optim.precision import PRECISIONS
from megagap.parallel.mesh import Mesh
from megagap.terminal.progress import ProgressBar
from megagap.timeline import Moment
from megagap.token_formats import find_format, format_of
from megagap.training.datasets import training_data
from megagap.training.recorder import Recorder
from megagap.training.step import train_step
from megagap.training.trainer import build_state, make_loader

PEAK_MEASUREMENTS = 5
"""Times at which the peak is measured, before, between and after the timed steps: what it says of a machine that others
use changes within seconds."""

QUIET_SPREAD = 0.1
"""Peaks that differ by more than this share are no longer those of a quiet machine."""


@dataclass(frozen=True)
class Report:
    """What was measured; :meth:`as_dict` is the content of benchmark.json."""

    settings: Settings
    mesh: Mesh
    first: Moment
    """The first step of the phase whose steps were timed."""
    step_seconds: list[float]
    """Every timed step."""
    measured_peaks: list[float]
    """TFLOP/s of a large matrix product in the dtype of the run, on one device while all others do the same: before,
    between and after the timed steps."""
    memory_bytes: int
    profile: Profile | None = None
    """Of a few steps after the timed ones; on a GPU only, and if it was asked for."""

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, from the median step."""
        return self.first.tokens / statistics.median(self.step_seconds)

    @property
    def measured_peak(self) -> float:
        """The median, as of the steps: what else the machine does weighs on both alike. The best of them would charge
        other programs to the step; the worst would flatter it."""
        return statistics.median(self.measured_peaks)

    @property
    def peak_spread(self) -> float:
        """Difference of the highest and the lowest measured peak, relative to the median."""
        return spread(self.measured_peaks)

    @property
    def tflops_per_device(self) -> float:
        """Counting the full attention square."""
        per_token = flops_per_token(self.settings.model, self.first.sequence_length).full
        return per_token * self.tokens_per_second / self.mesh.world.size / 1e12

    def as_dict(self) -> dict[str, Any]:
        flops = flops_per_token(self.settings.model, self.first.sequence_length)
        per_device = self.tokens_per_second / self.mesh.world.size / 1e12
        achieved = {"full": self.tflops_per_device, "causal": flops.causal * per_device}
        dtype = PRECISIONS[self.settings.train.precision].compute
        peaks = {"datasheet": peak_tflops(self.mesh.device, dtype), "measured": self.measured_peak}
        return {
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.step_seconds,
            "flops_per_token": {"full": flops.full, "causal": flops.causal},
            "tflops_per_device": achieved["full"],
            "peak_tflops": peaks,
            "measured_peaks": self.measured_peaks,
            "peak_tflops_spread": self.peak_spread,
            "mfu": {
                name: None if peak is None else {formula: tflops / peak for formula, tflops in achieved.items()}
                for name, peak in peaks.items()
            },
            "memory_bytes": self.memory_bytes,
            "phase": {"name": self.first.phase.name, "sequence_length": self.first.sequence_length},
            "tokens": "random" if missing_data(self.settings) else "recipe",
            "hardware": environment(self.mesh),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "recipe": self.settings.model_dump(mode="json"),
            "profile": None if self.profile is None else self.profile.as_dict(),
        }

    def table(self) -> Table:
        """For a person."""
        numbers = self.as_dict()
        table = Table(title="training step", show_header=False)
        seconds = sorted(self.step_seconds)
        rows = [
            ("phase", self._phase_row()),
            ("tokens per second", f"{numbers['tokens_per_second']:,.0f}"),
            ("step", f"{statistics.median(seconds):.3f} s (fastest {seconds[0]:.3f}, slowest {seconds[-1]:.3f})"),
            ("TFLOP/s per device", f"{numbers['tflops_per_device']:.3f}"),
            ("memory per device", f"{numbers['memory_bytes'] / 2**30:.2f} GiB"),
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
        low, high = min(self.measured_peaks), max(self.measured_peaks)
        rows.append(
            (
                "measured peaks",
                f"{low:,.3f} to {high:,.3f} TFLOP/s in {len(self.measured_peaks)} measurements, "
                f"a spread of {self.peak_spread:.0%}",
            )
        )
        for row in rows:
            table.add_row(*row)
        return table

    def warning(self) -> str | None:
        """What to know before the numbers are used, if the machine was not quiet."""
        if self.peak_spread <= QUIET_SPREAD:
            return None
        low, high = (self.tflops_per_device / peak for peak in (max(self.measured_peaks), min(self.measured_peaks)))
        return (
            f"the machine was not quiet: its measured peak varied by {self.peak_spread:.0%} during the benchmark\n"
            f"  MFU of the measured peak is between {low:.1%} and {high:.1%}; repeat it when nothing else runs."
        )

    def _phase_row(self) -> str:
        length = f"sequences of {self.first.sequence_length:,} tokens"
        names = [phase.name for phase in self.settings.data.phases]
        if not names:
            return f"the whole run, {length}"
        return f"{self.first.phase.name} ({names.index(self.first.phase.name) + 1} of {len(names)}), {length}"


def benchmark(
    settings: Settings, mesh: Mesh, first: Moment, warmup: int, steps: int, profiled_steps: int = 0
) -> Report:
    """Run ``warmup`` and then ``steps`` timed steps, from the ``first`` one of a phase on, in the recipe's layout, with
    all that the trainer does at a step: read the batch, update, record. A phase that is shorter starts again. Where the
    recipe's data files do not exist, tokens are random. On a GPU, ``profiled_steps`` more are made under torch's
    profiler.
    """
    state = build_state(settings, mesh)
    state.step = first.step - 1
    last_step = state.timeline.last_step(state.timeline.at(first.step).phase)
    seconds, peaks = [], []
    with TemporaryDirectory(prefix="megagap_benchmark_") as folder, batches(settings, mesh, first) as next_batch:
        run = RunDirectory(Path(folder), is_writer=mesh.world.rank == 0)
        recorder = Recorder(settings, state.timeline, mesh, run, state.step)

        def step() -> float:
            if state.step >= last_step:
                state.step = first.step - 1
            batch = next_batch(state.step + 1).to(mesh.device)
            result = train_step(state, batch, lambda: (False, False))
            # On a GPU this waits for the step before only, as in training; the sum over steps is right all the same.
            return recorder.step_done(state.step, result)

        measured_before = peak_measurements(steps)
        for number in ProgressBar(range(-warmup, steps), desc="steps", unit="step", disable=mesh.world.rank != 0):
            if number in measured_before:
                with recorder.pause():
                    peaks.append(measure_peak(settings, mesh))
            elapsed = step()
            if number >= 0:
                seconds.append(elapsed)
        memory = peak_memory_bytes(mesh.device)
        with recorder.pause():
            peaks.append(measure_peak(settings, mesh))
        profiled = mesh.device.type == "cuda" and profiled_steps > 0
        profile = profile_steps(step, profiled_steps) if profiled else None
        recorder.close()
    return Report(settings, mesh, first, seconds, peaks, memory, profile)


def spread(peaks: Sequence[float]) -> float:
    """Difference of the highest and the lowest, relative to the median."""
    return (max(peaks) - min(peaks)) / statistics.median(peaks)


def peak_measurements(steps: int) -> set[int]:
    """The timed steps before which the peak is measured: the first, and others at equal distances."""
    return {steps * part // (PEAK_MEASUREMENTS - 1) for part in range(PEAK_MEASUREMENTS - 1)}


def first_step(settings: Settings, phase: str | None = None) -> Moment:
    """The first step of the phase of this name, by default of the run.

    Raises :class:`ConfigError` listing the phases that there are.
    """
    timeline = timeline_of(settings)
    if phase is None:
        return timeline.at(1)
    if not settings.data.phases:
        raise ConfigError(f"--phase {phase}: the recipe has no phases (data.phases)\n  leave --phase out.")
    found = next((known for known in timeline.phases if known.name == phase), None)
    if found is None:
        names = ", ".join(known.name for known in timeline.phases)
        raise ConfigError(f"--phase {phase}: unknown; phases of the recipe: {names}")
    return timeline.at(timeline.first_step(found))


def missing_data(settings: Settings) -> str | None:
    """Why the recipe's own data cannot be read, if so."""
    paths = [prefix for source in timeline_of(settings).sources for prefix in source.prefixes]
    missing = [f"{path}{format_of(path).index} does not exist" for path in paths if find_format(path) is None]
    return missing[0] if missing else None if paths else "the recipe names none"


@contextmanager
def batches(settings: Settings, mesh: Mesh, first: Moment) -> Iterator[Callable[[int], Batch]]:
    """From a step to this rank's batch, in the phase of ``first``; what reads ahead ends with the block."""
    if missing_data(settings) is None:
        with make_loader(settings, mesh, training_data(settings)) as loader:
            yield loader.step
    else:
        batch = random_batch(settings, mesh, first)
        yield lambda step: batch


def random_batch(settings: Settings, mesh: Mesh, moment: Moment) -> Batch:
    """What the loader would return for the step, with random tokens: speed does not depend on the text."""
    train = settings.train
    shape = (moment.samples // (train.micro_batch_size * mesh.dp.size), train.micro_batch_size)
    generator = torch.Generator().manual_seed(train.seed + mesh.dp.rank)
    tokens = torch.randint(settings.model.vocab_size, (*shape, moment.sequence_length + 1), generator=generator)
    return Batch(tokens, torch.zeros(shape, dtype=torch.int64), max(1, len(timeline_of(settings).sources)))


def measure_peak(settings: Settings, mesh: Mesh, repeats: int = 4) -> float:
    """TFLOP/s of the fastest of several large square matrix products, on all ranks at the same time."""
    size = 8192 if mesh.device.type == "cuda" else 2048
    dtype = PRECISIONS[settings.train.precision].compute
    a, b = (torch.randn(size, size, device=mesh.device).to(dtype) for _ in range(2))
    best = float("inf")
    if mesh.world.group is not None:
        dist.barrier(mesh.world.group)
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
