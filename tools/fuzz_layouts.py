"""Compare random layouts of random small models with one process, and reduce what differs to a recipe.

Every case is a model, a batch and a layout that the rules of the settings accept, on real processes (gloo): all
gradients of one step in float64, then a few steps of training. docs/parity.md says what is compared, and how closely.
"""

import argparse
import json
import math
import os
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases are those of the tests, which are not installed

from megagap.checkpoint import find_model
from megagap.config import load_recipe
from megagap.errors import ConfigError, counted, run_tool
from tests.parity.comparison import Comparison
from tests.parity.fuzz import Fuzzer, Outcome, coverage, described, save
from tests.workers import Workers

EXAMPLES = """examples:
  python tools/fuzz_layouts.py --seconds 3600 --seed 1
  python tools/fuzz_layouts.py --seed 1 --case 17
  python tools/fuzz_layouts.py --recipe runs/fuzz/seed_1_case_17/recipe.toml --ranks 4

Exit code 1: something was found. Its reduced recipe is written below --output, with the command that shows it again.
"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = Workers()
    try:
        comparison = Comparison(workers, seconds=options.hang_seconds)
        found = replay(options, comparison) if options.recipe else fuzz(options, comparison)
    finally:
        workers.close()
    sys.exit(1 if found else 0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="begin no case after so many (60)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="determines all cases (1)")
    parser.add_argument("--case", type=int, metavar="K", help="only the case with this number")
    parser.add_argument("--recipe", type=Path, help="compare this recipe instead; it needs its data and few steps")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes for --recipe")
    parser.add_argument(
        "--reduce-seconds", type=float, default=300.0, metavar="S", help="for reducing a finding (300); 0: leave it"
    )
    parser.add_argument(
        "--hang-seconds", type=float, default=300.0, metavar="S", help="without an answer: a layout hangs (300)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), help="folder for findings (runs/fuzz)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    times = (options.seconds, options.reduce_seconds, options.hang_seconds)
    if not all(0 <= value < math.inf for value in times) or (options.case or 0) < 0:
        parser.error("--seconds, --reduce-seconds, --hang-seconds and --case must be at least 0")
    if (options.recipe is None) != (options.ranks is None) or (options.ranks is not None and options.ranks < 1):
        parser.error("--recipe and --ranks go together; --ranks is at least 1")
    if options.recipe and options.case is not None:
        parser.error("--case is a number of the fuzzer's own cases; leave it out with --recipe")
    return options


def replay(options: argparse.Namespace, comparison: Comparison) -> bool:
    """Whether anything is wrong with the recipe given."""
    settings = load_recipe(options.recipe, world_size=options.ranks, find_model=find_model)
    if settings.data.phases or not settings.train.steps or settings.checkpoint.load not in ("", "latest"):
        raise ConfigError(f"{options.recipe} is compared from scratch over train.steps on data.sources\n  set those")
    finding = comparison.check(options.recipe, options.ranks)
    if options.json:
        print(json.dumps({"finding": None if finding is None else {"kind": finding.kind, "text": finding.text}}))
    else:
        print("equal to one process" if finding is None else f"{finding.kind}: {finding.text}")
    return finding is not None


def fuzz(options: argparse.Namespace, comparison: Comparison) -> bool:
    """Whether anything was found."""
    fuzzer, outcomes, findings = Fuzzer(comparison, options.seed), list[Outcome](), []
    numbers = iter([options.case]) if options.case is not None else count()
    for outcome in fuzzer.outcomes(options.seconds, numbers):
        outcomes.append(outcome)
        result = outcome.finding.kind.upper() if outcome.finding else "equal"
        say(options, f"seed {options.seed} case {outcome.number}: {result} in {outcome.seconds:.1f} s, ", outcome.case)
        if outcome.finding is None:
            continue
        say(options, outcome.finding.text)
        case = fuzzer.reduce(outcome, options.reduce_seconds, lambda simpler: say(options, "  still: ", simpler))
        findings.append(save(outcome, case, options.output / f"seed_{options.seed}_case_{outcome.number}"))
        say(options, f"reduced: {described(case)}\n  {findings[-1]['command']}")
    if options.json:
        report = {"seed": options.seed, "cases": len(outcomes), "refused": fuzzer.refused, "findings": findings}
        print(json.dumps(report | {"coverage": coverage(outcomes)}))
    else:
        print(
            f"{counted(len(outcomes), 'case')} compared, {fuzzer.refused:,} refused by the rules, "
            f"{counted(len(findings), 'finding')}"
        )
    return bool(findings)


def say(options: argparse.Namespace, text: str, case: dict[str, object] | None = None) -> None:
    """A line of progress, on standard error where standard output is JSON."""
    print(text + (described(case) if case else ""), file=sys.stderr if options.json else sys.stdout, flush=True)


if __name__ == "__main__":
    run_tool(main)
