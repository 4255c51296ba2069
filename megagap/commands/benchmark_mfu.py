"""Time a recipe's training step on this machine: tokens per second, TFLOP/s, and the share of the hardware's peak."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from megagap.benchmark.step import benchmark, first_step
from megagap.benchmark.sweep import DONE, Sweep, notes, parse_sweep, run_sweep, table
from megagap.checkpoint import find_model
from megagap.commands.parser import make_parser
from megagap.config import load_recipe, parse_overrides
from megagap.errors import ConfigError
from megagap.files import require_writable, write_text, writing
from megagap.observe.logs import log_to_console
from megagap.ops.arithmetic import deterministic_kernels
from megagap.process import launch
from megagap.process.parent import UNDER_TORCHRUN
from megagap.process.rendezvous import Process
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs
from megagap.training.mesh import make_mesh

EXAMPLES = """examples:
  megagap benchmark-mfu examples/recipes/code.toml --steps 20
  megagap benchmark-mfu examples/recipes/code.toml --train.precision bf16-mixed --output runs/benchmark
  torchrun --nproc-per-node 8 -m megagap benchmark-mfu examples/recipes/code.toml --parallel.tp 2
  megagap benchmark-mfu examples/recipes/code.toml --processes 4 --sweep parallel.tp=1,2 parallel.pp=1,2

A timed step does all that the trainer does in one: read the batch, update, record. Where the recipe's data files do not
exist, tokens are random. Of a recipe with phases the first is timed, or --phase NAME.

MFU (model FLOPs utilisation) is given by two formulas, counting the full attention matrix or its causal half, and of
two peaks: that of the data sheet, and that of a matrix product measured here. The latter is measured before, between
and after the timed steps. Its median counts, as of the steps; where it varies, other programs used the machine too.

--sweep measures every combination of the values in processes of its own, N each (--processes), and ranks them in one
table and in sweep.json. A combination that is refused, runs out of memory or crashes is recorded with its reason.
Rerun the command to resume: what failed or is missing is measured, results for the same settings, versions and
hardware are kept.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("benchmark-mfu", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="TOML recipe; further --section.key value override it")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts (3)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (10)")
    parser.add_argument("--phase", metavar="NAME", help="phase of the recipe to time (the first)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="profile N more steps, on a GPU (0)")
    parser.add_argument("--output", type=Path, help="folder for benchmark.json; of a sweep (runs/RECIPE_sweep)")
    several = parser.add_argument_group("several layouts")
    several.add_argument(
        "--sweep", nargs="+", action="extend", metavar="KEY=V1,V2", help="settings and the values to try of each"
    )
    several.add_argument("--processes", type=int, metavar="N", help="processes of each combination (1)")
    options, rest = parser.parse_known_args(arguments)
    if options.warmup < 0 or options.steps < 1 or options.profile < 0:
        parser.error("--warmup and --profile must be at least 0, --steps at least 1")
    if options.processes is not None and (options.processes < 1 or not options.sweep):
        parser.error("--processes N, at least 1, goes with --sweep; without, start with torchrun --nproc-per-node N")
    if options.sweep and options.profile:
        parser.error("--profile applies to one layout only, not to --sweep")
    if options.sweep:
        sweep_layouts(options, rest, called_as)
    else:
        time_one_layout(options, rest)


def sweep_layouts(options: argparse.Namespace, rest: list[str], called_as: CalledAs) -> None:
    """Raises :class:`ConfigError` if no combination could be measured."""
    if UNDER_TORCHRUN in os.environ or Process.from_environment().world_size > 1:
        raise ConfigError(
            "--sweep starts the processes of each combination by itself\n"
            f"  start it without torchrun, once: {called_as.program('benchmark-mfu')} … --processes N --sweep …"
        )
    values, overrides = parse_sweep(options.sweep), parse_overrides(rest)
    for name in values:
        if any(override.startswith(f"{name}=") for override in overrides):
            raise ConfigError(f"{name} is given by --sweep and by --{name}: keep one of them")
    output = options.output or Path("runs") / f"{options.recipe.stem}_sweep"
    processes = options.processes or 1
    sweep = Sweep(options.recipe, overrides, values, processes, options.warmup, options.steps, options.phase, output)
    outcomes = run_sweep(sweep)
    console = Console()
    console.print(table(sweep, outcomes))
    for line in notes(outcomes):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    print(f"saved {output / 'sweep.json'}")
    if not any(outcome.status == DONE for outcome in outcomes):
        raise ConfigError("--sweep: no combination could be measured; the reasons are above")


def time_one_layout(options: argparse.Namespace, rest: list[str]) -> None:
    process = Process.from_environment()
    with launch.orderly_exit(process):
        log_to_console(logging.WARNING)
        settings = load_recipe(
            options.recipe, parse_overrides(rest), process.world_size, needs_data=False, find_model=find_model
        )
        first = first_step(settings, options.phase)
        if options.output and process.rank == 0:
            require_writable(options.output / "benchmark.json")  # before spending time
        mesh = make_mesh(settings, process, launch.start(process))
        with deterministic_kernels(settings.train.deterministic):
            report = benchmark(settings, mesh, first, options.warmup, options.steps, options.profile)
        if process.rank == 0:
            if options.profile and report.profile is None:
                print("note: --profile lists the kernels of a GPU; there is none here", file=sys.stderr)
            if (warning := report.warning()) is not None:
                print(f"warning: {warning}", file=sys.stderr)
            console = Console()
            console.print(report.table())
            if report.profile is not None:
                console.print(report.profile.table())
            if options.output:
                file = options.output / "benchmark.json"
                with writing(file):
                    write_text(file, json.dumps(report.as_dict(), indent=2) + "\n")
                print(f"saved {file}")
