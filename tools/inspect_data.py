"""Show what a token file holds, what a training step reads, or what a whole run will read."""

import argparse
import json
import logging
import sys

from megagap.console import Console
from megagap.data.agreement import Ids, differing
from megagap.data.indexed import IndexedDataset
from megagap.data.inspect import (
    dataset_table,
    documents_table,
    manifest_table,
    samples_json,
    samples_table,
    step_samples,
)
from megagap.data.manifest import read_manifest
from megagap.data.plan import draw_plan, plan, plan_table
from megagap.data.tokenizer import load_tokenizer
from megagap.errors import ConfigError, run_tool

EXAMPLES = """
examples:
  python tools/inspect_data.py runs/data/fr_text_document --documents 5 --tokenizer runs/data/tokenizer
  python tools/inspect_data.py runs/data/fr_text_document --verify
  python tools/inspect_data.py examples/recipes/code.toml --train.seed 7 --step 100 --json
  python tools/inspect_data.py examples/recipes/code.toml --plan --output plan.png

--step N --json prints one line: [{"sample": 0, "source": "fr", "documents": [12, 13], "tokens": [...]}, ...]
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s PREFIX [--documents N] [--tokenizer SPEC] [--verify]\n"
        "       %(prog)s RECIPE.toml [--section.key value ...] --step N [--json]\n"
        "       %(prog)s RECIPE.toml [--section.key value ...] --plan [--output PNG] [--json]",
    )
    parser.add_argument("target", metavar="PREFIX | RECIPE.toml", help="a .bin/.idx pair, or a recipe")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--tokenizer", default="", metavar="SPEC", help="show text too; a recipe names its own")
    parser.add_argument("--verify", action="store_true", help="check every entry, and with --tokenizer every token")
    parser.add_argument("--step", type=int, metavar="N", help="training step, from 1")
    parser.add_argument("--plan", action="store_true", help="tokens, epochs and shares by phase and source")
    parser.add_argument("--output", default="", metavar="PNG", help="draw the plan too")
    parser.add_argument("--json", action="store_true", help="print the step or plan as one line of JSON")
    given, overrides = parser.parse_known_args(argv)
    if given.documents < 0:
        parser.error("--documents must be at least 0")
    if not given.target.endswith(".toml"):
        if overrides or given.step is not None or given.json or given.plan or given.output:
            parser.error("--step, --plan, --output, --json and settings go with a RECIPE.toml, not with a PREFIX")
        inspect_dataset(given.target, given.documents, given.tokenizer, given.verify)
    elif given.plan == (given.step is not None) or (given.output and not given.plan):
        parser.error("a recipe needs --step N or --plan, and --output goes with --plan")
    elif given.plan:
        if given.output and not given.output.endswith(".png"):
            parser.error(f"--output {given.output}: the plan is drawn as a .png")
        inspect_plan(given.target, overrides, given.output, given.json)
    elif given.step < 1:
        parser.error(f"--step is counted from 1, not {given.step}")
    else:
        inspect_step(given.target, overrides, given.step, given.tokenizer, given.json)


def inspect_dataset(prefix: str, documents: int, tokenizer_spec: str, verify: bool) -> None:
    dataset = IndexedDataset(prefix)
    manifest = read_manifest(dataset.prefix)
    tokenizer = load_tokenizer(tokenizer_spec) if tokenizer_spec else None
    if manifest and tokenizer:
        for difference in differing(Ids.of_manifest(dataset.prefix, manifest), Ids.of_tokenizer(tokenizer)):
            print(f"warning: {difference}", file=sys.stderr)
    if verify:  # first, for what is damaged cannot be shown
        dataset.verify(tokenizer.vocab_size if tokenizer else None)
        if manifest:
            manifest.require_files(dataset.prefix)
    console = Console()
    console.print(dataset_table(dataset))
    if manifest:
        console.print(manifest_table(manifest))
    console.print(documents_table(dataset, documents, tokenizer))
    if verify:
        console.print(
            "verified: every entry is sound"
            + (", every token is in the vocabulary" if tokenizer else "")
            + (", the checksums are right" if manifest else "")
        )


def inspect_step(recipe: str, arguments: list[str], step: int, tokenizer_spec: str, as_json: bool) -> None:
    from megagap.checkpoint import find_model
    from megagap.config import load_recipe, parse_overrides
    from megagap.training.datasets import training_data

    settings = load_recipe(recipe, parse_overrides(arguments), find_model=find_model)
    if step > settings.train.steps:
        raise ConfigError(f"--step {step} is beyond the end: the run's last step is {settings.train.steps}")
    samples = step_samples(training_data(settings), settings.train.global_batch_size, step)
    if as_json:
        print(samples_json(samples))
        return
    spec = tokenizer_spec or settings.data.tokenizer
    Console().print(samples_table(samples, load_tokenizer(spec) if spec else None))


def inspect_plan(recipe: str, arguments: list[str], output: str, as_json: bool) -> None:
    from megagap.checkpoint import find_model
    from megagap.config import load_recipe, parse_overrides
    from megagap.training.datasets import training_data

    logging.basicConfig(format="%(levelname)s: %(message)s")
    settings = load_recipe(recipe, parse_overrides(arguments), find_model=find_model)
    planned = plan(training_data(settings), settings.train.global_batch_size, settings.train.steps)
    if output:
        draw_plan(planned, output)
    if as_json:
        print(json.dumps(planned))
    else:
        Console().print(plan_table(planned))


if __name__ == "__main__":
    run_tool(main)
