"""Turn JSON lines of text into the .bin/.idx pairs that training reads (Megatron's format)."""

import argparse
import os
import sys
from typing import get_args

from megagap.data.preprocess import OnError, Summary, preprocess
from megagap.errors import run_tool

EXAMPLES = r"""
examples:
  python tools/preprocess_data.py --input fr.jsonl --output-prefix data/fr --tokenizer data/tokenizer --append-eod
      writes data/fr_text_document.bin and .idx
  python tools/preprocess_data.py --input part-*.jsonl --output-prefix all --tokenizer tokenizer.json --workers 8
  python tools/preprocess_data.py --input web.jsonl.zst --output-prefix web --tokenizer llama3/tokenizer.model \
      --json-keys title text --on-error skip
      writes web_title_document.bin and .idx, and web_text_document.bin and .idx

Each line of the input is a JSON object such as {"text": "…"}; files compressed with gzip or Zstandard are recognised.
Documents without text are left out and counted. --tokenizer is a file or a folder: a Hugging Face tokenizer.json, a
sentencepiece model or a tiktoken rank file (Llama 3's tokenizer.model), told apart by content; a prefix hf:,
sentencepiece: or tiktoken: forces the kind.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON-lines files, read in this order"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="a tokenizer's file or folder, see below")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of texts, a pair for each (default: text)"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="stop",
        help="at a malformed document or one without a key: stop (default), or skip it and report",
    )
    given = parser.parse_args(argv)
    summary = preprocess(
        given.input,
        given.output_prefix,
        given.tokenizer,
        given.json_keys,
        given.append_eod,
        given.workers,
        given.on_error,
        show_progress=True,
    )
    print(summary)
    warn_of_skipped(summary)


def warn_of_skipped(summary: Summary) -> None:
    if not summary.skipped:
        return
    print(f"warning: {summary.skipped:,} documents were skipped", file=sys.stderr)
    for fault in summary.first_skipped:
        print(f"  {fault}", file=sys.stderr)
    if summary.skipped > len(summary.first_skipped):
        print("  …", file=sys.stderr)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    run_tool(main)
