"""Units of text to tokens: what a worker process does."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagap.data.format import best_dtype
from megagap.errors import DataError
from megagap.preprocess.documents import Fault, documents_of, record_numbers, text_of
from megagap.preprocess.units import Unit
from megagap.tokenizer import TextEncoder
from megagap.tokenizer.occurrences import Occurrences

REPORTED = 5
"""Unusable documents that are reported with file, line and fault; further ones are only counted."""

PIECE = 1 << 20
"""Texts of this many characters or more are encoded in pieces, where that provably changes nothing: libraries need many
times the memory of a text, and some more than linear time."""
TEXT_CUT = re.compile(r"[!-~](?= )")


@dataclass(frozen=True)
class EncodedTexts:
    """The texts of a unit's documents under one key, laid end to end."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.uint32]
    """Of each document: its line or row within the unit, from 0."""
    characters: int = 0
    bytes: int = 0
    """Of them all, in UTF-8."""
    empty: int = 0
    short: int = 0
    special: int = 0
    """Number of special tokens written out in them."""


@dataclass(frozen=True)
class EncodedUnit:
    texts: list[EncodedTexts]
    """In the order of the keys."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Unusable documents by reason."""
    faults: list[Fault] = field(default_factory=list)
    """The first of them."""


@dataclass(frozen=True)
class Encoder:
    """Encodes units.

    ``bos`` and ``eod`` are put around each document, unless None. Documents of fewer than ``min_tokens`` tokens,
    not counting these two, are left out, as are empty ones.
    """

    tokenizer: TextEncoder
    keys: Sequence[str]
    bos: int | None = None
    eod: int | None = None
    min_tokens: int = 0

    def __call__(self, unit: Unit) -> EncodedUnit:
        """A text that the tokenizer fails on is a fault. Raises :class:`DataError` for ids outside the vocabulary."""
        if unit.kind == "text":
            # A piece of a document: whoever joins the pieces sees whether it is too short and where it ends.
            text = text_of(unit)
            if isinstance(text, Fault):
                return EncodedUnit([], Counter([text.reason]), [text])
            try:
                tokens, lengths = self._encode(unit, [text])
            except DataError:
                if fault := self._fault_of([text], 0):
                    return EncodedUnit([], Counter([fault.reason]), [fault])
                raise
            counts = (len(text), utf8_bytes(text))
            numbers = np.zeros(1, np.uint32)
            return EncodedUnit([EncodedTexts(tokens, lengths, numbers, *counts, special=self._count_special(text))])
        found, numbers = list(documents_of(unit, self.keys)), np.array(record_numbers(unit), np.uint32)
        try:
            texts = self._texts_by_key(unit, found, numbers)
        except DataError:
            checked = [
                d if isinstance(d, Fault) else self._fault_of(d, n) or d
                for n, d in zip(numbers.tolist(), found, strict=True)
            ]
            if checked == found:
                raise
            found = checked
            texts = self._texts_by_key(unit, found, numbers)
        faults = [document for document in found if isinstance(document, Fault)]
        return EncodedUnit(texts, Counter(fault.reason for fault in faults), faults[:REPORTED])

    def encode_documents(self, texts: Sequence[str], names: Sequence[str] | None = None) -> EncodedTexts:
        """Whole documents that come from elsewhere.

        Raises :class:`DataError` naming one that cannot be encoded, by its number unless there are ``names``.
        """
        try:
            return self._texts(None, texts, np.arange(len(texts), dtype=np.uint32))
        except DataError:
            for text, name in zip(texts, names or range(len(texts)), strict=True):
                if fault := self._fault_of([text], 0):
                    raise DataError(f"document {name}: {fault.details}") from None
            raise

    def _texts_by_key(
        self, unit: Unit, found: Sequence[tuple[str, ...] | Fault], numbers: NDArray[np.uint32]
    ) -> list[EncodedTexts]:
        documents = [document for document in found if not isinstance(document, Fault)]
        usable = np.array([not isinstance(document, Fault) for document in found], bool)
        return [
            self._texts(unit, [document[i] for document in documents], numbers[usable]) for i in range(len(self.keys))
        ]

    def _fault_of(self, texts: Sequence[str], line: int) -> Fault | None:
        """For a document with these texts: what the tokenizer's library says if it fails on one."""
        try:
            self._ids(texts)
        except DataError as error:
            return Fault(line, "cannot be tokenised", error.args[0])
        return None

    @cached_property
    def _count_special(self) -> Occurrences:
        return Occurrences(self.tokenizer.special)

    def _texts(self, unit: Unit | None, texts: Sequence[str], numbers: NDArray[np.uint32]) -> EncodedTexts:
        tokens, lengths = self._encode(unit, texts)
        characters = np.fromiter(map(len, texts), np.int64, len(texts))
        sizes = np.fromiter(map(utf8_bytes, texts), np.int64, len(texts))
        special = np.fromiter(map(self._count_special, texts), np.int64, len(texts))
        kept = lengths >= max(self.min_tokens, 1)
        empty = int(np.count_nonzero(lengths == 0))
        short = int(np.count_nonzero(~kept)) - empty
        if empty or short:
            tokens, lengths = tokens[np.repeat(kept, lengths)], lengths[kept]
            characters, special, sizes, numbers = characters[kept], special[kept], sizes[kept], numbers[kept]
        ends = np.cumsum(lengths)
        if self.eod is not None:
            tokens = np.insert(tokens, ends, self.eod)
        if self.bos is not None:
            added = 0 if self.eod is None else np.arange(len(ends))
            tokens = np.insert(tokens, ends - lengths + added, self.bos)
        lengths = lengths + (self.bos is not None) + (self.eod is not None)
        counts = (int(characters.sum()), int(sizes.sum()), empty, short, int(special.sum()))
        return EncodedTexts(tokens, lengths, numbers, *counts)

    def _ids(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """As of :meth:`TextEncoder.encode_flat`."""
        if not (self.tokenizer.splits_at_spaces and any(len(text) > PIECE for text in texts)):
            return self.tokenizer.encode_flat(texts)
        pieces = [list(pieces_of(text)) for text in texts]
        tokens, lengths = self.tokenizer.encode_flat([piece for parts in pieces for piece in parts])
        return tokens, np.add.reduceat(lengths, np.cumsum([0, *map(len, pieces[:-1])]))

    def _encode(self, unit: Unit | None, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        tokens, lengths = self._ids(texts)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            wrong = int(tokens.max() if tokens.max() >= self.tokenizer.vocab_size else tokens.min())
            where = f"{unit.path}, from line {unit.line} on: " if unit else ""
            raise DataError(
                f"{where}the tokenizer {self.tokenizer.spec} returned the id {wrong}, which is outside its "
                f"vocabulary of {self.tokenizer.vocab_size:,}"
            )
        return tokens.astype(best_dtype(self.tokenizer.vocab_size), copy=False), lengths


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def pieces_of(text: str, size: int = PIECE) -> Iterator[str]:
    """``text`` cut between visible ASCII characters and spaces into pieces of ``size`` characters or a little more."""
    start = 0
    while found := TEXT_CUT.search(text, start + size - 1):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
