"""Which documents of a token file contain a text.

The ids of one document after the other are decoded, and its text is searched as a whole, so that what is looked for may
begin and end anywhere, within tokens too. Memory grows with the longest document, not with the file.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from megagap.data.inspect import decode_document, document_tokens, known_places, one_line
from megagap.data.token_file import TokenFile
from megagap.errors import DataError, is_unicode
from megagap.terminal.progress import ProgressBar
from megagap.tokenizer import Tokenizer

CONTEXT = 40
"""Characters that are shown on either side of a text that was found."""


@dataclass(frozen=True)
class Hit:
    """A document that contains the text."""

    document: int
    """Its number, from 0."""
    occurrences: int
    """That do not overlap."""
    position: int
    """Characters of the document's decoded text before the first occurrence."""
    token: int
    """Number, from 0, of the token that holds the first character of that occurrence."""
    context: str
    """The first occurrence with what surrounds it."""


@dataclass(frozen=True)
class Search:
    """What was searched, and what was found."""

    text: str
    documents: int
    """Searched."""
    tokens: int
    """Of these documents."""
    occurrences: int
    found_in: int
    """Documents that contain the text."""
    hits: tuple[Hit, ...]
    """The first of these documents."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def search(dataset: TokenFile, tokenizer: Tokenizer, text: str, most: int, show_progress: bool = False) -> Search:
    """Search all documents for ``text``, as it is written; the first ``most`` that contain it are described.

    Raises :class:`DataError` for a text that is empty or not valid Unicode, and a document that cannot be decoded.
    """
    if not text:
        raise DataError("the text to search for is empty: every document contains it")
    if not is_unicode(text):
        raise DataError("the text to search for is not valid UTF-8")
    occurrences, found_in = 0, 0
    hits: list[Hit] = []
    with ProgressBar(
        total=dataset.token_count, unit=" tokens", unit_scale=True, disable=not show_progress, leave=False
    ) as bar:
        for number in range(dataset.document_count):
            tokens = document_tokens(dataset, number)
            decoded = decode_document(dataset, number, tokens, tokenizer)
            bar.update(len(tokens))
            if not (found := decoded.count(text)):
                continue
            occurrences, found_in = occurrences + found, found_in + 1
            if len(hits) < most:
                hits.append(_describe(dataset, tokenizer, number, decoded, text, found))
    return Search(text, dataset.document_count, dataset.token_count, occurrences, found_in, tuple(hits))


def _describe(dataset: TokenFile, tokenizer: Tokenizer, number: int, decoded: str, text: str, occurrences: int) -> Hit:
    position = decoded.index(text)
    start, stop = max(position - CONTEXT, 0), position + len(text) + CONTEXT
    context = ("…" if start else "") + one_line(decoded[start:stop]) + ("…" if stop < len(decoded) else "")
    return Hit(number, occurrences, position, _token_at(dataset, tokenizer, number, position), context)


def _token_at(dataset: TokenFile, tokenizer: Tokenizer, number: int, position: int) -> int:
    """The number of the token at a character of the document: the one that completes it."""
    tokens = document_tokens(dataset, number)
    places = known_places(tokens, tokenizer)
    return int(places[token_range(tokenizer, tokens[places].tolist(), position, position + 1)[1] - 1])


def token_range(tokenizer: Tokenizer, ids: Sequence[int], start: int, stop: int) -> tuple[int, int]:
    """``[first, last)`` of the tokens that hold characters ``[start, stop)`` of the decoded text of ``ids``, or some
    bytes of them."""

    def complete(count: int) -> int:
        # Until the last of its bytes, a character is decoded as U+FFFD, or several of them.
        return len(tokenizer.decode(ids[:count]).rstrip("\ufffd"))

    def begun(count: int) -> int:
        text = tokenizer.decode(ids[:count])
        return len(text.rstrip("\ufffd")) + text.endswith("\ufffd")

    counts = range(len(ids) + 1)
    first = min(bisect_right(counts, start, key=begun), len(ids)) - 1
    return first, max(min(bisect_left(counts, stop, key=complete), len(ids)), first + 1)


def search_table(found: Search) -> Table:
    """The documents that contain a text."""
    table = Table("document", "occurrences", "at character", "at token", "first occurrence", show_lines=True)
    for hit in found.hits:
        table.add_row(
            str(hit.document), f"{hit.occurrences:,}", f"{hit.position:,}", f"{hit.token:,}", Text(hit.context)
        )
    return table


def as_stored(tokenizer: Tokenizer, text: str) -> str:
    """What becomes of ``text`` on its way through the tokenizer, as of every document: mostly, it stays the same."""
    return tokenizer.decode(tokenizer.encode(text))
