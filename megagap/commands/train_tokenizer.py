"""Train a byte-level BPE tokenizer and write it as a folder that transformers loads."""

import sys
from dataclasses import dataclass

from rich.filesize import decimal

from megagap.commands.parser import make_parser
from megagap.errors import DataError, counted
from megagap.preprocess.bpe import Trained, train_tokenizer
from megagap.terminal.programs import CalledAs

EXAMPLES = """
examples:
  megagap train-tokenizer --input runs/data/*.jsonl --output runs/data/tokenizer --vocab-size 8192
  megagap train-tokenizer --input book.txt --output tokenizer --vocab-size 4096

The special tokens are <|begin_of_text|> and <|end_of_text|>. At the end, documents and bytes of text (uncompressed) are
printed, and bytes per token, measured on this text or on a random sample of it.
"""


@dataclass
class Faults:
    """Documents that were skipped."""

    count: int = 0
    first: DataError | None = None

    def add(self, error: DataError) -> None:
        self.count += 1
        self.first = self.first or error


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("train-tokenizer", called_as, __doc__, EXAMPLES)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSON lines, Parquet or plain text")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; one that has a tokenizer is refused"
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids, special tokens included")
    parser.add_argument("--json-keys", default="text", metavar="KEY", help="key of the text (default: text)")
    parser.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="on a malformed document or one without the key: stop (default), or skip it and report",
    )
    given = parser.parse_args(arguments)
    faults = Faults()
    skip = faults.add if given.on_error == "skip" else None
    show_progress = sys.stderr.isatty()
    trained = train_tokenizer(given.input, given.output, given.vocab_size, given.json_keys, show_progress, skip)
    if faults.first:
        skipped = f"{counted(faults.count, 'document')} {'was' if faults.count == 1 else 'were'} skipped"
        print(f"warning: {skipped}, the first: {faults.first.args[0]}", file=sys.stderr)
    if trained.vocab_size < given.vocab_size:
        print(
            f"warning: the text has only enough pairs for {trained.vocab_size:,} of {given.vocab_size:,} ids; "
            f"give more text, or set model.vocab_size = {trained.vocab_size}",
            file=sys.stderr,
        )
    print(f"{given.output}: {summary(trained)}")


def summary(trained: Trained) -> str:
    is_all = trained.sample_bytes == trained.bytes
    sample = "all of it" if is_all else f"a random sample of {decimal(trained.sample_bytes)} of it"
    documents = f"{counted(trained.documents, 'document')} ({trained.bytes:,} bytes of text, uncompressed)"
    return (
        f"{counted(trained.vocab_size, 'id')}, trained on {documents}; {trained.bytes_per_token:.2f} bytes per token, "
        f"measured on {sample}"
    )
