"""Random cases, each compared with one process; what is found is reduced to a small recipe."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from megagap.config import load_recipe
from megagap.errors import ConfigError
from tests.parity.cases import DIMENSIONS, MOST_RANKS, Case, is_valid, ranks_of, reduced, write_case
from tests.parity.comparison import Comparison, Finding

TRIES = 100_000


@dataclass(frozen=True)
class Outcome:
    """One case and what came of it."""

    number: int
    case: Case
    finding: Finding | None
    seconds: float


class Fuzzer:
    """``seed`` and the number of a case determine it, whatever came before."""

    def __init__(self, comparison: Comparison, seed: int) -> None:
        self.comparison, self.seed = comparison, seed
        self.refused = 0
        """Drawn cases that the rules refused."""

    def outcomes(self, seconds: float, numbers: Iterator[int]) -> Iterator[Outcome]:
        """Cases one after another, until the time is over; at least one."""
        start = time.monotonic()
        for number in numbers:
            yield self.run(number)
            if time.monotonic() - start >= seconds:
                return

    def run(self, number: int) -> Outcome:
        """Draw the case with this number and compare it."""
        start, random = time.monotonic(), Random(f"{self.seed}/{number}")
        for _ in range(TRIES):
            case = {dimension.name: dimension.draw(random) for dimension in DIMENSIONS}
            if ranks_of(case) > MOST_RANKS:
                continue
            finding = self._refuse(case, check_recipe=random.random() < 0.02)
            if finding is not None:
                return Outcome(number, case, finding, time.monotonic() - start)
            if is_valid(case):
                return Outcome(number, case, self.finding(case), time.monotonic() - start)
            self.refused += 1
        raise AssertionError("the rules refuse every case")

    def _refuse(self, case: Case, check_recipe: bool) -> Finding | None:
        """A finding where the settings of a case end in a traceback instead of being accepted or refused."""
        valid = False
        try:
            valid = is_valid(case)
            if valid or check_recipe:
                with TemporaryDirectory() as folder:
                    load_recipe(write_case(Path(folder), case), world_size=ranks_of(case))
        except ConfigError as error:
            return Finding("refusal", f"the rules accept what the loader refuses: {error}") if valid else None
        except Exception as error:
            return Finding("crash", f"loading the recipe: {type(error).__name__}: {error}")
        return None

    def finding(self, case: Case, trains: bool = True) -> Finding | None:
        """What is wrong with a case, if anything."""
        if (refused := self._refuse(case, check_recipe=True)) is not None:
            return refused
        with TemporaryDirectory() as folder:
            return self.comparison.check(write_case(Path(folder), case), ranks_of(case), trains)

    def reduce(self, outcome: Outcome, seconds: float, report: Callable[[Case], None]) -> Case:
        """A simpler case with a finding of the same kind, as simple as can be found in so many seconds."""
        assert outcome.finding is not None
        kind, deadline = outcome.finding.kind, time.monotonic() + seconds

        def fails(case: Case) -> bool:
            if time.monotonic() > deadline:
                return False
            found = self.finding(case, trains=kind != "gradients")
            if found is None or found.kind != kind:
                return False
            report(case)
            return True

        return reduced(outcome.case, fails)


def described(case: Case) -> str:
    """The values that are not the simplest, for a line of the terminal."""
    simplest = {dimension.name: dimension.values[0] for dimension in DIMENSIONS}
    shown = [f"{name.rpartition('.')[2]}={value}" for name, value in case.items() if value != simplest[name]]
    return " ".join([f"{ranks_of(case)} ranks:", *shown])


def coverage(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """How many cases had each value of each dimension."""
    counts = {dimension.name: Counter[str]() for dimension in DIMENSIONS}
    for outcome in outcomes:
        for name, value in outcome.case.items():
            counts[name][str(value)] += 1
    return {name: dict(found) for name, found in counts.items()}


def save(outcome: Outcome, case: Case, folder: Path) -> dict[str, Any]:
    """Write a finding's recipe with its data and what to type to see it again; the same as a record."""
    assert outcome.finding is not None
    recipe = write_case(folder, case)
    command = f"python tools/fuzz_layouts.py --recipe {recipe} --ranks {ranks_of(case)}"
    text = f"{outcome.finding.kind}: {outcome.finding.text}\n\n{described(case)}\n\n{command}\n"
    (folder / "finding.txt").write_text(text)
    return {
        "case": outcome.number,
        "kind": outcome.finding.kind,
        "text": outcome.finding.text,
        "ranks": ranks_of(case),
        "settings": case,
        "recipe": str(recipe),
        "command": command,
    }
