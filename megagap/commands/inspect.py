"""Show what a token file contains, find text in it, and show what a training step or a whole run reads."""

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.commands.parser import make_parser
from megagap.data.agreement import Ids, differing
from megagap.data.inspect import (
    dataset_json,
    dataset_table,
    document_tokens,
    documents_json,
    documents_table,
    drawn_documents,
    manifest_table,
    sample_origins,
    samples_json,
    samples_table,
    step_samples,
    tokenizer_of_manifest,
    whole_document,
)
from megagap.data.manifest import Manifest, read_manifest
from megagap.data.mixture_plan import draw_mixture_plan, mixture_plan, mixture_plan_table
from megagap.data.search import as_stored, search, search_table
from megagap.data.token_file import TokenFile, open_tokens
from megagap.errors import ConfigError, DataError, counted
from megagap.run_files import CONFIG, is_run
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs, typed
from megagap.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = """
examples:
  megagap inspect runs/data/fr_text_document --documents 5
  megagap inspect runs/data/fr_text_document --document 1234
  megagap inspect runs/data/fr_text_document --random 10 --seed 1
  megagap inspect runs/data/fr_text_document --search "Cookies akzeptieren"
  megagap inspect runs/data/fr_text_document --verify
  megagap inspect examples/recipes/code.toml --train.seed 7 --step 100 --json
  megagap inspect examples/recipes/code.toml --plan --output plan.png

--json prints one line and nothing else on standard output. Of a PREFIX it is an object, whose documents are whole:
{"prefix": ..., "documents": ..., "tokens": ..., "manifest": {...}, "shown": [{"document": 0, "tokens": [...], "text":
"..."}, ...]}; --document gives one of these, --random {"seed": ..., "shown": [...]}, --search {"text": ...,
"occurrences": ..., "found_in": ..., "hits": [{"document": ..., "position": ..., "token": ..., ...}, ...]}. Of --step N:
[{"sample": 0, "source": "fr", "documents": [12, 13], "origins": [{"file": "a.jsonl", "line": 14}, {"file": "b.parquet",
"row": 1}], "tokens": [...]}, ...]; an origin is null where the source does not say which it is.
"""

SHOWN_DOCUMENTS, SHOWN_HITS = 3, 20


@dataclass(frozen=True)
class Pair:
    """A token file with its manifest and the tokenizer to read it with, as far as there are any."""

    dataset: TokenFile
    manifest: Manifest | None
    tokenizer: Tokenizer | None
    why_no_text: str


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = options_parser(called_as)
    given, overrides = parser.parse_known_args(arguments)
    if given.target.endswith(".toml"):
        require_recipe_options(parser, given)
        if given.plan:
            inspect_plan(given.target, overrides, given.output, given.json)
        else:
            inspect_step(given.target, overrides, given.step, given.tokenizer, given.json)
    else:
        require_no_run(Path(given.target))
        require_prefix_options(parser, given, overrides)
        inspect_pair(given)


def require_no_run(target: Path) -> None:
    """Raises :class:`DataError` if it is a run's directory, whose data is that of its config.toml."""
    if is_run(target):
        raise DataError(
            f"{target} is a run, not a token file\n"
            f"  for what its step N reads: {typed('inspect')} {target / CONFIG} --step N (or --plan for all)"
        )


def options_parser(called_as: CalledAs) -> argparse.ArgumentParser:
    parser = make_parser(
        "inspect",
        called_as,
        __doc__,
        EXAMPLES,
        allow_abbrev=False,
        usage="%(prog)s PREFIX [--documents N | --document N | --random K [--seed S] | --search TEXT]\n"
        "           [--tokenizer SPEC] [--verify] [--json]\n"
        "       %(prog)s RECIPE.toml [--section.key value ...] --step N [--tokenizer SPEC] [--json]\n"
        "       %(prog)s RECIPE.toml [--section.key value ...] --plan [--output PNG] [--json]",
    )
    parser.add_argument("target", metavar="PREFIX | RECIPE.toml", help="a .bin/.idx pair, or a recipe")
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help=f"show the start of the first N documents (default: {SHOWN_DOCUMENTS}); with --search, of the first N "
        f"documents that contain TEXT (default: {SHOWN_HITS})",
    )
    parser.add_argument("--document", type=int, metavar="N", help="show all of document N, counted from 0")
    parser.add_argument("--random", type=int, metavar="K", help="show the start of K documents drawn at random")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of --random (default: 0)")
    parser.add_argument(
        "--search",
        metavar="TEXT",
        help="find the documents whose decoded text contains TEXT, as it is written; reads and decodes all of them",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="SPEC",
        help="tokenizer to show text with (default: the one that the manifest or recipe names; '': show ids only)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check every entry of both files, and that every id is in the vocabulary"
    )
    parser.add_argument("--step", type=int, metavar="N", help="show what training step N reads, counted from 1")
    parser.add_argument("--plan", action="store_true", help="show tokens, epochs and shares by phase and source")
    parser.add_argument("--output", default="", metavar="PNG", help="draw the plan too")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, see below")
    return parser


def require_recipe_options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name in ("documents", "document", "random", "seed", "search"):
        if getattr(given, name) is not None:
            parser.error(f"--{name} applies to a PREFIX, not to a RECIPE.toml")
    if given.verify:
        parser.error("--verify applies to a PREFIX, not to a RECIPE.toml")
    if given.plan == (given.step is not None):
        parser.error("a recipe needs either --step N or --plan")
    if given.output and not given.plan:
        parser.error("--output applies only to --plan")
    if given.output and not given.output.endswith(".png"):
        parser.error(f"--output {given.output}: the plan is drawn as a .png")
    if given.plan and given.tokenizer is not None:
        parser.error("--tokenizer does not apply to --plan, which shows no text")
    if given.step is not None and given.step < 1:
        parser.error(f"--step is counted from 1, not {given.step}")


def require_prefix_options(parser: argparse.ArgumentParser, given: argparse.Namespace, unknown: list[str]) -> None:
    if unknown or given.step is not None or given.plan or given.output:
        named = f" (given: {' '.join(unknown)})" if unknown else ""
        parser.error(f"--step, --plan, --output and settings apply to a RECIPE.toml, not to a PREFIX{named}")
    modes = [f"--{name}" for name in ("document", "random", "search") if getattr(given, name) is not None]
    if len(modes) > 1:
        parser.error(f"give one of {' and '.join(modes)}, not both")
    if given.documents is not None and modes and modes != ["--search"]:
        parser.error(f"--documents does not apply to {modes[0]}")
    if given.seed is not None and modes != ["--random"]:
        parser.error("--seed applies only to --random")
    if given.documents is not None and given.documents < 0:
        parser.error(f"--documents must be at least 0, not {given.documents}")
    if given.random is not None and given.random < 1:
        parser.error(f"--random must be at least 1, not {given.random}")


def inspect_pair(given: argparse.Namespace) -> None:
    pair = open_pair(given.target, given.tokenizer)
    if given.document is not None:
        document_tokens(pair.dataset, given.document)  # what does not exist is said before other notes
    if given.tokenizer is None and pair.why_no_text and given.search is None:
        print(
            f"note: {pair.why_no_text}"
            + ("" if pair.tokenizer else "; only ids are shown. Name the tokenizer with --tokenizer to see text"),
            file=sys.stderr,
        )
    if given.verify:  # first: damaged documents cannot be shown
        verify(pair)
    if given.search is not None:
        show_search(pair, given.search, SHOWN_HITS if given.documents is None else given.documents, given.json)
    elif given.document is not None:
        show_document(pair, given.document, given.json)
    elif given.random is not None:
        show_drawn(pair, given.random, given.seed or 0, given.json)
    else:
        show_pair(pair, SHOWN_DOCUMENTS if given.documents is None else given.documents, given.verify, given.json)
    if given.verify and not given.json:
        print(verified(pair))


def open_pair(prefix: str, tokenizer_spec: str | None) -> Pair:
    dataset = open_tokens(prefix)
    manifest = read_manifest(dataset.prefix)
    if tokenizer_spec is None:
        return Pair(dataset, manifest, *tokenizer_of_manifest(dataset.prefix, manifest))
    tokenizer = load_tokenizer(tokenizer_spec) if tokenizer_spec else None
    if manifest and tokenizer:
        for difference in differing(Ids.of_manifest(dataset.prefix, manifest), Ids.of_tokenizer(tokenizer)):
            print(f"warning: {difference}", file=sys.stderr)
    return Pair(dataset, manifest, tokenizer, "--tokenizer '' was given")


def verify(pair: Pair) -> None:
    pair.dataset.verify(pair.tokenizer.vocab_size if pair.tokenizer else None)
    if pair.manifest:
        pair.manifest.require_files(pair.dataset.prefix)


def verified(pair: Pair) -> str:
    return (
        "verified: every entry is valid"
        + (", every token is in the vocabulary" if pair.tokenizer else "")
        + (", the checksums are right" if pair.manifest else "")
    )


def show_pair(pair: Pair, documents: int, was_verified: bool, as_json: bool) -> None:
    numbers = range(min(documents, pair.dataset.document_count))
    if as_json:
        about: dict[str, Any] = dataset_json(pair.dataset, pair.manifest)
        shown = documents_json(pair.dataset, numbers, pair.tokenizer)
        print(json.dumps(about | {"verified": was_verified, "shown": shown}))
        return
    console = Console()
    console.print(dataset_table(pair.dataset))
    if pair.manifest:
        console.print(manifest_table(pair.manifest))
    console.print(documents_table(pair.dataset, numbers, pair.tokenizer))


def show_document(pair: Pair, number: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps(documents_json(pair.dataset, [number], pair.tokenizer)[0]))
    else:
        print(whole_document(pair.dataset, number, pair.tokenizer))


def show_drawn(pair: Pair, count: int, seed: int, as_json: bool) -> None:
    numbers = drawn_documents(pair.dataset, count, seed)
    if not numbers:
        raise DataError(f"{pair.dataset.prefix} has no documents to draw from")
    if as_json:
        print(json.dumps({"seed": seed, "shown": documents_json(pair.dataset, numbers, pair.tokenizer)}))
        return
    title = f"{len(numbers):,} of {counted(pair.dataset.document_count, 'document')}, drawn with seed {seed}"
    Console().print(documents_table(pair.dataset, numbers, pair.tokenizer, title))


def show_search(pair: Pair, text: str, most: int, as_json: bool) -> None:
    if pair.tokenizer is None:
        raise DataError(f"--search needs a tokenizer: {pair.why_no_text}\n  name it with --tokenizer.")
    found = search(pair.dataset, pair.tokenizer, text, most, show_progress=sys.stderr.isatty())
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    if found.hits:
        Console().print(search_table(found))
    if found.found_in > len(found.hits):
        print(f"… and {counted(found.found_in - len(found.hits), 'more document')}; --documents N shows more")
    print(
        f"{text!r}: {counted(found.occurrences, 'occurrence')} in {found.found_in:,} of "
        f"{counted(found.documents, 'document')} ({counted(found.tokens, 'token')}). All were decoded with "
        f"{pair.tokenizer.spec} and searched as text, special tokens written out."
    )
    if not found.occurrences and text not in (stored := as_stored(pair.tokenizer, text)):
        print(f"note: the tokenizer changes this text: documents would contain it as {stored!r}", file=sys.stderr)


def inspect_step(recipe: str, arguments: list[str], step: int, tokenizer_spec: str | None, as_json: bool) -> None:
    from megagap.checkpoint import find_model
    from megagap.config import load_recipe, parse_overrides
    from megagap.training.datasets import training_data

    settings = load_recipe(recipe, parse_overrides(arguments), find_model=find_model)
    if step > settings.train.steps:
        raise ConfigError(f"--step {step} is beyond the end: the run's last step is {settings.train.steps}")
    data = training_data(settings)
    samples = step_samples(data, step)
    origins, unknown = sample_origins(data, samples)
    if as_json:
        for reason in unknown:
            print(f"note: {reason}", file=sys.stderr)
        print(samples_json(samples, origins))
        return
    spec = settings.data.tokenizer if tokenizer_spec is None else tokenizer_spec
    Console().print(samples_table(samples, origins, unknown, load_tokenizer(spec) if spec else None))


def inspect_plan(recipe: str, arguments: list[str], output: str, as_json: bool) -> None:
    from megagap.checkpoint import find_model
    from megagap.config import load_recipe, parse_overrides
    from megagap.training.datasets import training_data

    logging.basicConfig(format="%(levelname)s: %(message)s")
    settings = load_recipe(recipe, parse_overrides(arguments), find_model=find_model)
    planned = mixture_plan(training_data(settings))
    if output:
        draw_mixture_plan(planned, output)
        print(f"written: {output}", file=sys.stderr)
    if as_json:
        print(json.dumps(planned))
    else:
        Console().print(mixture_plan_table(planned))
