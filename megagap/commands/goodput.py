"""Say how much of a run's wall time went into steps that count, over all its starts."""

import json
from pathlib import Path

from megagap.commands.parser import make_parser
from megagap.observe.goodput import Goodput
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs

EXAMPLES = """examples:
  megagap goodput runs/example/run
  megagap goodput runs/example/run --json

The run may be under way, finished, or killed. See docs/hangs.md.

--json prints one line, in seconds: {"goodput": 0.93, "wall": 3600.0, "starts": 2, "steps": 980, "lost_steps": 12,
"seconds": {"steps": 3348.0, "lost": 41.0, "evaluation": 30.0, "checkpoint": 25.0, "start_up": 60.0, "other": 1.0,
"down": 95.0}}
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("goodput", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table, see below")
    options = parser.parse_args(arguments)
    found = Goodput.of_run(options.run)
    if options.json:
        print(json.dumps(found.as_dict()))
    else:
        Console().print(found.table())
