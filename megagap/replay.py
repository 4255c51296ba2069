"""Runs one step of a run again, from the nearest checkpoint before it, and compares it with what the run recorded.

In the same layout, on the same kind of machine and with the same software a step repeats bit for bit. So one that does
not was computed wrongly, then or now, and one that does owes what it did to its data and weights: the way to tell a bad
batch from a bad machine.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from megagap.checkpoint import find_model, resolve_checkpoint
from megagap.checkpoint.index import INDEX_NAME
from megagap.checkpoint.save import step_folders, step_of
from megagap.config import Guard, Model, Settings, load_recipe, timeline_of
from megagap.errors import ConfigError, DataError, MegagapError, counted
from megagap.files import file_errors
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory, environment
from megagap.optim.gradient_hash import as_text
from megagap.parallel.mesh import Mesh
from megagap.resume.persistence import load, require_loadable
from megagap.run_files import CONFIG, ENVIRONMENT, EVENTS
from megagap.training.datasets import training_data
from megagap.training.guard import StepGuard, Verdict
from megagap.training.step import train_step
from megagap.training.trainer import build_state, make_loader

Record = Mapping[str, Any]
"""Of a step, as metrics.jsonl has it."""


class ReplayError(MegagapError):
    """A step that was run again is not what the run recorded."""

    kind = "replay differs"


@dataclass(frozen=True)
class Compared:
    """A number of a step. None: not finite, as JSON has it."""

    recorded: float | str | None
    replayed: float | str | None

    @property
    def is_equal(self) -> bool:
        return self.recorded == self.replayed


@dataclass(frozen=True)
class Replay:
    """A step, as it was recorded and as it came out again."""

    run: Path
    step: int
    start: Path | None
    """The checkpoint that it was run from; None: the initial weights."""
    numbers: dict[str, Compared]
    """``loss``, ``grad_norm`` and, where the run recorded it, ``gradient_hash``."""
    first_difference: int | None
    """The first step from there on that differs; None: none does."""
    notes: list[str]
    """What is different now, and could be why."""

    @property
    def is_equal(self) -> bool:
        return self.first_difference is None

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {
            "step": self.step,
            "start": None if self.start is None else str(self.start),
            "equal": self.is_equal,
            "first_difference": self.first_difference,
            "numbers": {name: vars(number) | {"equal": number.is_equal} for name, number in self.numbers.items()},
            "notes": self.notes,
        }

    def table(self) -> Table:
        table = Table("", "recorded", "replayed", "", title=f"step {self.step} of {self.run}")
        for name, number in self.numbers.items():
            table.add_row(name, str(number.recorded), str(number.replayed), "equal" if number.is_equal else "DIFFERS")
        return table

    def verdict(self) -> str:
        """What a step that is equal means."""
        known = "bit-equal to the record: what it did comes from its data and weights, not from a fault of a machine"
        return known if "gradient_hash" in self.numbers else f"{known}\n{NO_HASH}"

    def require_equal(self) -> None:
        """Raises :class:`ReplayError` unless the step, and all from the start on, are what the run recorded."""
        if self.first_difference is None:
            return
        at, start = self.first_difference, "the initial weights" if self.start is None else self.start
        which = f"step {at}" if at == self.step else f"step {at}, before step {self.step},"
        notes = "".join(f"\n  {note}" for note in self.notes)
        raise ReplayError(
            f"{which} of {self.run}, run again from {start}, is not what the run recorded{notes}\n"
            "  With the same software on such a machine, one of the two was computed wrongly: replay it on another one."
        )


NO_HASH = "no hash of its gradients was recorded, only loss and gradient norm are compared: see guard.hash_every"


class RecordedGuard(StepGuard):
    """Accepts what the run accepted, and hashes what it hashed."""

    def __init__(self, settings: Guard, model: Model, device: torch.device, records: Mapping[int, Record]) -> None:
        super().__init__(settings, model, device)
        self.records, self.step = records, 0

    def is_repeated(self, step: int) -> bool:
        return False

    def is_hashed(self, step: int) -> bool:
        return "gradient_hash" in self.records.get(step, {})

    def judge(self, loss: Tensor, grad_norm: Tensor, differing: Tensor) -> Verdict:
        verdict, skipped = super().judge(loss, grad_norm, differing), self.records.get(self.step, {}).get("skipped")
        return verdict if skipped is None else replace(verdict, accepted=torch.full_like(verdict.accepted, not skipped))


def settings_of_run(run: Path, step: int, world_size: int) -> Settings:
    """The settings that ``step`` was made with.

    Raises :class:`ConfigError` if ``run`` is none, or if another number of processes made the step.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run: it has no {CONFIG}\n  name the run directory, as run.dir does.")
    made_by = processes_of(run, step)
    if made_by is not None and made_by != world_size:
        start = f"torchrun --nproc-per-node {made_by} " if made_by > 1 else "without torchrun: "
        raise ConfigError(
            f"step {step} of {run} was made by {counted(made_by, 'process', 'processes')}, not by {world_size}: in "
            f"another layout its sums are rounded otherwise\n  start it with {start}…"
        )
    return load_recipe(config_of(run, step), [f"run.dir={run}"], world_size, find_model=find_model)


def config_of(run: Path, step: int) -> Path:
    """The file with the settings of ``step``: a restart that changed some has kept those before."""
    kept = [(int(found[1]), path) for path in run.iterdir() if (found := KEPT_CONFIG.fullmatch(path.name))]
    return next((path for last, path in sorted(kept) if last >= step), run / CONFIG)


KEPT_CONFIG = re.compile(r"config_before_step_([0-9]+)\.toml")


def processes_of(run: Path, step: int) -> int | None:
    """How many processes made ``step``: those of the last start before it. None where no event says so."""
    with file_errors(f"cannot read {run / EVENTS}", run / EVENTS):
        lines = (run / EVENTS).read_bytes().splitlines() if (run / EVENTS).exists() else []
    found = None
    for line in lines:
        try:
            event = json.loads(line)
            if event["event"] == "start" and event["step"] < step:
                found = int(event["processes"])
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return found


def replay(settings: Settings, mesh: Mesh, run: RunDirectory, step: int) -> Replay:
    """Run ``step`` of a run again; nothing is written. ``settings``: those of :func:`settings_of_run`. Collective.

    Updates are made where the run made them. Raises :class:`DataError` if the run has not recorded the step, and what
    a run that resumes raises where its checkpoint or its data cannot be used.
    """
    records = {record["step"]: record for record in read_metrics(run.metrics) if record["step"] > 0}
    if step not in records:
        known = f"steps {min(records)} to {max(records)}" if records else "none"
        raise DataError(f"{run.metrics} has no step {step}\n  it has {known}.")
    source = start_of(settings, run, step)
    timeline = timeline_of(settings, require_loadable(settings, run, source))
    data = training_data(settings, timeline)
    state = build_state(settings, mesh, timeline)
    guard = state.guard = RecordedGuard(settings.guard, settings.model, mesh.device, records)
    load(state, run, data, source)
    numbers: dict[str, Compared] = {}
    first_difference = None
    with make_loader(settings, mesh, data) as loader:
        steps = range(state.step + 1, step + 1)
        for number in tqdm(steps, desc="steps", unit="step", disable=None if mesh.world.rank == 0 else True):
            guard.step = number
            result = train_step(state, loader.step(number).to(mesh.device), lambda: (False, False))
            numbers = compare(records.get(number, {}), result.host.read())
            if first_difference is None and not all(found.is_equal for found in numbers.values()):
                first_difference = number
    return Replay(run.path, step, source, numbers, first_difference, notes(settings, mesh, run))


def start_of(settings: Settings, run: RunDirectory, step: int) -> Path | None:
    """The newest checkpoint of the run before ``step``, or where the run itself started from; None: initial weights.

    Raises :class:`CheckpointError` if that is no longer there.
    """
    own = [folder for folder in step_folders(run.checkpoints) if (folder / INDEX_NAME).is_file()]
    before = [folder for folder in own if step_of(folder) < step]
    if before:
        return before[-1]
    return (
        resolve_checkpoint(Path(settings.checkpoint.load)) if settings.checkpoint.load not in ("", "latest") else None
    )


def compare(record: Record, numbers: Mapping[str, list[float]]) -> dict[str, Compared]:
    """What the run recorded of a step, and what it is now, by the record's keys."""
    found: dict[str, Compared] = {}
    for name in ("loss", "grad_norm"):
        if name in record:
            (number,) = numbers[name]
            found[name] = Compared(record[name], number if math.isfinite(number) else None)
    if "gradient_hash" in record:
        found["gradient_hash"] = Compared(record["gradient_hash"], as_text(numbers["gradient_hash"]))
    return found


def notes(settings: Settings, mesh: Mesh, run: RunDirectory) -> list[str]:
    """What else than a fault could make a difference."""
    try:
        before = json.loads((run.path / ENVIRONMENT).read_text(encoding="utf-8"))
        now = environment(mesh)
        found = [
            f"{name} was {before[name]}, is {now[name]}"
            for name in ("revision", "torch", "device", "threads", "layout")
            if before.get(name) != now[name]
        ]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        found = [f"{run.path / ENVIRONMENT} does not say where the run was made"]
    if mesh.device.type == "cuda" and not settings.train.deterministic:
        found.append("train.deterministic was false: on GPUs such a step need not repeat bit for bit")
    return found
