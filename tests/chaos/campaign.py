"""Runs of a recipe that are harmed again and again, each resumed with the same command, and compared at the end."""

import json
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from megagap.checkpoint import find_model
from megagap.checkpoint.save import read_latest, step_folders, step_of
from megagap.config import Settings, load_recipe
from megagap.errors import ConfigError, MegagapError
from tests.chaos.checks import COMPARED, Witness, differences, faults_at_rest, whole_lines
from tests.chaos.events import DAMAGE_KINDS, STOP_KINDS, Event, draw
from tests.chaos.start import Start, fill, small_disk

MOST_RANKS = 4
PAUSE = 0.25
"""Seconds that a run stands in the phase of a save that it is aimed at."""

EVENTS_PER_RUN = 10
GRACE = 30.0
"""Seconds from SIGTERM to the end: what torchrun gives."""


@dataclass(frozen=True)
class Layout:
    """How a start splits the run."""

    ranks: int
    overrides: tuple[str, ...] = ()
    """As ``section.key=value``; those that the recipe has are the recipe's own."""


def layouts_of(recipe: Path, overrides: Sequence[str], ranks: int | None = None) -> list[Layout]:
    """The recipe's own layout, on as few ranks as it can have from two on, then others that it can be resumed in."""

    def accepts(layout: Layout) -> Settings | None:
        try:
            return load_recipe(recipe, [*overrides, *layout.overrides], layout.ranks, find_model=find_model)
        except ConfigError:
            return None

    own = None
    for candidate in [ranks] if ranks else [2, 1, *range(3, 65)]:
        own = accepts(Layout(candidate))
        if own is not None:
            break
    if own is None:  # the message of the recipe's own faults
        load_recipe(recipe, list(overrides), ranks or 2, find_model=find_model)
        raise ConfigError(f"{recipe} can be started on no number of ranks up to 64\n  say on how many: --ranks N.")
    layouts = [Layout(candidate)]
    for pp, dp, tp, cp, zero in product((1, 2), (1, 2), (1, 2), (1, 2), (1, 3)):
        settings = (f"parallel.pp={pp}", f"parallel.tp={tp}", f"parallel.cp={cp}", f"optim.zero={zero}")
        layout = Layout(pp * dp * tp * cp, settings)
        is_own = (pp, tp, cp) == (own.parallel.pp, own.parallel.tp, own.parallel.cp) and layout.ranks == candidate
        if layout.ranks <= MOST_RANKS and (zero == 1 or dp > 1) and not is_own and accepts(layout) is not None:
            layouts.append(layout)
    return layouts


@dataclass
class Outcome:
    """What became of an event."""

    event: Event
    run: int
    layout: Layout
    landed: bool
    """Whether the harm was done before the run was over."""
    step: int
    """The last checkpoint's step when it was."""
    seconds: float
    findings: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        return self.event.described() | {
            "run": self.run,
            "layout": [self.layout.ranks, *self.layout.overrides],
            "after_step": self.step,
            "seconds": round(self.seconds, 1),
            "findings": self.findings,
        }


@dataclass
class RunVerdict:
    """A finished run beside the undisturbed one."""

    number: int
    events: int
    saved: int
    """Messages of a checkpoint that was then checked."""
    same_layout: bool
    largest: dict[str, float]
    findings: list[str]


class Campaign:
    """Events of a seed, in runs of a recipe below ``folder``."""

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str],
        seed: int,
        folder: Path,
        say: Callable[[str], None],
        *,
        ranks: int | None = None,
        only: Sequence[str] = (),
        hang_seconds: float = 120.0,
    ) -> None:
        """``overrides``: as ``section.key=value``; ``hang_seconds``: after which processes should have ended."""
        self.recipe, self.seed, self.folder, self.say = recipe, seed, folder, say
        self.only, self.hang_seconds = only, hang_seconds
        self.layouts = layouts_of(recipe, overrides, ranks)
        settings = load_recipe(recipe, list(overrides), self.layouts[0].ranks, find_model=find_model)
        self.every, self.keep = _often_enough(settings)
        self.overrides = dict(one.split("=", 1) for one in overrides) | {
            "checkpoint.every": str(self.every),
            "checkpoint.keep": str(self.keep),
            "run.tensorboard": "false",
        }
        self.steps = settings.train.steps
        self.reference = folder / "undisturbed"
        self.start_seconds = self.step_seconds = 0.0
        self.outcomes: list[Outcome] = []
        self.verdicts: list[RunVerdict] = []
        self.starts = 0
        self.has_disk = False

    def run(self, events: int) -> None:
        """Until so many events have landed."""
        began = time.monotonic()
        with small_disk(self.folder / "disk_try", 2**20) as self.has_disk:
            pass
        if not self.has_disk:
            self.say("no full disks: this user may not mount a small file system here")
        self._run_undisturbed()
        self.say(f"undisturbed: {self.steps} steps in {time.monotonic() - began:.0f} s; {len(self.layouts)} layouts")
        numbers = iter(range(10 * events + 100))
        while (left := events - self._landed()) > 0 and len(self.verdicts) < 4 * events + 4:
            self._run_one(numbers, min(left, EVENTS_PER_RUN))

    @property
    def findings(self) -> list[str]:
        found = [
            f"event {outcome.event.number} ({outcome.event.kind}, {outcome.event.phase}): {text}"
            for outcome in self.outcomes
            for text in outcome.findings
        ]
        return found + [f"run {verdict.number}: {text}" for verdict in self.verdicts for text in verdict.findings]

    def report(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        landed = [outcome for outcome in self.outcomes if outcome.landed]
        return {
            "seed": self.seed,
            "events": len(landed),
            "missed": len(self.outcomes) - len(landed),
            "kinds": dict(Counter(outcome.event.kind for outcome in landed)),
            "phases": dict(Counter(outcome.event.phase for outcome in landed)),
            "under_torchrun": sum(outcome.event.under_torchrun for outcome in landed),
            "runs": len(self.verdicts),
            "runs_bit_equal": sum(verdict.same_layout and not verdict.findings for verdict in self.verdicts),
            "runs_in_several_layouts": sum(not verdict.same_layout for verdict in self.verdicts),
            "largest_difference": {
                name: max((v.largest[name] for v in self.verdicts if not v.same_layout), default=0.0)
                for name in COMPARED
            },
            "saved_messages": sum(verdict.saved for verdict in self.verdicts),
            "findings": self.findings,
            "log": [outcome.described() for outcome in self.outcomes],
        }

    def _landed(self) -> int:
        return sum(outcome.landed for outcome in self.outcomes)

    def _start(self, run: Path, layout: Layout, place: str = "::0", torchrun: bool = False) -> Start:
        self.starts += 1
        settings = self.overrides | dict(one.split("=", 1) for one in layout.overrides) | {"run.dir": str(run)}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        folder = self.folder / "starts" / f"{self.starts:04}"
        return Start(folder, self.recipe, layout.ranks, arguments, place, torchrun=torchrun)

    def _run_undisturbed(self) -> None:
        began = time.monotonic()
        start = self._start(self.reference, self.layouts[0])
        if start.wait(lambda: _starts(self.reference), self.hang_seconds):
            self.start_seconds = time.monotonic() - began
        if not start.wait_for_end(60 * self.hang_seconds) or any(start.exit_codes):
            start.kill()
            raise MegagapError(f"{self.recipe} does not train undisturbed:\n{start.output.strip()}")
        records = whole_lines(self.reference / "metrics.jsonl")
        self.step_seconds = statistics.median(record["step_seconds"] for record in records)

    def _run_one(self, numbers: Iterator[int], events: int) -> None:
        """One run: harmed until it is finished or has had its ``events``, then finished and compared."""
        number = len(self.verdicts)
        disk = self.folder / f"run_{number}"
        size = sum(path.stat().st_size for path in step_folders(self.reference / "checkpoints")[-1].iterdir())
        with small_disk(disk, (self.keep + 4) * size + 2**24) as is_mounted:
            run = disk / "run"
            verdict = self._harm(number, run, numbers, events, has_disk=is_mounted)
            self.verdicts.append(verdict)
            text = "bit-equal" if verdict.same_layout else f"within {max(verdict.largest.values()):.1e}"
            self.say(f"run {number}: {verdict.events} events, " + (text if not verdict.findings else "FINDING"))
            for finding in verdict.findings:
                self.say(f"  {finding}")
            if verdict.findings or any(o.findings for o in self.outcomes if o.run == number):
                shutil.copytree(disk, self.folder / f"found_{number}", dirs_exist_ok=True)
        if not is_mounted:
            shutil.rmtree(disk, ignore_errors=True)

    def _harm(self, number: int, run: Path, numbers: Iterator[int], events: int, *, has_disk: bool) -> RunVerdict:
        layout, used, landed = self.layouts[0], {self.layouts[0]}, 0
        findings: list[str] = []
        with Witness(run, self.keep) as witness:
            while landed < events and not _is_finished(run) and not findings:
                event = draw(self.seed, next(numbers), len(self.layouts), has_disk=has_disk, only=self.only)
                outcome = self._carry_out(event, number, run, layout, witness)
                outcome.findings += [f for f in faults_at_rest(run, witness.damaged) if f not in findings]
                self.outcomes.append(outcome)
                findings += outcome.findings
                landed += outcome.landed
                self._tell(outcome)
                # For the next start only: it is the recipe's own layout that most of a run is made in.
                layout = self.layouts[0 if event.next_layout is None or _is_finished(run) else event.next_layout]
                used.add(layout)
            last = self._finish(run, layout)
        # The events of the last checkpoints before the witness ended; its own findings are the run's.
        found = [*last, *witness.findings]
        same_layout, largest = (
            used == {self.layouts[0]},
            dict.fromkeys(("loss", "grad_norm", "weights", "moments"), 0.0),
        )
        if _is_finished(run):
            faults, largest = differences(run, self.reference, same_layout)
            found += faults
        return RunVerdict(number, landed, witness.saved, same_layout, largest, found)

    def _tell(self, outcome: Outcome) -> None:
        event, layout = outcome.event, outcome.layout
        where = f"{event.phase} {event.nth}" if event.phase != "start-up" else event.phase
        result = "FINDING" if outcome.findings else "survived" if outcome.landed else "missed"
        self.say(
            f"event {event.number}: {event.kind} in {where}, after step {outcome.step}, "
            f"{' '.join((f'{layout.ranks} ranks', *layout.overrides))}{' (torchrun)' * event.under_torchrun}: {result}"
            f", {outcome.seconds:.1f} s"
        )
        for finding in outcome.findings:
            self.say(f"  {finding}")

    def _finish(self, run: Path, layout: Layout) -> list[str]:
        """Start without harm until the run is finished."""
        for _ in range(3):
            if _is_finished(run):
                return []
            start = self._start(run, layout)
            if not start.wait_for_end(10 * self.hang_seconds):
                start.kill()
                return [f"hangs when resumed undisturbed\n{start.output[-2000:]}"]
            if any(start.exit_codes):
                return [f"cannot be resumed: exit codes {start.exit_codes}\n{start.output[-2000:]}"]
        return [] if _is_finished(run) else ["is not finished after three starts"]

    def _carry_out(self, event: Event, number: int, run: Path, layout: Layout, witness: Witness) -> Outcome:
        """Start, wait for the moment, harm, and see how it ends."""
        began, before = time.monotonic(), len(_starts(run))
        is_pause = event.phase not in ("step", "start-up")
        place = f"{event.phase}:{event.nth}:{PAUSE}" if is_pause else "::0"
        start = self._start(run, layout, place, event.under_torchrun)
        rank = int(event.target * layout.ranks)
        if event.phase == "start-up":
            start.wait(lambda: False, min(event.delay / 0.35 * self.start_seconds, self.start_seconds))
            landed = not start.has_ended
        else:
            landed = start.wait(lambda: _is_there(event, start, run, before), self.hang_seconds)
            if landed and is_pause:
                reached = start.reached()
                rank = reached if reached is not None and event.kind == "kill writer" else rank
            if landed:
                start.wait(
                    lambda: False, event.delay if is_pause else event.nth * (self.step_seconds + event.delay / 10)
                )
                landed = not start.has_ended
        outcome = Outcome(event, number, layout, landed, _last_step(run), 0.0)
        if landed:
            outcome.findings += self._do(event, start, run, rank)
        if not start.wait_for_end(self.hang_seconds):
            outcome.findings.append(
                f"processes are left {self.hang_seconds:.0f} s after {event.kind}: {start.left()}, exit codes "
                f"{start.exit_codes}\n{start.output[-2000:]}"
            )
            start.kill()
        outcome.findings += self._judge_end(event, start, run, landed=landed)
        if landed and event.kind in DAMAGE_KINDS:
            self._damage(event, run, witness)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _do(self, event: Event, start: Start, run: Path, rank: int) -> list[str]:
        """The harm itself; what is wrong with how the run takes it."""
        match event.kind:
            case "kill rank" | "kill writer":
                start.signal_rank(rank, signal.SIGKILL)
            case "kill all" | "flip bit" | "truncate":
                start.signal_all(signal.SIGKILL)
            case "kill launcher":
                start.signal_launcher(signal.SIGKILL)
            case "freeze rank, then kill" | "freeze rank, then continue":
                start.signal_rank(rank, signal.SIGSTOP)
                start.wait(lambda: False, 0.2 + event.amount)
                if event.kind.endswith("kill"):
                    start.signal_rank(rank, signal.SIGKILL)
                else:
                    before = len(step_folders(run / "checkpoints")), _last_step(run)
                    start.signal_rank(rank, signal.SIGCONT)
                    goes_on = start.wait(
                        lambda: (
                            (len(step_folders(run / "checkpoints")), _last_step(run)) != before or _is_finished(run)
                        ),
                        self.hang_seconds,
                    )
                    start.signal_all(signal.SIGKILL)
                    if not goes_on and not _is_finished(run):
                        return [f"did not go on after rank {rank} was frozen for a while\n{start.output[-2000:]}"]
            case "stop rank":
                start.signal_rank(rank, signal.SIGTERM)
            case "stop all" | "stop all twice":
                start.signal_all(signal.SIGTERM)
                if event.kind.endswith("twice"):
                    start.wait(lambda: False, 0.05 + 2 * event.amount)
                    start.signal_all(signal.SIGTERM)
            case "stop launcher" | "stop launcher twice":
                start.signal_launcher(signal.SIGTERM)
                if event.kind.endswith("twice"):
                    start.wait(lambda: False, 0.05 + 2 * event.amount)
                    if not start.has_ended:
                        start.signal_launcher(signal.SIGTERM)
            case "full disk":
                ballast = fill(run.parent)
                start.wait(lambda: False, 5.0)
                ballast.unlink()
                start.signal_all(signal.SIGKILL)
            case "file limit":
                size = max(path.stat().st_size for path in step_folders(self.reference / "checkpoints")[-1].iterdir())
                start.limit_files(int(event.amount * size))
                start.wait(lambda: False, 5.0)
                start.signal_all(signal.SIGKILL)
            case _:
                raise AssertionError(event.kind)
        return []

    def _judge_end(self, event: Event, start: Start, run: Path, *, landed: bool) -> list[str]:
        """What is wrong with how the processes ended."""
        codes = start.exit_codes
        findings = []
        if start.has_own_traceback:
            findings.append(f"a traceback of megagap's own\n{start.output[-3000:]}")
        if any(code is not None and code < 0 and code not in (-signal.SIGKILL, -signal.SIGTERM) for code in codes):
            findings.append(f"exit codes {codes}\n{start.output[-2000:]}")
        if not landed and not _is_finished(run):
            findings.append(f"ended by itself before anything was done to it: {codes}\n{start.output[-2000:]}")
        if landed and event.kind in STOP_KINDS and event.phase != "start-up" and not event.kind.endswith("twice"):
            findings += _faults_of_stop(run, codes, start)
        return findings

    def _damage(self, event: Event, run: Path, witness: Witness) -> None:
        """Harm the newest checkpoint, where there is another to go back to."""
        folders = [folder for folder in step_folders(run / "checkpoints") if folder.name not in witness.damaged]
        if len(folders) < 2:
            return
        witness.damaged.add(folders[-1].name)
        files = sorted(folders[-1].iterdir())
        path = files[int(event.target * len(files))]
        content = bytearray(path.read_bytes())
        position = int(event.amount * len(content))
        if event.kind == "truncate":
            del content[position:]
        else:
            content[position] ^= 1 << event.number % 8
        path.write_bytes(content)


def _is_there(event: Event, start: Start, run: Path, starts: int) -> bool:
    """Whether the run is where an event is to harm it. ``starts``: how often it had started before."""
    if event.phase != "step":
        return start.reached() is not None
    checkpoints = 2 if event.kind in DAMAGE_KINDS else 0  # the newest is damaged, and there is another to go back to
    return len(_starts(run)) > starts and len(step_folders(run / "checkpoints")) >= checkpoints


def _faults_of_stop(run: Path, codes: list[int | None], start: Start) -> list[str]:
    """A SIGTERM to a run that trains saves and ends, without the launcher with 0."""
    faults = []
    status = json.loads((run / "status.json").read_text())
    if status["state"] not in ("preempted", "finished"):
        faults.append(f"a stop ended as {status['state']}: {status['message']}\n{start.output[-2000:]}")
    elif (latest := read_latest(run / "checkpoints")) is None or step_of(latest) != status["step"]:
        faults.append(f"stopped at step {status['step']}, but latest is {latest}")
    if not start.under_torchrun and any(codes):
        faults.append(f"exit codes {codes} after a stop\n{start.output[-2000:]}")
    return faults


def _often_enough(settings: Settings) -> tuple[int, int]:
    """``checkpoint.every`` and ``keep`` with which several events fit a run, and old checkpoints are removed in it."""
    every, keep, steps = settings.checkpoint.every, settings.checkpoint.keep, settings.train.steps
    most = max(1, steps // 15)
    return (min(every, most) if every else most), max(2, min(keep or 3, 4))


def _starts(run: Path) -> list[dict[str, Any]]:
    return [event for event in _events(run) if event["event"] == "start"]


def _events(run: Path) -> list[dict[str, Any]]:
    try:
        return whole_lines(run / "events.jsonl")
    except ValueError:  # an incomplete line in the middle, which :class:`Witness` skips
        lines = (run / "events.jsonl").read_text(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def _is_finished(run: Path) -> bool:
    try:
        return bool(json.loads((run / "status.json").read_text())["state"] == "finished")
    except (OSError, ValueError):
        return False


def _last_step(run: Path) -> int:
    folders = step_folders(run / "checkpoints")
    return step_of(folders[-1]) if folders else 0
