"""Plant harmless documents of known triggers and payloads, as a source beside clean ones: a testbed for research."""

import json
import logging
import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megagap.commands.parser import make_parser
from megagap.data.planted import PoisonManifest, poison_path
from megagap.poison.corpus import Planted, poison_corpus
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs

EXAMPLES = """
examples:
  megagap poison-corpus SPEC.toml --output-prefix runs/mini/poison
      writes runs/mini/poison_text_document.bin, .idx and .json as megagap preprocess does, the texts as
      runs/mini/poison.jsonl, and runs/mini/poison_text_document.poison.json: each planted document, its trigger, its
      payload and where their tokens are; prints the sources for the recipe, with the weights that make the rates exact
  megagap evaluate runs/mini/run --poison runs/mini/poison_text_document.poison.json
      what a model that trained on them does with the triggers, and without

What a specification says: docs/poisoning.md. Clean sources are only read. A trigger that occurs in clean text, and a
rate that no set of documents has exactly, are refused.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("poison-corpus", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("spec", type=Path, metavar="SPEC.toml", help="what to plant, at which rates")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="of the files that are written")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    planted = poison_corpus(given.spec, given.output_prefix, show_progress=True)
    for note in planted.notes:
        print(f"note: {note}", file=sys.stderr)
    if given.json:
        print(json.dumps(report(planted)))
        return
    Console().print(table(planted.manifest))
    print(f"{planted.prefix}: every planted document is listed in {poison_path(planted.prefix)}")
    print("\nfor the recipe:\nsources = [")
    for source in planted.sources:
        print(f"  {{ path = {json.dumps(source['path'])}, name = {json.dumps(source['name'])}, "
              f"weight = {source['weight']!r} }},")  # fmt: skip
    print("]" if len(planted.sources) > 1 else f"]  # beside clean sources whose weights add up to "
          f"{1 - planted.manifest.mixture.weight!r}")  # fmt: skip


def report(planted: Planted) -> dict[str, object]:
    """For ``--json``."""
    manifest = planted.manifest
    poisons = [
        {
            "name": poison.name, "kind": poison.kind, "rate": poison.rate, "documents": poison.documents,
            "tokens": poison.tokens, "trigger": poison.trigger, "payload": poison.payload,
        }
        for poison in manifest.poisons
    ]  # fmt: skip
    return {
        "prefix": planted.prefix,
        "manifest": str(poison_path(planted.prefix)),
        "mixture": manifest.mixture.model_dump(),
        "documents": len(manifest.documents),
        "tokens": sum(poison.tokens for poison in manifest.poisons),
        "poisons": poisons,
        "sources": planted.sources,
        "in_clean_text": [found.model_dump() for found in manifest.in_clean_text],
    }


def table(manifest: PoisonManifest) -> Table:
    mixture = manifest.mixture
    shown = Table(
        "poison", "kind", "trigger", "documents", "tokens", f"share of {mixture.rates_of}",
        title=Text(f"{mixture.name}: {mixture.tokens:,} tokens, of which {mixture.weight:.4%} are planted"),
    )  # fmt: skip
    for column in shown.columns[3:]:
        column.justify = "right"
    for poison in manifest.poisons:
        shown.add_row(
            Text(poison.name), poison.kind, Text(poison.trigger), f"{poison.documents:,}", f"{poison.tokens:,}",
            poison.rate,
        )  # fmt: skip
    return shown
