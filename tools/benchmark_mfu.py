"""Time a recipe's training step on this machine: tokens a second, TFLOP/s, and the share of the hardware's peak."""

if __name__ == "__main__":
    # Before torch is imported: a launcher that is killed in these seconds must not leave us behind.
    from megagap.training.parent import end_with_parent

    end_with_parent()

import argparse
import json
import logging
import sys
from pathlib import Path

from rich.console import Console

from megagap.benchmark import benchmark
from megagap.checkpoint import find_model
from megagap.config import load_recipe, parse_overrides
from megagap.errors import run_tool
from megagap.files import require_writable, write_text, writing
from megagap.observe.run_directory import log_to_console
from megagap.train import make_mesh
from megagap.training import launch
from megagap.training.rendezvous import Process

EXAMPLES = """examples:
  python tools/benchmark_mfu.py examples/recipes/code.toml --steps 20
  python tools/benchmark_mfu.py examples/recipes/code.toml --train.precision bf16-mixed --output runs/benchmark
  torchrun --nproc-per-node 8 tools/benchmark_mfu.py examples/recipes/code.toml --parallel.tp 2

A step is all that the trainer does at one: read the batch, update, record. Where the recipe's data files do not exist,
tokens are random. MFU (model FLOPs utilisation) is given by two formulas,
counting the whole attention square or its causal half, of the data sheet's peak and of a matrix product measured here.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path, help="TOML recipe; further --section.key value override it")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts (3)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (10)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="profile N more steps, on a GPU (0)")
    parser.add_argument("--output", type=Path, help="folder for benchmark.json")
    options, rest = parser.parse_known_args(arguments)
    if options.warmup < 0 or options.steps < 1 or options.profile < 0:
        parser.error("--warmup and --profile must be at least 0, --steps at least 1")

    process = Process.from_environment()
    with launch.orderly_exit(process):
        log_to_console(logging.WARNING)
        settings = load_recipe(
            options.recipe, parse_overrides(rest), process.world_size, needs_data=False, find_model=find_model
        )
        if options.output and process.rank == 0:
            require_writable(options.output / "benchmark.json")  # before the time is spent
        mesh = make_mesh(settings, process, launch.start(process))
        report = benchmark(settings, mesh, options.warmup, options.steps, options.profile)
        if options.profile and report.profile is None:
            print("note: --profile lists the kernels of a GPU; there is none here", file=sys.stderr)
        if process.rank == 0:
            Console().print(report.table())
            if report.profile is not None:
                Console().print(report.profile.table())
            if options.output:
                file = options.output / "benchmark.json"
                with writing(file):
                    write_text(file, json.dumps(report.as_dict(), indent=2) + "\n")
                print(f"saved {file}")


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
