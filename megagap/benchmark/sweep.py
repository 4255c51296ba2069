"""Times a recipe in several layouts, each in processes of its own, and ranks them."""

import hashlib
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megagap.benchmark.step import QUIET_SPREAD, first_step, missing_data, spread
from megagap.checkpoint import find_model
from megagap.config import Settings, load_recipe
from megagap.config.loading import override_faults
from megagap.errors import ConfigError, MegagapError, counted, ops_choice
from megagap.files import Lock, LockedError, file_errors, make_folder, require_writable, write_text, writing
from megagap.observe.run_directory import environment
from megagap.parallel.mesh import Mesh
from megagap.process.parent import end_with_starter

MAX_COMBINATIONS = 1000
"""More of them are a mistake: at a minute each, most of a day."""

DONE, REFUSED, FAILED = "done", "refused", "failed"
"""What became of a combination: measured; not started, since the settings contradict each other; started in vain."""

MEASURE = ("-m", "megagap", "benchmark-mfu")
"""What Python runs to measure one combination."""


@dataclass(frozen=True)
class Sweep:
    """What to measure, and how."""

    recipe: Path
    overrides: list[str]
    """``section.key=value`` that hold for all combinations."""
    values: dict[str, list[str]]
    """The values of each swept setting, as they were typed."""
    processes: int
    warmup: int
    steps: int
    phase: str | None
    output: Path

    def combinations(self) -> Iterator[dict[str, str]]:
        for values in itertools.product(*self.values.values()):
            yield dict(zip(self.values, values, strict=True))


@dataclass(frozen=True)
class Outcome:
    """What became of one combination."""

    settings: dict[str, str]
    status: str
    reason: str = ""
    """Why it was refused or failed."""
    report: dict[str, Any] = field(default_factory=dict)
    """benchmark.json, of one that is done."""
    folder: Path | None = None
    is_from_before: bool = False
    """Whether an earlier call of the sweep measured it."""

    @property
    def tokens_per_second(self) -> float:
        return self.report.get("tokens_per_second", 0.0)

    def as_dict(self) -> dict[str, Any]:
        measured = {
            key: self.report.get(key)
            for key in ("tokens_per_second", "tflops_per_device", "memory_bytes", "mfu", "peak_tflops_spread")
        }
        return {
            "settings": self.settings,
            "status": self.status,
            "reason": self.reason or None,
            **(measured if self.status == DONE else {}),
            "folder": None if self.folder is None else str(self.folder),
        }


def parse_sweep(items: Sequence[str]) -> dict[str, list[str]]:
    """``section.key=V1,V2`` items as the values of each setting.

    Values are written as for ``--section.key``: TOML, or text without quotes; a list has brackets of its own, as in
    ``parallel.layers_per_stage=[2,2],[1,3]``. Raises :class:`ConfigError` for what is none, for an unknown setting or
    one named twice, and for values that are missing, repeated, or not what the setting takes.
    """
    found: dict[str, list[str]] = {}
    faults: list[str] = []
    for item in items:
        name, equals, text = item.removeprefix("--").partition("=")
        if not equals or not re.fullmatch(r"\w+\.\w+", name):
            raise ConfigError(
                f"--sweep {item}: must be section.key=V1,V2, such as parallel.tp=1,2\n"
                "  the recipe and other options come before --sweep."
            )
        values = split_values(text)
        if name in found:
            raise ConfigError(f"--sweep: {name} is given twice; put all of its values into one item")
        if "" in values:
            raise ConfigError(f"--sweep {item}: a value is missing; must be section.key=V1,V2, such as parallel.tp=1,2")
        if repeated := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ConfigError(f"--sweep {item}: {repeated[0]} is given twice")
        found[name] = values
        for value in values:
            faults += [f"  {name} = {value}  {fault.message}" for fault in override_faults(f"{name}={value}")]
    if faults:
        raise ConfigError(
            f"--sweep has {counted(len(faults), 'value')} that cannot be used\n" + "\n".join(dict.fromkeys(faults))
        )
    return found


def split_values(text: str) -> list[str]:
    """At the commas outside of brackets and quotes."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not quote and depth <= 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def run_sweep(sweep: Sweep) -> list[Outcome]:
    """Measure all combinations by ``megagap benchmark-mfu`` in processes of their own, and rank them, the fastest
    first. ``sweep.json`` in the output folder is replaced after each.

    A combination that an earlier call has measured, with the same settings, versions and hardware, is not measured
    again; one that failed is. Raises :class:`ConfigError` if there are too many, none of them can be started, or
    another sweep writes into the same folder.
    """
    combinations = list(sweep.combinations())
    if len(combinations) > MAX_COMBINATIONS:
        raise ConfigError(f"--sweep: {len(combinations):,} combinations; at most {MAX_COMBINATIONS:,} are possible")
    prepared = [_prepare(sweep, combination) for combination in combinations]
    refusals = [settings for settings in prepared if isinstance(settings, MegagapError)]
    if len(refusals) == len(combinations):
        raise _nothing_to_start(refusals)
    make_folder(sweep.output)
    require_writable(sweep.output / "sweep.json")
    lock = _lock(sweep.output)
    where = _surroundings(sweep)
    outcomes: list[Outcome] = []
    try:
        for number, (combination, settings) in enumerate(zip(combinations, prepared, strict=True), start=1):
            if isinstance(settings, MegagapError):
                outcomes.append(Outcome(combination, REFUSED, str(settings)))
            else:
                outcomes.append(_measure(sweep, combination, settings, where))
            print(f"{number}/{len(combinations)} {_shown(combination)}: {_result(outcomes[-1])}", file=sys.stderr)
            _write(sweep, outcomes)
    except KeyboardInterrupt:
        left = len(combinations) - len(outcomes)
        print(
            f"{left} of {len(combinations)} combinations left; rerun the same command to measure them", file=sys.stderr
        )
        raise
    finally:
        lock.release()
    return ranked(outcomes)


def _lock(folder: Path) -> Lock:
    try:
        with file_errors(f"cannot write {folder / 'lock'}", folder / "lock"):
            return Lock(folder / "lock")
    except LockedError as error:
        raise ConfigError(f"another sweep writes into {folder}: {error.holder}\n  choose another --output.") from None


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """By tokens per second, the fastest first; failures after them, refusals last."""
    return sorted(outcomes, key=lambda x: ((DONE, FAILED, REFUSED).index(x.status), -x.tokens_per_second))


def table(sweep: Sweep, outcomes: Sequence[Outcome]) -> Table:
    """For a person; one row per combination, in order."""
    columns = [name.partition(".")[2] for name in sweep.values]
    found = Table("", *columns, "tokens per second", "step", "memory per device", "MFU", title="sweep")
    for column in found.columns[len(columns) + 1 :]:
        column.justify = "right"
    for place, outcome in enumerate(outcomes, start=1):
        values = [outcome.settings[name] for name in sweep.values]
        if outcome.status != DONE:
            found.add_row("", *values, outcome.status)
            continue
        report = outcome.report
        seconds = statistics.median(report["step_seconds"])
        mfu = report["mfu"]["datasheet"] or report["mfu"]["measured"]
        memory = f"{report['memory_bytes'] / 2**30:.2f} GiB"
        speed = f"{outcome.tokens_per_second:,.0f}"
        found.add_row(str(place), *values, speed, f"{seconds:.3f} s", memory, f"{mfu['full']:.1%}")
    return found


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Below the table: the reasons of failures, what MFU is of, and whether the machine was quiet."""
    lines = [
        f"{_shown(outcome.settings)} {outcome.status}: {outcome.reason}"
        + (f"\n  its output: {outcome.folder / 'output.log'}" if outcome.folder else "")
        for outcome in outcomes
        if outcome.status != DONE
    ]
    done = [outcome.report for outcome in outcomes if outcome.status == DONE]
    if done:
        peak = "datasheet" if done[0]["mfu"]["datasheet"] else "measured"
        lines.append(f"MFU: of the {peak} peak, counting the full attention square")
        peaks = [value for report in done for value in report["measured_peaks"]]
        lines.append(f"measured peaks: {min(peaks):,.3f} to {max(peaks):,.3f} TFLOP/s, a spread of {spread(peaks):.0%}")
        if spread(peaks) > QUIET_SPREAD:
            lines.append(
                "  the machine was not quiet, or the dtype differs: small differences between rows mean nothing"
            )
    return lines


def _prepare(sweep: Sweep, combination: dict[str, str]) -> Settings | MegagapError:
    overrides = [*sweep.overrides, *(f"{name}={value}" for name, value in combination.items())]
    try:
        settings = load_recipe(sweep.recipe, overrides, sweep.processes, needs_data=False, find_model=find_model)
        first_step(settings, sweep.phase)
    except MegagapError as error:
        return error
    return settings


def _measure(sweep: Sweep, combination: dict[str, str], settings: Settings, where: dict[str, Any]) -> Outcome:
    identity = {**where, "tokens": missing_data(settings) or "recipe", "recipe": settings.model_dump(mode="json")}
    # As JSON reads it back, to be compared.
    identity = json.loads(json.dumps(identity, sort_keys=True))
    folder = sweep.output / _folder_name(combination, identity)
    if (report := _read_finished(folder, identity)) is not None:
        return Outcome(combination, DONE, "", report, folder, is_from_before=True)
    make_folder(folder)
    with writing(folder / "benchmark.json"):
        (folder / "benchmark.json").unlink(missing_ok=True)
    with writing(folder / "combination.json"):
        write_text(folder / "combination.json", json.dumps(identity, indent=2) + "\n")
    with writing(folder / "output.log"), open(folder / "output.log", "wb") as output:
        code = subprocess.run(
            _command(sweep, combination, folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=end_with_starter,
        ).returncode
    report = _read_finished(folder, identity)
    if code == 0 and report is not None:
        return Outcome(combination, DONE, "", report, folder)
    text = (folder / "output.log").read_text(encoding="utf-8", errors="replace")
    return Outcome(combination, FAILED, reason_of(text, code), {}, folder)


def _command(sweep: Sweep, combination: dict[str, str], folder: Path) -> list[str]:
    launcher = [sys.executable]
    if sweep.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(sweep.processes)]
    options = ["--warmup", str(sweep.warmup), "--steps", str(sweep.steps), "--output", str(folder)]
    options += ["--phase", sweep.phase] if sweep.phase is not None else []
    settings = [*sweep.overrides, *(f"{name}={value}" for name, value in combination.items())]
    return [
        *launcher,
        *MEASURE,
        str(sweep.recipe),
        *options,
        *(f"--{setting}" for setting in settings),
    ]


def _surroundings(sweep: Sweep) -> dict[str, Any]:
    """What else a measurement depends on."""
    found = environment(Mesh.single())
    hardware = {key: found[key] for key in ("host", "device", "threads")}
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "megagap": found["revision"]},
        "hardware": hardware | ({"device": _gpu_names()} if torch.cuda.is_available() else {}),
        "ops": ops_choice(),
        "processes": sweep.processes,
        "warmup": sweep.warmup,
        "steps": sweep.steps,
        "phase": sweep.phase,
    }


def _gpu_names() -> list[str]:
    """Asked in another process: to ask takes memory of the first GPU, which is to be measured."""
    script = (
        "import json, torch; print(json.dumps(list(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout)
    return names


def _folder_name(combination: dict[str, str], identity: dict[str, Any]) -> str:
    """Readable, and different where anything that matters is."""
    readable = re.sub(r"[^\w.=,+-]+", "_", ",".join(f"{name.partition('.')[2]}={v}" for name, v in combination.items()))
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{readable[:80]}-{digest}"


def _read_finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a measurement of just this, if there is a whole one."""
    with suppress(OSError, ValueError):
        report = json.loads((folder / "benchmark.json").read_bytes())
        if json.loads((folder / "combination.json").read_bytes()) == identity and report["step_seconds"]:
            return dict(report)
    return None


def reason_of(output: str, code: int) -> str:
    """Why a benchmark that printed this ended: its own message, else the exception, the signal, or the last line."""
    kinds = "|".join(sorted(kind.kind for kind in _all_errors()))
    if found := re.search(rf"^(?:rank \d+: )?((?:{kinds}): .*(?:\n  .*)*)", output, re.MULTILINE):
        return found[1].strip()
    # Under torchrun the last exception is its own report of the others.
    exceptions = re.findall(r"^(?:\[rank\d+\]:\s*)?([\w.]*(?:Error|Exception)(?:: .*)?)$", output, re.MULTILINE)
    exceptions = [line for line in exceptions if "ChildFailedError" not in line]
    if exceptions:
        return exceptions[0]
    ended = re.search(r"exitcode\s*:\s*(-\d+)", output)
    killed_by = -int(ended[1]) if ended else -code if code < 0 else code - 128 if code > 128 else 0
    if killed_by:
        name = signal.Signals(killed_by).name if killed_by in set(signal.Signals) else f"signal {killed_by}"
        return f"ended by {name}" + (": out of memory?" if killed_by == signal.SIGKILL else "")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")


def _all_errors() -> list[type[MegagapError]]:
    found, left = [], [MegagapError]
    while left:
        kind = left.pop()
        found.append(kind)
        left += kind.__subclasses__()
    return [kind for kind in found if kind is not MegagapError]


def _nothing_to_start(refusals: list[MegagapError]) -> MegagapError:
    """What is wrong with all of them, such as a recipe that does not exist; else with the first."""
    if len(set(map(str, refusals))) == 1:
        return refusals[0]
    first = str(refusals[0]).removeprefix(f"{ConfigError.kind}: ")
    return ConfigError(f"--sweep: no combination can be started; the first one:\n{first}")


def _shown(combination: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in combination.items())


def _result(outcome: Outcome) -> str:
    if outcome.status != DONE:
        lines = [line.strip() for line in outcome.reason.splitlines()]
        # The first line of faults in the settings only counts them.
        only_counts = outcome.reason.startswith(ConfigError.kind) and len(lines) > 1
        return f"{outcome.status}: {lines[1] if only_counts else lines[0]}"
    before = " (measured before)" if outcome.is_from_before else ""
    return f"{outcome.tokens_per_second:,.0f} tokens per second{before}"


def _write(sweep: Sweep, outcomes: list[Outcome]) -> None:
    content = {
        "recipe": os.fspath(sweep.recipe),
        "overrides": sweep.overrides,
        "sweep": sweep.values,
        "processes": sweep.processes,
        "results": [outcome.as_dict() for outcome in ranked(outcomes)],
    }
    with writing(sweep.output / "sweep.json"):
        write_text(sweep.output / "sweep.json", json.dumps(content, indent=2) + "\n")
