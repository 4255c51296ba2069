"""The argument parser of a subcommand. Imports nothing heavy: ``--help`` should be quick."""

import argparse
from typing import Any

from megagap.terminal.programs import CalledAs


def make_parser(
    subcommand: str, called_as: CalledAs, description: str | None, examples: str, **options: Any
) -> argparse.ArgumentParser:
    """A parser whose help names the program as it was called. ``options``: argparse's own."""
    return argparse.ArgumentParser(
        prog=called_as.program(subcommand),
        description=description,
        epilog=called_as.spell(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
