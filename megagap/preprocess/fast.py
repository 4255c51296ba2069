"""Whether gigatoken may stand in for a tokenizer's own library.

Only for a tokenizer all of whose features it is known to honour, and if its ids are the same on this very input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from megagap.errors import DataError
from megagap.preprocess.documents import Fault, documents_of, text_of
from megagap.preprocess.inputs import Input, is_plain_lines
from megagap.preprocess.units import Unit, read_units
from megagap.tokenizer import TextEncoder, Tokenizer
from megagap.tokenizer.fast import FastEncoder, FastSource

Fast = Literal["auto", "on", "off"]
"""Use gigatoken if it can be used and gives the same ids, insist on it, or never use it."""

RARE = (
    "e\u0301",
    "\u1100\u1161\u11a8",
    "\u0bc6\u0bbe",
    "\x85 \u00a0\u2003\u3000",
    "\ufb01 \uff11 \u200d \ufeff",
    "<s> </s>",
)
"""Compared whatever the input is, as samples may miss it: what normalisation changes, and what may be special."""
SAMPLES = 16
SAMPLE_BYTES = 1 << 17
"""Of each sample; together they take less than a second."""


def choose_encoder(
    reference: Tokenizer, fast: Fast, inputs: Sequence[Input], keys: Sequence[str]
) -> tuple[TextEncoder, str | None]:
    """``reference`` or a faster one with the same ids on samples of ``inputs``; for ``auto``, why it is not the latter.

    Raises :class:`DataError` if ``fast`` is ``on`` and gigatoken cannot be used.
    """
    if fast == "off":
        return reference, None
    try:
        encoder = FastEncoder(FastSource.of(reference))
        texts = [text for unit in _samples(inputs, keys) for text in _texts(unit, keys)]
        if inputs and not texts:
            raise DataError("the input has no sample on which gigatoken could be compared")
        encoder.check(reference, [*texts, *RARE, *reference.special])
    except DataError as error:
        if fast == "on":
            raise DataError(f"--fast on is not possible: {error.args[0]}") from None
        return reference, f"the tokenizer's own library is used: {error.args[0]}"
    return encoder, None


def _samples(inputs: Sequence[Input], keys: Sequence[str]) -> Iterator[Unit]:
    """Units from all over the inputs: from the start of files, and from within long JSON lines if files are few."""
    files = [file for file in inputs if file.size]
    files = [files[len(files) * i // SAMPLES] for i in range(SAMPLES)] if len(files) > SAMPLES else files
    places = SAMPLES // max(len(files), 1)
    for file in files:
        parts = [file]
        if places > 1 and file.share > SAMPLES * SAMPLE_BYTES and is_plain_lines(file.path):
            parts = [replace(file, start=file.start + file.share * i // places) for i in range(places)]
        for part in parts:
            units = read_units([part], keys, splits_texts=True, unit_bytes=SAMPLE_BYTES)
            yield from islice(units, max(places // len(parts), 1))


def _texts(unit: Unit, keys: Sequence[str]) -> Iterator[str]:
    """Those that can be read; the others come up when they are to be written."""
    if unit.kind == "text":
        text = text_of(unit)
        if not isinstance(text, Fault):
            yield text
        return
    for document in documents_of(unit, keys):
        if not isinstance(document, Fault):
            yield from document
