"""Curate text: identify languages, filter, deduplicate, mask, decontaminate, judge, and write token files."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from datatrove.utils.batching import batched

from megagap.commands.parser import make_parser
from megagap.curate.contamination import benchmark_files, items, require_clean
from megagap.curate.histogram import histograms
from megagap.curate.quality.degrade import example_labels
from megagap.curate.quality.encoder import MIN_LENGTH
from megagap.curate.quality.labels import HEADS, LEVELS, read_labels
from megagap.curate.quality.model import load_quality_model, save_quality_model, write_record
from megagap.curate.quality.train import (
    LINEAR,
    PRETRAINED,
    PRETRAINED_LENGTH,
    SMALL,
    SMALL_LENGTH,
    recalibrate,
    train_encoder,
    train_linear,
)
from megagap.curate.report import histogram_page, write_report
from megagap.curate.run import Executor, run_curation
from megagap.curate.settings import load_curation
from megagap.errors import ConfigError, DataError, counted
from megagap.files import require_writable, require_writable_folder, write_text, writing
from megagap.preprocess.documents import json_lines
from megagap.terminal.arguments import positive
from megagap.terminal.programs import CalledAs
from megagap.terminal.progress import ProgressBar

EXAMPLES = """
examples (docs/curation.md):
  megagap curate run CURATION.toml --workers 2
      the whole pipeline on this machine; the output folder gets token files, counts.json and report.html
  megagap curate run CURATION.toml --executor slurm --workers 64 --option partition=cpu --option time=10:00:00
      the same as job arrays; further options of datatrove's executor likewise. docs/curation.md has a settings file
  megagap curate example-labels CORPUS/*.jsonl --output labels.jsonl
  megagap curate train-quality labels.jsonl --kind linear --output runs/linear
  megagap curate train-quality labels.jsonl --encoder xlm-roberta-base --output runs/quality
      the baseline, and the classifier; both are calibrated, and measured on documents that are held out
  megagap curate score runs/quality CORPUS/*.jsonl --output scores.jsonl
  megagap curate histogram scores.jsonl --output scores.html
  megagap curate check validation.jsonl --benchmarks 'benchmarks/*.jsonl'
      exit code 2, naming the documents, if validation text has n-grams of a benchmark in it
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("curate", called_as, __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the pipeline of a settings file", description=run_command.__doc__)
    run.add_argument("settings", type=Path, metavar="CURATION.toml")
    run.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    run.add_argument("--workers", type=positive, default=1, metavar="N", help="tasks at a time (default: %(default)s)")
    run.add_argument(
        "--option", action="append", default=[], type=option, metavar="NAME=VALUE", help="of datatrove's executor"
    )
    run.set_defaults(call=run_command)

    report = commands.add_parser("report", help="write report.html again", description=report_command.__doc__)
    report.add_argument("output", type=Path, metavar="OUTPUT_FOLDER")
    report.set_defaults(call=report_command)

    check = commands.add_parser("check", help="look for benchmarks in validation text")
    check.add_argument("validation", nargs="+", type=Path, metavar="FILE.jsonl")
    check.add_argument("--benchmarks", nargs="+", required=True, metavar="FILE.jsonl")
    check.add_argument("--ngrams", type=positive, default=12, metavar="N", help="words (default: %(default)s)")
    check.set_defaults(call=check_command)

    labels = commands.add_parser("example-labels", help="labelled texts from real ones, made worse in known ways")
    labels.add_argument("input", nargs="+", type=Path, metavar="FILE.jsonl", help="with text and source")
    labels.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl")
    labels.add_argument("--per-document", type=positive, default=2, metavar="N", help="passages (default: %(default)s)")
    labels.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    labels.set_defaults(call=labels_command)

    train = commands.add_parser("train-quality", help="train and calibrate the quality classifier")
    train.add_argument("labels", type=Path, metavar="LABELS.jsonl")
    train.add_argument("--output", required=True, type=Path, metavar="DIR", help="new or empty folder")
    train.add_argument("--kind", choices=("encoder", "linear"), default="encoder", help="default: %(default)s")
    train.add_argument("--encoder", type=Path, metavar="DIR", help="XLM-R or another (default: a small one, untrained)")
    train.add_argument("--epochs", type=positive, metavar="N", help="default: 2 (linear: 10; with --encoder: 3)")
    train.add_argument("--max-length", type=positive, metavar="TOKENS", help="default: 128 (512 with --encoder)")
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train.set_defaults(call=train_command)

    calibrate = commands.add_parser("calibrate", help="fit a classifier's temperatures to other labelled texts")
    calibrate.add_argument("model", type=Path, metavar="MODEL")
    calibrate.add_argument("labels", type=Path, metavar="LABELS.jsonl")
    calibrate.set_defaults(call=calibrate_command)

    score = commands.add_parser("score", help="score texts in batches")
    score.add_argument("model", type=Path, metavar="MODEL")
    score.add_argument("input", nargs="+", type=Path, metavar="FILE.jsonl")
    score.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl")
    score.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: %(default)s")
    score.set_defaults(call=score_command)

    histogram = commands.add_parser("histogram", help="draw histograms of scores by source")
    histogram.add_argument("scores", nargs="+", type=Path, metavar="SCORES.jsonl")
    histogram.add_argument("--output", required=True, type=Path, metavar="FILE.html")
    histogram.add_argument("--head", default="overall", help="the criterion (default: %(default)s)")
    histogram.set_defaults(call=histogram_command)

    given = parser.parse_args(arguments)
    given.call(given)


def option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, int(value) if value.isdigit() else value


def run_command(given: argparse.Namespace) -> None:
    """Run the stages of a settings file; started again, it goes on with the tasks that are not complete."""
    settings = load_curation(given.settings)
    complete = run_curation(settings, Executor(given.executor, given.workers, dict(given.option)))
    if not complete:
        print(f"submitted; the last job writes {settings.output.folder}/report.html")
        return
    counts = json.loads((Path(settings.output.folder) / "counts.json").read_text())
    for stage in counts["stages"]:
        print(f"{stage['stage']:<14} {stage['total']:>10,} documents, {stage['dropped']:>9,} dropped")
    print(f"{settings.output.folder}/report.html")


def report_command(given: argparse.Namespace) -> None:
    """Write report.html of a curation that is complete, or under way."""
    print(write_report(given.output))


def check_command(given: argparse.Namespace) -> None:
    texts = ((f"{path}, item {i}", text) for path in given.validation for i, text in enumerate(items(path), 1))
    total = require_clean(texts, benchmark_files(given.benchmarks), given.ngrams)
    print(f"{counted(total, 'document')}: no {given.ngrams}-gram of a benchmark")


def labels_command(given: argparse.Namespace) -> None:
    require_output(given.output, given.input)
    texts = (
        (line["text"], f"{path.name}/{line.get('source', number)}", path.name.partition(".")[0])
        for path in given.input
        for number, line in texts_of(path)
    )
    lines = [json.dumps(made, ensure_ascii=False) for made in example_labels(texts, given.seed, given.per_document)]
    if not lines:
        raise DataError("no passage of these texts reads like prose\n  give longer documents.")
    with writing(given.output):
        write_text(given.output, "\n".join(lines) + "\n")
    print(f"{given.output}: {counted(len(lines), 'labelled text')}")


def train_command(given: argparse.Namespace) -> None:
    if given.kind == "linear" and given.encoder:
        raise ConfigError("--encoder is for --kind encoder: leave one of them out")
    if given.kind == "linear" and given.max_length:
        raise ConfigError("--max-length is for --kind encoder: leave one of them out")
    if given.max_length and given.max_length < MIN_LENGTH:
        raise ConfigError(f"--max-length {given.max_length} is too short to judge a text by: at least {MIN_LENGTH}")
    examples = read_labels(given.labels)
    require_writable_folder(given.output)
    if any(given.output.iterdir()):
        raise DataError(f"{given.output} is not empty\n  choose a new --output.")
    recipe = LINEAR if given.kind == "linear" else PRETRAINED if given.encoder else SMALL
    recipe = replace(recipe, epochs=given.epochs or recipe.epochs)
    if given.kind == "linear":
        trained = train_linear(examples, given.seed, recipe)
    else:
        length = given.max_length or (PRETRAINED_LENGTH if given.encoder else SMALL_LENGTH)
        with ProgressBar(unit="step") as bar:
            trained = train_encoder(examples, given.seed, given.encoder, length, recipe, lambda loss: bar.update())
    save_quality_model(trained.model, given.output)
    print_quality(trained.held_out)
    for origin, accuracy in trained.by_origin.items():
        print(f"  overall, {origin}: accuracy {accuracy:.3f}")


def print_quality(held_out: dict[str, Any]) -> None:
    for head, found in held_out.items():
        print(
            f"{head:<11} accuracy {found.accuracy:.3f} (most frequent class {found.majority:.3f}), "
            f"log loss {found.log_loss:.3f}, ECE {found.ece:.3f} (uncalibrated {found.ece_uncalibrated:.3f})"
        )


def calibrate_command(given: argparse.Namespace) -> None:
    model = load_quality_model(given.model)
    trained = recalibrate(model, read_labels(given.labels))
    write_record(trained.model.record, given.model)
    print_quality(trained.held_out)


def score_command(given: argparse.Namespace) -> None:
    model = load_quality_model(given.model)
    require_output(given.output, given.input)
    lines, start = [], time.process_time()
    for path in given.input:
        for batch in batched(texts_of(path), 16 * given.batch_size):
            found = model.probabilities([line["text"] for _, line in batch], given.batch_size)
            for (number, _), scores in zip(batch, found, strict=True):
                expected = zip(HEADS, scores @ [0.0, 1.0, 2.0], strict=True)
                metadata = {
                    "file_path": str(path),
                    "quality": LEVELS[int(scores[-1].argmax())],
                    "quality_scores": {head: round(float(score), 3) for head, score in expected},
                }
                lines.append(json.dumps({"id": f"{path}/{number - 1}", "metadata": metadata}))
    seconds = time.process_time() - start
    with writing(given.output):
        write_text(given.output, "\n".join(lines) + "\n")
    print(f"{given.output}: {counted(len(lines), 'document')}, {len(lines) / seconds:,.0f} per second of a core")


def histogram_command(given: argparse.Namespace) -> None:
    if given.head not in HEADS:
        raise ConfigError(f"--head {given.head} is unknown\n  there are {', '.join(HEADS)}.")
    require_output(given.output, given.scores)
    found = histograms((line for path in given.scores for line in scores_of(path, given.head)), head=given.head)
    if not found:
        raise DataError(f"{given.scores[0]} has no scores\n  give what megagap curate score wrote.")
    with writing(given.output):
        write_text(given.output, histogram_page(found))


def require_output(path: Path, inputs: list[Path]) -> None:
    """Raises :class:`DataError` for an output that cannot be written, or is one of the inputs."""
    if any(path.resolve() == given.resolve() for given in inputs):
        raise DataError(f"--output {path} is also an input, and would be replaced\n  choose another --output.")
    require_writable(path)


def texts_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers, from 1, and objects of JSON lines that have a text. Raises :class:`DataError` for any other line."""
    for number, value in json_lines(path):
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise DataError(f'{path}, line {number} is no object with a "text"')
        yield number, value


def scores_of(path: Path, head: str) -> Iterator[dict[str, Any]]:
    """What ``megagap curate score`` or ``run`` wrote. Raises :class:`DataError` for a line that is something else."""
    for number, value in json_lines(path):
        metadata = value.get("metadata") if isinstance(value, dict) else None
        scores = metadata.get("quality_scores", {}) if isinstance(metadata, dict) else None
        score = scores.get(head) if isinstance(scores, dict) else None
        if scores != {} and not (isinstance(score, int | float) and 0 <= score <= 2):
            raise DataError(
                f'{path}, line {number} is no object with "metadata" whose "quality_scores" have {head} from 0 to 2\n'
                "  give what megagap curate score wrote."
            )
        yield value
