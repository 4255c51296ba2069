"""Turn JSON lines of text into the .bin/.idx pair that training reads (Megatron's format)."""

import argparse
import os

from megagap.data.preprocess import preprocess
from megagap.errors import run_tool

EXAMPLES = """
examples:
  python tools/preprocess_data.py --input fr.jsonl --output-prefix data/fr --tokenizer data/tokenizer --append-eod
      writes data/fr_text_document.bin and .idx
  python tools/preprocess_data.py --input part-*.jsonl --output-prefix all --tokenizer tokenizer.json --workers 8

Each line of the input is a JSON object such as {"text": "…"}. Documents without text are left out and counted.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSON-lines files, read in this order"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer", required=True, metavar="SPEC", help="a tokenizer.json or its folder")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="key of the text (default: text)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    given = parser.parse_args(argv)
    summary = preprocess(
        given.input,
        given.output_prefix,
        given.tokenizer,
        given.json_keys,
        given.append_eod,
        given.workers,
        show_progress=True,
    )
    print(summary)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    run_tool(main)
