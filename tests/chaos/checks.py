"""What must hold of a run's directory at any moment, and of a finished run beside an undisturbed one."""

import json
import math
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from megagap.checkpoint import Index, load_tensor
from megagap.checkpoint.save import step_folders
from megagap.checkpoint.verify import find_damage
from megagap.errors import CheckpointError

RELATIVE = 2e-6
"""Largest difference of a loss or norm where the layout changed: sums in another order."""


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of it read; None: it is whole."""
    try:
        damage = find_damage(folder, Index.read(folder))
    except CheckpointError as error:
        return str(error)
    return str(damage[0]) if damage else None


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; an unfinished last line is none yet."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n") and line.strip()]


class Witness:
    """Watches a run directory while the run writes it: ``latest`` always names a checkpoint that is there, and what an
    event says was saved is there and whole when it says so, or was pruned since."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.checkpoints, self.keep = run, run / "checkpoints", keep
        self.findings: list[str] = []
        self.saved = 0
        """Messages of a checkpoint seen so far."""
        self.damaged: set[str] = set()
        """Names of checkpoints that were harmed on purpose."""
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._offset = 0

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_done.is_set():
            self.look()
            time.sleep(0.004)
        self.look()

    def look(self) -> None:
        self._look_at_latest()
        for event in self._new_events():
            if event["event"] == "checkpoint":
                self.saved += 1
                self.damaged.discard(event["folder"])  # written anew
                self._expect(event["folder"])

    def _look_at_latest(self) -> None:
        def target() -> str | None:
            try:
                return (self.checkpoints / "latest").read_text().strip()
            except FileNotFoundError:
                return None

        name = target()
        if name is None or name in self.damaged:
            return
        is_there = (self.checkpoints / name / "index.json").is_file()
        if not is_there and target() == name:
            self._report(f"latest names {name!r}, which is not there")

    def _new_events(self) -> list[dict[str, Any]]:
        try:
            with open(self.run / "events.jsonl", "rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        lines, _, _ = content.rpartition(b"\n")
        self._offset += len(lines) + 1 if lines else 0
        found = []
        for line in filter(None, lines.split(b"\n")):
            try:
                found.append(json.loads(line))
            except ValueError:  # a line that a killed run began; LineFile ends it before the next
                continue
        return found

    def _expect(self, name: str) -> None:
        """A checkpoint that was reported must be there, or have enough newer ones beside it to have been pruned."""
        fault = fault_of(self.checkpoints / name)
        if fault is None or name in self.damaged:
            return
        newer = [folder for folder in step_folders(self.checkpoints) if folder.name > name]
        if (self.checkpoints / name).exists() or len(newer) < self.keep:
            self._report(f"an event said that {name} was saved: {fault}")

    def _report(self, text: str) -> None:
        if text not in self.findings:
            self.findings.append(text)


def faults_at_rest(run: Path, damaged: set[str]) -> list[str]:
    """What is wrong with the directory of a run of which no process is left."""
    faults = []
    checkpoints = run / "checkpoints"
    for folder in step_folders(checkpoints):
        if folder.name not in damaged and (fault := fault_of(folder)):
            faults.append(f"{folder.name} has its final name: {fault}")
    latest = checkpoints / "latest"
    if latest.exists():
        name = latest.read_text().strip()
        if name not in damaged and not (checkpoints / name / "index.json").is_file():
            faults.append(f"latest names {name!r}, which is not there")
    elif step_folders(checkpoints) and len(step_folders(checkpoints)) > 1:
        faults.append("there are checkpoints and no latest")
    for name, parse in (("status.json", json.loads), ("environment.json", json.loads), ("config.toml", tomllib.loads)):
        try:
            parse((run / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            faults.append(f"{name} is half written: {error}")
    return faults


EXACT = ("step", "consumed_samples", "consumed_tokens", "lr")
CLOSE = ("loss", "grad_norm")
COMPARED = (*CLOSE, "weights", "moments")


def differences(run: Path, reference: Path, same_layout: bool) -> tuple[list[str], dict[str, float]]:
    """How a finished run differs from the undisturbed one, and the largest relative differences by what they are of.

    In one layout, losses, gradient norms, weights and moments are equal bit for bit; in several, each step has the same
    samples, and losses and norms differ by :data:`RELATIVE` at most.
    """
    faults = []
    largest = dict.fromkeys(COMPARED, 0.0)
    ours, theirs = whole_lines(run / "metrics.jsonl"), whole_lines(reference / "metrics.jsonl")
    if [record["step"] for record in ours] != [record["step"] for record in theirs]:
        faults.append(f"metrics have the steps {[record['step'] for record in ours]}, not each of them once")
    for own, other in zip(ours, theirs, strict=False):
        for key in EXACT:
            if own[key] != other[key]:
                faults.append(f"step {other['step']}: {key} is {own[key]}, not {other[key]}")
        for key in CLOSE:
            largest[key] = max(largest[key], relative_difference(own[key], other[key]))
    last = step_folders(run / "checkpoints"), step_folders(reference / "checkpoints")
    if not last[0] or last[0][-1].name != last[1][-1].name:
        return [*faults, f"the last checkpoint is {last[0][-1:]}, not {last[1][-1].name}"], largest
    for kind, difference in tensor_differences(last[0][-1], last[1][-1]).items():
        name = "weights" if kind == "weight" else "moments"
        largest[name] = max(largest[name], difference)
    checked = COMPARED if same_layout else CLOSE
    limit = 0.0 if same_layout else RELATIVE
    for name in checked:
        if not largest[name] <= limit:
            faults.append(f"{name} differ by {largest[name]:.1e}, more than {limit:.0e}")
    return faults, largest


def relative_difference(own: float | None, other: float | None) -> float:
    """|own - other| / |other|; infinite where only one is finite: metrics have null for what is not."""
    if own == other:
        return 0.0
    if own is None or other is None or not (math.isfinite(own) and math.isfinite(other)):
        return math.inf
    return abs(own - other) / abs(other) if other else math.inf


def tensor_differences(folder: Path, other: Path) -> dict[str, float]:
    """By kind, the largest ‖a - b‖ / ‖b‖ of a tensor in two checkpoints of any layouts; infinite where one lacks it."""
    ours, theirs = Index.read(folder), Index.read(other)
    result: dict[str, float] = {}
    for tensor in theirs.tensors:
        kind, name = tensor.kind, tensor.name
        if name not in ours.names(kind):
            result[kind] = math.inf
            continue
        own, expected = load_tensor(folder, ours, kind, name), load_tensor(other, theirs, kind, name)
        difference = 0.0
        if not torch.equal(own, expected):
            norm = expected.double().norm().item()
            difference = (own.double() - expected.double()).norm().item() / (norm or 1.0) or 1e-45
        result[kind] = max(result.get(kind, 0.0), difference)
    return result
