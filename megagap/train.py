"""Train a Llama-3 model: ``torchrun --nproc-per-node N -m megagap.train RECIPE.toml [--section.key value ...]``.

One process without torchrun is a run like any other. Reading order: this file, ``training/trainer.py`` (the loop),
``training/step.py`` (one step), then ``parallel/``, ``model/`` and ``optim/``.
"""

if __name__ == "__main__":
    # Before torch is imported: a launcher that is killed in these seconds must not leave this process behind.
    from megagap.process.parent import end_on_interrupt, end_with_parent, hold_notices

    end_with_parent()
    end_on_interrupt()
    hold_notices()

import argparse
import logging
import os
import sys
from pathlib import Path

from megagap.checkpoint import find_model
from megagap.config import describe_settings, load_recipe, parse_overrides
from megagap.errors import run_tool
from megagap.observe.logs import log_to, log_to_console
from megagap.observe.run_directory import RunDirectory
from megagap.observe.watchdog import clear, watching
from megagap.ops.arithmetic import deterministic_kernels
from megagap.parallel.communicator import DistributedCommunicator
from megagap.process import launch
from megagap.process.agreement import require_agreement
from megagap.process.rendezvous import Process
from megagap.terminal.programs import CalledAs
from megagap.training.mesh import make_mesh
from megagap.training.trainer import train

EXAMPLES = """\
examples:
  megagap train examples/recipes/code.toml --train.steps 100 --optim.betas '[0.9, 0.95]'
  torchrun --nproc-per-node 8 -m megagap train examples/recipes/quickstart.toml --parallel.tp 2
  megagap train examples/recipes/llama3-70b-1024.toml --dry-run --world-size 1024
"""

log = logging.getLogger("megagap.train")  # by name: run as a program, this module is called __main__


def main(arguments: list[str], called_as: CalledAs = CalledAs.TOOL) -> None:
    """Train; ends the process. ``called_as``: how it was started, for its help."""
    options, overrides = parse_arguments(arguments, called_as)
    recipe: Path = options.recipe
    if options.dry_run:
        certify(options, overrides)
        return
    process = Process.from_environment()
    with launch.orderly_exit(process) as ending:
        log_to_console(logging.WARNING)
        settings = load_recipe(recipe, parse_overrides(overrides), process.world_size, find_model=find_model)
        device = launch.start(process, launch.group_timeout(settings.run.hang_seconds))
        require_agreement(settings, process)
        mesh = make_mesh(settings, process, device)
        run = RunDirectory(Path(settings.run.dir), is_writer=process.rank == 0)
        communicator = DistributedCommunicator(mesh)
        if communicator.broadcast(run.is_archived(settings.train.steps)):
            log.warning("run %s is finished, and its directory is read-only: nothing is left to do", run.path)
            return
        ending.run, ending.load = run, settings.checkpoint.load
        run.open(settings.run.tensorboard)
        clear(run)
        run.require_shared(communicator)
        log_to(run.logs, process.rank)
        log.info("run directory %s", run.path)
        for note in settings.notes:
            log.info("%s", note)
        watched = watching(run, mesh, settings.run.hang_seconds, ending.hung)
        with watched as ending.watchdog, deterministic_kernels(settings.train.deterministic):
            train(settings, mesh, run)
            communicator.broadcast(communicator.gather(None))  # each is watched, and says so, until all have ended
        run.close()


def certify(options: argparse.Namespace, overrides: list[str]) -> None:
    """Prove the layout instead of training; under torchrun on rank 0 only."""
    from megagap.planning.dry_run import dry_run, world_size_of  # which a run does not need

    if os.environ.get("RANK", "0").strip() == "0":
        world_size = options.world_size or world_size_of(os.environ)
        dry_run(options.recipe, parse_overrides(overrides), world_size, options.device, options.json)


def parse_arguments(arguments: list[str], called_as: CalledAs = CalledAs.TOOL) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog=called_as.program("train"),
        usage="%(prog)s [-h] RECIPE [--section.key value ...] [--dry-run [--world-size N] [--device NAME] [--json]]",
        description="Train a Llama-3 model from a recipe; more than one process under torchrun. Rerun to resume. "
        "The first Ctrl-C (or SIGTERM) saves and stops, a second one stops at once.",
        epilog=called_as.spell(EXAMPLES)
        + "\nsettings, which a recipe gives as key = value below its [section]:\n"
        + describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, help="TOML file with the settings that differ from the defaults")
    dry = parser.add_argument_group("instead of training (docs/parallelism.md of megagap's repository)")
    dry.add_argument("--dry-run", action="store_true", help="prove the layout and print what it takes; writes nothing")
    dry.add_argument("--world-size", type=int, metavar="N", help="processes (WORLD_SIZE, else 1)")
    dry.add_argument(
        "--device", metavar="NAME", help="device whose memory must suffice (told for an h100, not required)"
    )
    dry.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    if arguments and arguments[0].startswith("--") and arguments[0] not in ("--help",):
        parser.error(f"the recipe comes first, then the settings ({arguments[0]} …)")
    known, rest = parser.parse_known_args(arguments)
    if not known.dry_run:
        for name in ("world_size", "device", "json"):
            if getattr(known, name):
                parser.error(f"--{name.replace('_', '-')} applies to --dry-run only")
    if known.world_size is not None and known.world_size < 1:
        parser.error("--world-size must be at least 1")
    return known, rest


if __name__ == "__main__":
    run_tool(lambda: main(sys.argv[1:]))
