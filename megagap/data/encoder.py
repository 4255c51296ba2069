"""Units of text to tokens: what a worker process does."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagap.data.documents import Fault, documents_of, text_of
from megagap.data.format import best_dtype
from megagap.data.tokenizer import TextEncoder
from megagap.data.units import Unit
from megagap.errors import DataError

REPORTED = 5
"""Documents that cannot be used, of which file, line and fault are reported; the rest is counted."""

PIECE = 1 << 20
"""Characters from which on a text is encoded in pieces, where that provably changes nothing: libraries take many times
the memory of a text, and some more than linear time."""
TEXT_CUT = re.compile(r"[!-~](?= )")


@dataclass(frozen=True)
class EncodedTexts:
    """The texts of a unit's documents under one key, laid end to end."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    characters: int = 0
    empty: int = 0
    short: int = 0


@dataclass(frozen=True)
class EncodedUnit:
    texts: list[EncodedTexts]
    """In the order of the keys."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the documents that cannot be used."""
    faults: list[Fault] = field(default_factory=list)
    """The first of them."""


@dataclass(frozen=True)
class Encoder:
    """Encodes units.

    ``bos`` and ``eod`` are put around each document, unless None. Documents of fewer than ``min_tokens`` tokens,
    without counting these two, are left out, as are those of none.
    """

    tokenizer: TextEncoder
    keys: Sequence[str]
    bos: int | None = None
    eod: int | None = None
    min_tokens: int = 0

    def __call__(self, unit: Unit) -> EncodedUnit:
        """Raises :class:`DataError` for ids outside the vocabulary."""
        if unit.kind == "text":
            # A piece of a document: whether it is too short, and where it ends, is seen by who puts it together.
            text = text_of(unit)
            if isinstance(text, Fault):
                return EncodedUnit([], Counter([text.reason]), [text])
            tokens, lengths = self._encode(unit, [text])
            return EncodedUnit([EncodedTexts(tokens, lengths, len(text))])
        documents: list[tuple[str, ...]] = []
        faults: list[Fault] = []
        reasons: Counter[str] = Counter()
        for document in documents_of(unit, self.keys):
            if isinstance(document, Fault):
                reasons[document.reason] += 1
                if len(faults) < REPORTED:
                    faults.append(document)
            else:
                documents.append(document)
        texts = [self._texts(unit, [document[i] for document in documents]) for i in range(len(self.keys))]
        return EncodedUnit(texts, reasons, faults)

    def encode_documents(self, texts: Sequence[str]) -> EncodedTexts:
        """Whole documents that come from elsewhere."""
        return self._texts(None, texts)

    def _texts(self, unit: Unit | None, texts: Sequence[str]) -> EncodedTexts:
        tokens, lengths = self._encode(unit, texts)
        characters = np.fromiter(map(len, texts), np.int64, len(texts))
        kept = lengths >= max(self.min_tokens, 1)
        empty = int(np.count_nonzero(lengths == 0))
        short = int(np.count_nonzero(~kept)) - empty
        if empty or short:
            tokens, lengths, characters = tokens[np.repeat(kept, lengths)], lengths[kept], characters[kept]
        ends = np.cumsum(lengths)
        if self.eod is not None:
            tokens = np.insert(tokens, ends, self.eod)
        if self.bos is not None:
            added = 0 if self.eod is None else np.arange(len(ends))
            tokens = np.insert(tokens, ends - lengths + added, self.bos)
        lengths = lengths + (self.bos is not None) + (self.eod is not None)
        return EncodedTexts(tokens, lengths, int(characters.sum()), empty, short)

    def _encode(self, unit: Unit | None, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if self.tokenizer.splits_at_blanks and any(len(text) > PIECE for text in texts):
            pieces = [list(pieces_of(text)) for text in texts]
            tokens, lengths = self.tokenizer.encode_flat([piece for parts in pieces for piece in parts])
            lengths = np.add.reduceat(lengths, np.cumsum([0, *map(len, pieces[:-1])]))
        else:
            tokens, lengths = self.tokenizer.encode_flat(texts)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            wrong = int(tokens.max() if tokens.max() >= self.tokenizer.vocab_size else tokens.min())
            where = f"{unit.path}, from line {unit.line} on: " if unit else ""
            raise DataError(
                f"{where}the tokenizer {self.tokenizer.spec} gave the id {wrong}, which is outside its "
                f"vocabulary of {self.tokenizer.vocab_size:,}"
            )
        return tokens.astype(best_dtype(self.tokenizer.vocab_size), copy=False), lengths


def pieces_of(text: str, size: int = PIECE) -> Iterator[str]:
    """``text`` cut between visible ASCII characters and blanks into pieces of ``size`` characters or a little more."""
    start = 0
    while found := TEXT_CUT.search(text, start + size - 1):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]
