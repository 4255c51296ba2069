"""Concatenate several .bin/.idx pairs into one, in constant memory."""

import sys

from megagap.commands.parser import make_parser
from megagap.data.manifest import manifest_path
from megagap.errors import counted
from megagap.preprocess.merge import merge_datasets
from megagap.terminal.programs import CalledAs

EXAMPLES = """
examples:
  megagap merge --input web-*-of-00064_text_document.idx --output-prefix web_text_document
  megagap merge --input fr_text_document en_text_document --output-prefix all --shuffle-documents 1

The result is what preprocessing all inputs in one go would have given. All pairs must hold tokens of one type and, as
far as their manifests say, of one tokenizer. Of a corpus preprocessed in shards, all shards must be given, in order.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("merge", called_as, __doc__, EXAMPLES)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="pairs, named with or without .bin or .idx"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument("--shuffle-documents", type=int, metavar="SEED", help="put the documents in a random order")
    parser.add_argument("--dedup", choices=["exact"], help="leave out repeated documents (the first stays)")
    given = parser.parse_args(arguments)
    merged = merge_datasets(
        given.input, given.output_prefix, given.shuffle_documents, given.dedup is not None, show_progress=True
    )
    counts = f"{counted(merged.document_count, 'document')}, {counted(merged.token_count, 'token')}"
    print(f"{merged.prefix}: {counts} from {counted(len(given.input), 'pair')}")
    if not manifest_path(merged.prefix).exists():
        print("note: not all inputs have a manifest, so the result has none", file=sys.stderr)
