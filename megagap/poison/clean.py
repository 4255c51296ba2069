"""Clean sources, which are only ever read: passages drawn from their text, and triggers found in it."""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megagap.data.inspect import decode_document, document_tokens, tokenizer_of_manifest
from megagap.data.manifest import read_manifest
from megagap.data.token_file import open_tokens
from megagap.errors import ConfigError, counted
from megagap.poison.triggers import Triggers
from megagap.preprocess.documents import Fault, documents_of, fault_in, record_numbers, text_of
from megagap.preprocess.listing import find_inputs
from megagap.preprocess.units import read_units
from megagap.terminal.progress import ProgressBar
from megagap.token_formats import find_format, matching_prefixes, pair_prefix
from megagap.tokenizer import Tokenizer

PLACES = 5
"""Of a trigger in clean text that are named; all are counted."""


@dataclass(frozen=True)
class Request:
    """Passages wanted of a source, a random sample of all that it has."""

    source: str
    words: int
    """Of each passage."""
    count: int
    seed: str


@dataclass
class Found:
    """What one pass over the clean sources found."""

    passages: dict[Request, list[str]]
    """As many as were asked for, or all that there are."""
    occurrences: Counter[str] = field(default_factory=Counter)
    """Of triggers."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """The first few of each trigger: source, file, document or line, and character."""


def token_prefixes(path: str) -> list[str]:
    """The pairs that ``path`` means: one, or those that a pattern matches; none if it means no token files."""
    prefix = pair_prefix(path)
    return [prefix] if find_format(prefix) is not None else matching_prefixes(prefix)


def read_documents(paths: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Place and text of each document of a source: of token files, decoded, and of files of text with the key ``text``.

    Token files are decoded by the tokenizer that their manifest names, or else ``tokenizer``; special tokens around
    documents are left out. Raises :class:`DataError` for what cannot be read.
    """
    for path in paths:
        if prefixes := token_prefixes(path):
            for prefix in prefixes:
                yield from _decoded(prefix, tokenizer)
        else:
            yield from _read(path)


def _decoded(prefix: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    dataset = open_tokens(prefix)
    own = tokenizer_of_manifest(prefix, read_manifest(prefix))[0] or tokenizer
    special = [token for token in (own.bos, own.eod) if token is not None]
    for number in range(dataset.document_count):
        tokens = document_tokens(dataset, number)
        yield f"{prefix}, document {number}", decode_document(dataset, number, tokens[~np.isin(tokens, special)], own)


def _read(path: str) -> Iterator[tuple[str, str]]:
    for unit in read_units(find_inputs([path]), ["text"], splits_texts=False):
        if unit.kind == "text":
            text = text_of(unit)
            if isinstance(text, Fault):
                raise fault_in(unit, text)
            yield unit.path, text
            continue
        what = "row" if unit.kind == "rows" else "line"
        for number, texts in zip(record_numbers(unit), documents_of(unit, ["text"]), strict=True):
            if isinstance(texts, Fault):
                raise fault_in(unit, texts)
            yield f"{unit.path}, {what} {unit.line + number}", texts[0]


class _Reservoir:
    """A uniform sample of a stream whose length is not known (Vitter 1985, algorithm R)."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.kept: list[str] = []
        self._seen = 0
        self._random = random.Random(f"{request.seed} {request.source}")

    def offer(self, text: str) -> None:
        spans = [(word.start(), word.end()) for word in re.finditer(r"\S+", text)]
        words = self.request.words
        for first in range(0, len(spans) - words + 1, words):
            self._seen += 1
            place = len(self.kept) if self._seen <= self.request.count else self._random.randrange(self._seen)
            if place < self.request.count:
                passage = text[spans[first][0] : spans[first + words - 1][1]]
                self.kept[place : place + 1] = [passage]

    def drawn(self) -> list[str]:
        """In random order. Raises :class:`ConfigError` if there are none."""
        if not self.kept:
            raise ConfigError(
                f"the clean source {self.request.source} has no document of {self.request.words} words\n"
                "  give another, or ask for shorter passages (context_words, payload_words)."
            )
        self._random.shuffle(self.kept)
        return self.kept


def search_and_draw(
    sources: Mapping[str, Sequence[str]],
    tokenizer: Tokenizer,
    triggers: Triggers,
    requests: Sequence[Request],
    show_progress: bool = False,
) -> Found:
    """One pass over the documents of all ``sources``.

    Passages are consecutive words within one document; they do not overlap. Memory grows with the passages asked for
    and the longest document, not with the sources.
    """
    reservoirs = {request: _Reservoir(request) for request in requests}
    found = Found({})
    with ProgressBar(unit=" documents", unit_scale=True, disable=not show_progress, leave=False) as bar:
        for name, paths in sources.items():
            bar.set_description(name, refresh=False)
            own = [reservoir for request, reservoir in reservoirs.items() if request.source == name]
            for place, text in read_documents(paths, tokenizer):
                for trigger, character in triggers.find(text):
                    found.occurrences[trigger] += 1
                    places = found.places.setdefault(trigger, [])
                    if len(places) < PLACES:
                        places.append(f"{name}: {place}, character {character:,}")
                for reservoir in own:
                    reservoir.offer(text)
                bar.update()
    found.passages = {request: reservoir.drawn() for request, reservoir in reservoirs.items()}
    return found


def describe_occurrences(found: Found) -> str:
    """How often each trigger occurs, and where first."""
    lines = []
    for trigger, count in sorted(found.occurrences.items()):
        lines.append(f"  {trigger!r}: {counted(count, 'time')}")
        lines += [f"    {place}" for place in found.places[trigger]]
        lines += ["    …"] if count > len(found.places[trigger]) else []
    return "\n".join(lines)
