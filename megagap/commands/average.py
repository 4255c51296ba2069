"""Average the weights of several checkpoints into one."""

import argparse
from pathlib import Path

from megagap.checkpoint import resolve_checkpoint
from megagap.checkpoint.average import average_checkpoints
from megagap.commands.convert import progress_bar
from megagap.commands.parser import make_parser
from megagap.errors import counted
from megagap.terminal.programs import CalledAs

EXAMPLES = """
examples:
  megagap average runs/cooldown-a runs/cooldown-b --output runs/average
      the latest checkpoints of two runs; megagap convert to-hf --checkpoint runs/average exports the result
  megagap average runs/r/checkpoints/step_0000{0800,0900,1000} --output runs/average --weights 1 2 3

The result holds weights only. To train on from it: checkpoint.load = "runs/average", checkpoint.load_mode = "model".
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("average", called_as, __doc__, EXAMPLES)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="a run stands for its latest")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new or empty folder")
    parser.add_argument(
        "--weights", nargs="+", type=_number, metavar="W", help="one per checkpoint, relative to their sum (all alike)"
    )
    given = parser.parse_args(arguments)
    checkpoints = [resolve_checkpoint(path) for path in given.checkpoints]
    with progress_bar("average") as progress:
        result = average_checkpoints(checkpoints, given.output, given.weights, progress=progress)
    for folder, share in zip(checkpoints, result.shares, strict=True):
        print(f"{share:7.2%}  {folder}")
    print(f"{given.output}: {counted(result.parameters, 'parameter')}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
