"""Harm runs of a recipe at random moments, resume each with the same command, and compare it with an undisturbed one.

Processes are killed, frozen and stopped, the disk is full, checkpoints are damaged, the next start has another layout;
by preference in the middle of a save. docs/chaos.md says what is done, and what must hold.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what harms is beside the tests, which are not installed

from megagap.config import parse_overrides
from megagap.errors import counted, run_tool
from tests.chaos.campaign import Campaign
from tests.chaos.events import DISK_KINDS, LAUNCHER_KINDS, RANK_KINDS

KINDS = (*RANK_KINDS, *LAUNCHER_KINDS, *DISK_KINDS)

EXAMPLES = """examples:
  python tools/chaos.py RECIPE.toml --kills 200 --seed 1
  python tools/chaos.py RECIPE.toml --kills 20 --only 'kill writer' 'full disk' --checkpoint.every 2

Exit code 1: something was found. What the runs left is kept below --output then.
"""


def main(arguments: list[str] | None = None) -> None:
    options, overrides = parse(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megagap-chaos-") if options.output is None else nullcontext() as scratch:
        campaign = Campaign(
            options.recipe,
            overrides,
            options.seed,
            Path(scratch or options.output).absolute(),
            lambda text: print(text, file=sys.stderr if options.json else sys.stdout, flush=True),
            ranks=options.ranks,
            only=options.only,
            hang_seconds=options.hang_seconds,
        )
        campaign.run(options.kills)
    report = campaign.report() | {"recipe": str(options.recipe), "seconds": round(time.monotonic() - began, 1)}
    if options.json:
        print(json.dumps(report))
    else:
        print(
            f"{counted(report['events'], 'event')} in {counted(report['runs'], 'run')}, {report['seconds']:.0f} s: "
            f"{report['saved_messages']:,} messages of a checkpoint checked, "
            f"{counted(len(campaign.findings), 'finding')}"
        )
    sys.exit(1 if campaign.findings else 0)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] RECIPE [--section.key value ...] [options]",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="TOML file of a small run: of seconds, with all its data")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="events (20)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="determines all events (1)")
    parser.add_argument("--only", nargs="+", default=[], choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes (as few as the recipe allows, from two on)")
    parser.add_argument(
        "--hang-seconds", type=float, default=120.0, metavar="S", help="processes that take longer to end hang (120)"
    )
    parser.add_argument("--output", type=Path, help="folder to keep (a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options, rest = parser.parse_known_args(arguments)
    if options.kills < 1 or (options.ranks or 1) < 1 or not 0 < options.hang_seconds < float("inf"):
        parser.error("--kills, --ranks and --hang-seconds must be above 0")
    return options, parse_overrides(rest)


if __name__ == "__main__":
    run_tool(main)
