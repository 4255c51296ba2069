"""Turn text into the .bin/.idx pairs that training reads, in Megatron's format."""

import argparse
import os
import sys

from megagap.commands.parser import make_parser
from megagap.errors import counted
from megagap.preprocess import Summary, preprocess
from megagap.terminal.arguments import positive
from megagap.terminal.programs import CalledAs

EXAMPLES = r"""
examples:
  megagap preprocess --input fr.jsonl --output-prefix data/fr --tokenizer tokenizer --append-eod
      writes data/fr_text_document.bin, .idx and .json
  megagap preprocess --input crawl/ 'books/*.parquet' --output-prefix all --tokenizer tokenizer.json
  megagap preprocess --input web.jsonl.zst --output-prefix web --tokenizer llama3/tokenizer.model \
      --json-keys title text --on-error skip
      writes web_title_document.bin, .idx and .json, and the same of web_text_document
  srun … megagap preprocess --input crawl/ --output-prefix web --tokenizer llama3/tokenizer.model \
      --shard $SLURM_ARRAY_TASK_ID/64 --resume
      writes web-00000-of-00064_text_document.bin and so on; megagap merge concatenates them

Inputs are JSON lines ({"text": "…"}), Parquet files with such columns, or plain texts (*.txt, one document per file);
compression with gzip or Zstandard is recognised. Content decides, not the name; other files in a folder or matched by a
pattern are not read, and are listed in a note and in the manifest. Documents without text are left out and counted.
--tokenizer is a file or a folder: a Hugging Face tokenizer.json, a sentencepiece model or a tiktoken rank file (Llama
3's tokenizer.model), detected by content; a prefix hf:, sentencepiece: or tiktoken: forces the kind. The bar shows
bytes of the input files, compressed or not, and the rate in uncompressed bytes, as the summary does. More in
docs/data.md.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("preprocess", called_as, __doc__, EXAMPLES)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="files, folders or patterns, read in this order"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin, .idx and .json")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="a tokenizer's file or folder, see below")
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of texts, one pair per key (default: text)",
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    parser.add_argument("--prepend-bos", action="store_true", help="begin each document with the begin-of-text id")
    parser.add_argument(
        "--special-tokens",
        choices=["text", "parse"],
        default="text",
        help="what a special token written out in a text becomes: ordinary text (default), or that token (parse)",
    )
    parser.add_argument(
        "--min-tokens", type=not_negative, default=0, metavar="N", help="leave out documents of fewer tokens"
    )
    parser.add_argument(
        "--dedup", choices=["exact"], help="leave out documents with the tokens of an earlier one, in a second pass"
    )
    parser.add_argument(
        "--shuffle-documents", type=int, metavar="SEED", help="put the documents in a random order, in a second pass"
    )
    parser.add_argument("--shard", type=part, metavar="I/N", help="do part I of N (from 0) of the inputs")
    parser.add_argument(
        "--workers",
        type=worker_count,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="cores to use (default: all)",
    )
    parser.add_argument(
        "--fast",
        choices=["auto", "on", "off"],
        default="auto",
        help="auto (default): use gigatoken if it is installed and gives the same ids on a sample of the input; on: "
        "fail if it cannot be used; off: never",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue where the same command was interrupted; do nothing if it has finished",
    )
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="on a malformed document or one without a key: stop (default), or skip it and report",
    )
    given = parser.parse_args(arguments)
    summary = preprocess(
        given.input,
        given.output_prefix,
        given.tokenizer,
        given.json_keys,
        given.append_eod,
        given.workers,
        given.on_error,
        show_progress=True,
        prepend_bos=given.prepend_bos,
        min_tokens=given.min_tokens,
        shuffle_documents=given.shuffle_documents,
        dedup=given.dedup is not None,
        part=given.shard,
        fast=given.fast,
        resume=given.resume,
        special_tokens=given.special_tokens,
    )
    print(summary)
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    warn_of_skipped(summary)


def warn_of_skipped(summary: Summary) -> None:
    if not summary.skipped:
        return
    were = "was" if summary.skipped == 1 else "were"
    print(f"warning: {counted(summary.skipped, 'document')} {were} skipped", file=sys.stderr)
    for fault in summary.first_skipped:
        print(f"  {fault}", file=sys.stderr)
    if summary.skipped > len(summary.first_skipped):
        print("  …", file=sys.stderr)


def worker_count(text: str) -> int:
    """A number of processes that does not bring the machine down, as one with zeros too many would."""
    value, cores = positive(text), len(os.sched_getaffinity(0))
    most = max(64, 8 * cores)
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most} on this machine's {cores} cores, not {value}")
    return value


def not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def part(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, such as 0/8, not {text}")
    return int(index), int(count)
