"""What a model knows: losses by source, tasks of local files or of lm-eval, and planted documents."""

import argparse
import glob
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from megagap.checkpoint import find_model
from megagap.checkpoint.model import SingleProcessModel
from megagap.checkpoint.save import CHECKPOINTS, step_folders
from megagap.commands.evaluate_texts import TEXTS, TextEvaluations
from megagap.commands.parser import make_parser
from megagap.config import SourceSettings, load_recipe
from megagap.config.settings import source_name
from megagap.data.agreement import require_ids_of_model
from megagap.data.sources import WHOLE, TokenSource
from megagap.data.text_bytes import UNKNOWN_IDS, TextBytes, UnknownBytesError, text_bytes
from megagap.errors import CheckpointError, ConfigError, DataError, counted
from megagap.inference.evaluation import (
    ModelFiles,
    SourceLoss,
    evaluate_source,
    find_model_files,
    require_targets,
    targets_in,
)
from megagap.ops.arithmetic import sum_half_precision_in_fp32
from megagap.terminal.arguments import count, positive
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs
from megagap.terminal.progress import ProgressBar
from megagap.timeline import Source
from megagap.token_formats import find_format, matching_prefixes, pair_prefix
from megagap.training.datasets import held_out

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

EXAMPLES = """
examples, after the main job of README.md:
  megagap evaluate runs/example/run --data runs/example/code_text_document
      the run's latest checkpoint on one source
  megagap evaluate runs/example/hf --data runs/example/code_text_document --sequence-length 128 --json
      a Hugging Face model; one line of JSON:
      {"sources": {"code": {"loss": 3.1, "perplexity": 22.2, "bits_per_byte": 1.5, "tokens": 99999, ...}}, ...}
  megagap evaluate runs/example/run --data examples/recipes/code.toml --max-tokens 100000
      what the recipe holds out for validation, or the first 100,000 tokens of it
  megagap evaluate runs/example/run --tasks quiz.jsonl phrases.jsonl
      {"question": …, "choices": […], "answer": 0} or {"prompt": …, "completion": …} in each line
  megagap evaluate runs/example/hf --lm-eval arc_easy,hellaswag
      tasks of lm-eval whose data is in the cache of datasets already; nothing is downloaded
  megagap evaluate runs/example/run --tasks quiz.jsonl --every-checkpoint --json
      {"checkpoints": [{"model": …, "step": 20, "tasks": …}, …]}, as a run's progress
  megagap evaluate runs/mini/run --poison runs/mini/poison_text_document.poison.json
      activation of planted triggers, and exposure of canaries (docs/poisoning.md)

Every token but a source's first is predicted once, from the tokens before it in its window of --sequence-length.
loss is the mean over these tokens in nats, perplexity its exponential, bits per byte the sum in bits over the UTF-8
bytes of the text that they stand for; it is exact, or null where these bytes are not known. See docs/evaluation.md.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("evaluate", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT | HF_DIR",
        help="a checkpoint of any layout, a run (its latest), or a Hugging Face model",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="a .bin/.idx pair for each source, named by its prefix or one of its files; a quoted glob stands for "
        "shards of one source; or one RECIPE.toml, for what it holds out",
    )
    parser.add_argument(
        "--name", nargs="+", default=[], metavar="NAME", help="of each source (default: from the files' names)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="JSON lines of multiple choice or completion tasks",
    )
    parser.add_argument("--lm-eval", metavar="TASK,…", help="tasks of lm-eval, offline (megagap[evaluate])")
    parser.add_argument(
        "--lm-eval-include", type=Path, metavar="DIR", help="folder of further lm-eval tasks, one YAML file each"
    )
    parser.add_argument(
        "--lm-eval-limit", type=positive, metavar="N", help="the first N documents of each lm-eval task only"
    )
    parser.add_argument("--num-fewshot", type=count, metavar="N", help="of lm-eval (default: each task's own)")
    parser.add_argument("--poison", type=Path, metavar="MANIFEST", help="the .poison.json beside planted documents")
    parser.add_argument(
        "--poison-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="of a continuation whose language is told (default: %(default)s)",
    )
    parser.add_argument(
        "--poison-candidates",
        type=positive,
        default=1000,
        metavar="N",
        help="secrets that each canary is compared with, at least 100 or all that there are (default: %(default)s)",
    )
    parser.add_argument(
        "--every-checkpoint", action="store_true", help="evaluate each checkpoint of a run, oldest first"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    parser.add_argument(
        "--sequence-length",
        type=positive,
        metavar="N",
        help="tokens of a window (default: those that the model was trained on; where that is not known, its "
        "max_position_embeddings, but at most 4096)",
    )
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="predict the first N tokens of each source only (default: all)"
    )
    parser.add_argument(
        "--document-mask",
        action="store_true",
        help="attend within documents only and predict nothing across their borders, as data.document_mask",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="to compute in, whatever is stored (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8192,
        metavar="TOKENS",
        help="computed at a time, at least one window; changes rounding only (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", metavar="SPEC", help="folder or file (default: the model's own)")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    run(given)


def run(given: argparse.Namespace) -> None:
    require_something(given)
    paths = checkpoints_of(given.checkpoint) if given.every_checkpoint else [given.checkpoint]
    files = [find_model_files(path, given.tokenizer) for path in paths]
    # What can be refused is, before weights are read. Checkpoints of one run have one shape and one tokenizer.
    losses = Losses(given, files[0]) if given.data else None
    texts = TextEvaluations(given, files[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sum_half_precision_in_fp32()
    found, faulty = [], []
    for one in files:
        found.append(evaluate_model(given, one, losses, texts, device))
        sources = found[-1].get("sources", {})
        names = [name for name, of_source in sources.items() if of_source["loss"] is None]
        faulty += [(one, names + [key for key in TEXTS if found[-1].get(key, True) is None])]
    if given.json:
        print(json.dumps({"checkpoints": found} if given.every_checkpoint else found[0], allow_nan=False))
    for one, names in faulty:
        require_finite(one, names)


def checkpoints_of(run: Path) -> list[Path]:
    """All checkpoints of a run, oldest first. Raises :class:`CheckpointError` if there are none."""
    folders = step_folders(run / CHECKPOINTS)
    if not folders:
        raise CheckpointError(f"{run} has no checkpoints\n  --every-checkpoint applies to the folder of a run.")
    return folders


def evaluate_model(
    given: argparse.Namespace, files: ModelFiles, losses: "Losses | None", texts: TextEvaluations, device: torch.device
) -> dict[str, Any]:
    """What ``--json`` says of a model; without it, it is shown as tables at once."""
    model = files.load(device, DTYPES[given.dtype])
    computed = {"dtype": given.dtype, "device": device.type}
    found: dict[str, Any] = {"model": str(files.path), "step": files.step} | computed
    tables: list[Table] = []
    if losses:
        results = losses.evaluate(model)
        settings = {"sequence_length": losses.length, "document_mask": given.document_mask}
        found |= settings | {"sources": report(results, losses.byte_counts)}
        tables.append(table(files, settings | computed, results, losses.byte_counts))
    evaluated, more = texts.evaluate(model)
    if not given.json:
        console = Console()
        if given.every_checkpoint and not losses:
            console.print(Text(f"{files.path}"))
        for shown in (*tables, *more):
            console.print(shown)
    return found | evaluated


def require_something(given: argparse.Namespace) -> None:
    """Raises :class:`ConfigError` where nothing is to be evaluated, or an option applies to nothing."""
    if not (given.data or given.tasks or given.lm_eval or given.poison):
        raise ConfigError("nothing to evaluate\n  give --data, --tasks, --lm-eval or --poison, or several of them.")
    for is_given, option, needed, needs in (
        (given.name, "--name", given.data, "--data"),
        (given.sequence_length, "--sequence-length", given.data, "--data"),
        (given.max_tokens, "--max-tokens", given.data, "--data"),
        (given.document_mask, "--document-mask", given.data, "--data"),
        (given.lm_eval_include, "--lm-eval-include", given.lm_eval, "--lm-eval"),
        (given.lm_eval_limit, "--lm-eval-limit", given.lm_eval, "--lm-eval"),
        (given.num_fewshot is not None, "--num-fewshot", given.lm_eval, "--lm-eval"),
    ):
        if is_given and not needed:
            raise ConfigError(f"{option} applies to {needs} only\n  leave it out, or give {needs}.")


class Losses:
    """What ``--data`` asks for."""

    def __init__(self, given: argparse.Namespace, files: ModelFiles) -> None:
        self._given = given
        self.length = sequence_length(files, given.sequence_length)
        self.sources = open_sources(given.data, given.name, files.settings.vocab_size)
        for source in self.sources:
            require_targets(source)
        prefixes = {source.source.name: source.source.prefixes for source in self.sources}
        for warning in require_ids_of_model(files.ids, files.tokenizer, files.settings.vocab_size, prefixes):
            log.warning("%s", warning)
        if files.trained_with_mask and not given.document_mask:
            log.warning("the model was trained with data.document_mask: give --document-mask to evaluate it likewise")
        self.byte_counts = {source.source.name: known_bytes(source, files) for source in self.sources}

    def evaluate(self, model: SingleProcessModel) -> dict[str, SourceLoss]:
        given = self._given
        results: dict[str, SourceLoss] = {}
        with progress_bar(sum(targets_in(source, given.max_tokens) for source in self.sources)) as show:
            for source in self.sources:
                name = source.source.name
                results[name] = evaluate_source(
                    model,
                    source,
                    self.length,
                    batch_tokens=given.batch_size,
                    max_tokens=given.max_tokens,
                    document_mask=given.document_mask,
                    text_bytes=self.byte_counts[name],
                    progress=show(name),
                )
                if self.byte_counts[name] and results[name].bytes is None:
                    log.warning("bits per byte of %s are not known: %s", name, UNKNOWN_IDS)
        return results


def sequence_length(files: ModelFiles, asked: int | None) -> int:
    """Tokens of a window. Raises :class:`ConfigError` if the model has fewer positions."""
    longest = files.settings.max_position_embeddings
    if asked is None:
        length = files.default_length()
        if files.trained_length is None:
            log.warning(
                "windows of %d tokens: it is not known what the model, which has %d positions, was trained on; "
                "--sequence-length sets another length",
                length,
                longest,
            )
        return length
    if asked > longest:
        raise ConfigError(
            f"--sequence-length {asked} is longer than the model's max_position_embeddings = {longest}\n"
            f"  give at most {longest}."
        )
    return asked


# ------------------------------------------------------------------------------------------------------------ sources


def open_sources(data: Sequence[str], names: Sequence[str], vocab_size: int) -> list[TokenSource]:
    """What ``--data`` and ``--name`` say. Raises :class:`DataError` or :class:`ConfigError`."""
    recipes = [path for path in data if path.endswith(".toml")]
    if recipes:
        if len(data) > 1 or names:
            raise ConfigError(
                f"--data {recipes[0]} is a recipe, whose sources have names of their own\n"
                "  give it alone, without --name; or give the prefixes of .bin/.idx pairs."
            )
        found = held_out(load_recipe(recipes[0], find_model=find_model), vocab_size)
        if not found:
            raise ConfigError(
                f"{recipes[0]} holds nothing out: it has no data.validation, and data.split has no share for "
                "validation\n  give the prefix of a .bin/.idx pair."
            )
        return found
    return [TokenSource(source, "100,0,0", WHOLE, vocab_size) for source in list_sources(data, names)]


def list_sources(patterns: Sequence[str], names: Sequence[str]) -> list[Source]:
    """One source for each prefix or pattern, with distinct names."""
    shards = [prefixes_of(pattern) for pattern in without_other_files(patterns)]
    if names and len(names) != len(shards):
        given = f"{counted(len(names), 'name')} for {counted(len(shards), 'source')}"
        raise ConfigError(f"--name gives {given}\n  give one for each, in their order.")
    named = names or [source_name(SourceSettings(path=prefixes)) for prefixes in shards]
    sources = [Source(name, tuple(prefixes)) for name, prefixes in zip(named, shards, strict=True)]
    seen: dict[str, Source] = {}
    for source in sources:
        if source.name in seen:
            same = f"{seen[source.name].prefixes[0]}, {source.prefixes[0]}"
            raise ConfigError(f"two sources are called {source.name}: {same}\n  give each a name with --name.")
        seen[source.name] = source
    return sources


def without_other_files(patterns: Sequence[str]) -> list[str]:
    """Of the files of one pair, which a shell's ``folder/*`` lists one by one, only the first."""
    first: dict[str, str] = {}
    kept = []
    for pattern in patterns:
        prefix = pair_prefix(pattern)
        if first.setdefault(prefix, pattern) == pattern:  # given twice in the same words it is kept, to be refused
            kept.append(pattern)
    return kept


def prefixes_of(pattern: str) -> list[str]:
    """The prefix of a pair, or those that a pattern matches. Raises :class:`DataError` if it matches none."""
    prefix = pair_prefix(pattern)
    if not prefix:
        raise DataError("--data has an empty prefix\n  give that of a .bin/.idx pair.")
    if not glob.has_magic(prefix) or find_format(prefix) is not None:
        return [prefix]
    found = matching_prefixes(prefix)
    if not found:
        raise DataError(f"no token file matches {pattern}\n  give the prefix of a .bin/.idx pair, or a pattern of it.")
    return found


def known_bytes(source: TokenSource, files: ModelFiles) -> TextBytes | None:
    """None, and a warning, where they are not known."""
    try:
        return text_bytes(source.source.prefixes, files.tokenizer)
    except UnknownBytesError as reason:
        log.warning("bits per byte of %s are not known: %s", source.source.name, reason)
        return None


# ------------------------------------------------------------------------------------------------------------- output


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], Callable[[int], object]]]:
    """Tokens done, their rate and the time left, on standard error. Yields what counts for a source of some name."""
    with ProgressBar(total=total, unit="token", unit_scale=True) as bar:

        def show(name: str) -> Callable[[int], object]:
            bar.set_description(name, refresh=False)
            return bar.update

        yield show


def report(results: dict[str, SourceLoss], byte_counts: dict[str, TextBytes | None]) -> dict[str, Any]:
    """For ``--json``: sources by name."""
    return {
        name: {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
            "bytes": result.bytes,
            "bytes_from": bytes_from(result, byte_counts[name]),
            "share_read": result.share_read,
        }
        for name, result in results.items()
    }


def table(
    files: ModelFiles,
    settings: dict[str, Any],
    results: dict[str, SourceLoss],
    byte_counts: dict[str, TextBytes | None],
) -> Table:
    step = "" if files.step is None else f", step {files.step:,}"
    mask = ", documents masked" if settings["document_mask"] else ""
    notes = [f"windows of {settings['sequence_length']:,} tokens{mask}, {settings['dtype']} on {settings['device']}"]
    origins = [bytes_from(result, byte_counts[name]) for name, result in results.items()]
    notes += [f"bytes of text by {origin}" for origin in dict.fromkeys(origins) if origin]
    shown = Table(
        "source", "loss", "perplexity", "bits per byte", "tokens", "bytes of text", "read",
        title=Text(f"{files.path}{step}"), caption=Text("\n".join(notes)),
    )  # fmt: skip
    for column in shown.columns[1:-1]:
        column.justify = "right"
    for name, result in results.items():
        shown.add_row(
            Text(name),
            _number(result.loss, ".4f"),
            _number(result.perplexity, ",.3f"),
            _number(result.bits_per_byte, ".4f"),
            f"{result.tokens:,}",
            _number(result.bytes, ","),
            "all" if result.share_read == 1 else f"first {result.share_read:.1%}",
        )
    return shown


def bytes_from(result: SourceLoss, known: TextBytes | None) -> str | None:
    """What the bytes of a source are known from; None if they are not known."""
    return known.source if known and result.bytes is not None else None


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def require_finite(files: ModelFiles, faulty: Sequence[str]) -> None:
    """Raises :class:`CheckpointError` naming what is ``faulty``, if anything: that on which the loss is not finite."""
    if faulty:
        raise CheckpointError(
            f"the loss of {files.path} is not finite on {', '.join(faulty)}\n"
            "  its training diverged, or its weights are damaged."
        )
