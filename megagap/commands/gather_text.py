"""Gather real text on this machine for a first training run: one JSON-lines file per language.

code is Python's own standard library. English and French are manual pages, Debian's handbook and reference, and the
documentation of Python and LilyPond, from Debian packages that are downloaded and unpacked without being installed.
Licences vary by document: use it, but do not redistribute it.
"""

import argparse
from pathlib import Path

from megagap.commands.parser import make_parser
from megagap.errors import DataError
from megagap.gather import LANGUAGES, gather
from megagap.terminal.programs import CalledAs

EXAMPLES = """
examples:
  megagap gather-text --output runs/quickstart/corpus
  megagap gather-text --output corpus --languages fr,code --megabytes 5
      at most 5 MB of each; downloads stay in corpus/downloads, and a second call needs no network
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("gather-text", called_as, __doc__, EXAMPLES)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for LANGUAGE.jsonl")
    parser.add_argument(
        "--languages",
        type=languages,
        default=LANGUAGES,
        metavar="L,…",
        help=f"of {', '.join(LANGUAGES)} (default: all)",
    )
    parser.add_argument(
        "--megabytes",
        type=megabytes,
        default=float("inf"),
        metavar="N",
        help="at most this many megabytes per language (default: all)",
    )
    given = parser.parse_args(arguments)
    written = gather(given.output, given.languages, given.megabytes * 1e6)
    if not written:
        raise DataError(f"no text was found for {', '.join(given.languages)}\n  give your own files instead.")


def languages(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in chosen if name not in LANGUAGES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; possible: {', '.join(LANGUAGES)}")
    return chosen


def megabytes(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return number
