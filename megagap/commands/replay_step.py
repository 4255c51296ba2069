"""Run a step of a run again and say whether it is bit for bit what the run recorded: a bad batch, or a bad machine?"""

import argparse
import json
import logging
from pathlib import Path

from megagap.commands.parser import make_parser
from megagap.observe.logs import log_to_console
from megagap.observe.run_directory import RunDirectory
from megagap.ops.arithmetic import deterministic_kernels
from megagap.process import launch
from megagap.process.rendezvous import Process
from megagap.replay import Replay, replay, settings_of_run
from megagap.terminal.arguments import positive
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs
from megagap.training.mesh import make_mesh

EXAMPLES = """examples:
  megagap replay-step runs/example/run --step 25
  torchrun --nproc-per-node 8 -m megagap replay-step runs/large --step 12345 --json

Steps are made from the run's newest checkpoint before N on, in the layout that made them, with as many processes; the
run is left as it is. Loss and gradient norm are compared and, where the run hashed its gradients (guard.hash_every,
guard.replay_every), every bit of them. Exit code 0 if all is equal, else 2. On GPUs steps repeat bit for bit with
train.deterministic only. See docs/running.md.

--json prints one line: {"step": 25, "start": "…/step_00000020", "equal": true, "first_difference": null,
"numbers": {"loss": {"recorded": 3.1, "replayed": 3.1, "equal": true}, …}, "notes": []}
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("replay-step", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--step", type=positive, required=True, metavar="N", help="the step to run again, from 1")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table, see below")
    options = parser.parse_args(arguments)
    process = Process.from_environment()
    with launch.orderly_exit(process):
        log_to_console(logging.WARNING)
        settings = settings_of_run(options.run, options.step, process.world_size)
        mesh = make_mesh(settings, process, launch.start(process))
        with deterministic_kernels(settings.train.deterministic):
            found = replay(settings, mesh, RunDirectory(options.run, is_writer=False), options.step)
        if process.rank == 0:
            print_replay(found, options)
        found.require_equal()


def print_replay(found: Replay, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(found.as_dict()))
        return
    Console().print(found.table())
    if found.is_equal:
        print(found.verdict())
