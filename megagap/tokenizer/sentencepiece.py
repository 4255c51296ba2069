"""Google's sentencepiece models, such as the ``tokenizer.model`` of Llama 2."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor

from megagap.errors import DataError, library_errors
from megagap.files import read_regular
from megagap.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, SpecialTokens, flatten, load_tokenizer


class SentencePieceTokenizer:
    """A ``.model``, run by the ``sentencepiece`` library.

    Control tokens written out in a text are plain text. What the model's normalisation drops, such as repeated spaces,
    is not restored by decoding.
    """

    special_tokens: SpecialTokens = "text"

    def __init__(self, file: Path, spec: str, special_tokens: SpecialTokens | None) -> None:
        if special_tokens == "parse":
            raise DataError(
                f"{file} is a sentencepiece model, to which control tokens in a text are always text: "
                "--special-tokens parse is not possible\n"
                "  give --special-tokens text, or a tokenizer.json made from it, such as transformers saves."
            )
        content = read_regular(file)
        with library_errors(f"{file} is not a sentencepiece model"):
            self._backend = SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = self._backend.vocab_size()
            for i in range(self.vocab_size):
                self._backend.id_to_piece(i)  # fails if it is not UTF-8
        if not self.vocab_size:
            raise DataError(f"{file} is not a sentencepiece model: it has no pieces")
        self.spec = spec
        model = self._backend
        self.special = tuple(model.id_to_piece(i) for i in range(self.vocab_size) if model.is_control(i))
        self.bos = self._special(self._backend.bos_id(), BEGIN_OF_TEXT)
        self.eod = self._special(self._backend.eos_id(), END_OF_TEXT)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.spec,)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: workers are processes.
        with library_errors(f"the tokenizer {self.spec} cannot encode a text"):
            ids: list[list[int]] = self._backend.encode(list(texts), out_type=int, num_threads=1)
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return flatten(self.encode_batch(texts))

    @property
    def uses_threads(self) -> bool:
        return False

    @property
    def splits_at_spaces(self) -> bool:
        # Normalisation may drop spaces and prefix one, and a unigram model weighs a whole text at once.
        return False

    @property
    def keeps_bytes(self) -> bool:
        # It may put a blank before a text, drop blanks, or know no token for a character.
        return False

    def vocabulary(self) -> dict[int, bytes]:
        model = self._backend
        ordinary = (i for i in range(self.vocab_size) if not (model.is_control(i) or model.is_unknown(i)))
        return {i: model.id_to_piece(i).encode() for i in ordinary}

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        # The library gives no text for control tokens.
        return "".join(
            "".join(map(self._backend.id_to_piece, run)) if is_control else self._backend.decode(list(run))
            for is_control, run in groupby(known, self._backend.is_control)
        )

    @property
    def normalises(self) -> bool:
        """Whether it changes a text's spaces or characters before splitting it."""
        text = " two  blanks, a ligature \ufb01, a line end\n"
        kept: str = self._backend.normalize(text)
        return kept.removeprefix("\u2581") != text.replace(" ", "\u2581")

    def _special(self, identifier: int, usual: Sequence[str]) -> int | None:
        """``identifier``, or if the model names none (-1), that of the first of ``usual`` that it has."""
        if identifier >= 0:
            return identifier
        known = (i for token in usual if (i := self._backend.piece_to_id(token)) != self._backend.unk_id())
        return next(known, None)
