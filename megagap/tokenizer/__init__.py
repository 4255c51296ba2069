"""Tokenizers of three kinds, distinguished by the contents of their files.

``hf``: Hugging Face's ``tokenizer.json``. ``sentencepiece``: a ``.model``. ``tiktoken``: a rank file, such as the
``tokenizer.model`` of Llama 3. Ids are those of each library; of a ``tokenizer.json`` with files beside it, those of
``transformers``. No kind adds special tokens. Those that are written out in a text are text or tokens
(:data:`SpecialTokens`).
"""

import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megagap.errors import DataError, library_errors
from megagap.files import is_there, require_fetched, require_regular

END_OF_TEXT = ("<|end_of_text|>", "</s>", "<|endoftext|>")
BEGIN_OF_TEXT = ("<|begin_of_text|>", "<s>")

SpecialTokens = Literal["text", "parse"]
"""What a special token that is written out in a text is: ordinary text, or that token."""

KINDS = {
    "hf": "Hugging Face tokenizer.json",
    "sentencepiece": "sentencepiece model",
    "tiktoken": "tiktoken rank file",
}
"""Each kind's prefix in a specification, and what its file is called."""

STARTS = {
    "hf": re.compile(rb'\s*\{\s*["}]'),
    # Protocol buffers: a piece (field 1) of some length that starts with its text (field 1).
    "sentencepiece": re.compile(rb"\n[\x80-\xff]*[\x00-\x7f]\n"),
    # A token in base64 and its rank in each line.
    "tiktoken": re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s"),
}
"""How the file of each kind starts, tried in this order."""


class TextEncoder(Protocol):
    """Text to ids. No special tokens are added. It is pickled as its specification and rebuilt.

    Encoding raises :class:`DataError` for invalid text, or text on which the library fails.
    """

    @property
    def spec(self) -> str:
        """What :func:`load_tokenizer` was given."""

    @property
    def vocab_size(self) -> int:
        """The highest id + 1, added tokens included."""

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids of all texts laid end to end, integers of some kind, and the number of ids of each text."""

    @property
    def special(self) -> Sequence[str]:
        """The special tokens, as they are written."""

    @property
    def uses_threads(self) -> bool:
        """Whether :meth:`encode_flat` spreads texts over threads, as many as ``RAYON_NUM_THREADS`` says."""

    @property
    def splits_at_spaces(self) -> bool:
        """Whether ids provably stay the same if a text is cut between a visible ASCII character and a space after it.

        "Provably": it follows from the regular expression that finds words that no word spans such a place, and that
        no word depends on what lies beyond it.
        """


class Tokenizer(TextEncoder, Protocol):
    """Text to ids and back."""

    @property
    def special_tokens(self) -> SpecialTokens: ...

    @property
    def bos(self) -> int | None:
        """Id of the beginning of a text, if there is one."""

    @property
    def eod(self) -> int | None:
        """Id of the end of a document, if there is one."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @property
    def keeps_bytes(self) -> bool:
        """Whether the ids of any text stand for exactly its UTF-8 bytes (:meth:`vocabulary`, special tokens apart).

        Not so where blanks or characters are normalised before a text is encoded, or a token absorbs blanks around it.
        """

    def vocabulary(self) -> dict[int, bytes]:
        """The ordinary tokens, special ones left out: what each id stands for."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out; ids from ``vocab_size`` on are left out."""


def flatten(ids: Sequence[Sequence[int]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """What :meth:`TextEncoder.encode_flat` returns, from a list for each text."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


def fingerprint(tokenizer: Tokenizer, below: int | None = None) -> str:
    """A checksum of what the ids mean, or those ``below`` a number: equal for a rank file and a ``tokenizer.json`` of
    the same tokens.

    Special tokens are left out: their names vary between releases of one vocabulary.
    """
    tokens = sorted((i, token) for i, token in tokenizer.vocabulary().items() if below is None or i < below)
    return xxhash.xxh3_64_hexdigest(b"".join(b"%d %d %b" % (i, len(token), token) for i, token in tokens))


def load_tokenizer(spec: str | Path, special_tokens: SpecialTokens | None = None) -> Tokenizer:
    """Load the tokenizer that ``spec`` names: a folder or a file, with a prefix such as ``hf:`` to force its kind.

    ``special_tokens``: None is what each kind's own library does (:func:`usual_special_tokens`).

    Raises :class:`DataError` if there is none, or none that can be read.
    """
    kind, file = find_tokenizer(spec)
    # Imported here so that a kind's library is loaded only where it is used, and none to read token files.
    if kind == "hf":
        from megagap.tokenizer.huggingface import HuggingFaceTokenizer

        return HuggingFaceTokenizer(file, str(spec), special_tokens)
    if kind == "sentencepiece":
        from megagap.tokenizer.sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(file, str(spec), special_tokens)
    from megagap.tokenizer.tiktoken import TiktokenTokenizer

    return TiktokenTokenizer(file, str(spec), special_tokens)


def usual_special_tokens(kind: str) -> SpecialTokens:
    """What a library of this kind does with special tokens in a text by default."""
    return "parse" if kind == "hf" else "text"


def find_tokenizer(spec: str | Path) -> tuple[str, Path]:
    """The kind, a key of :data:`KINDS`, and the file of the tokenizer that ``spec`` names.

    Of a folder it is ``tokenizer.json``, else ``tokenizer.model``, else its only ``*.model`` or ``*.tiktoken``; with a
    forced kind, the first of these that is of that kind. Raises :class:`DataError` if there is none, or of no kind.
    """
    prefix, colon, rest = str(spec).partition(":")
    forced, path = (prefix, Path(rest)) if colon and prefix in KINDS else (None, Path(spec))
    if not is_there(path):
        raise DataError(f"the tokenizer {path} does not exist\n  give the file of a tokenizer, or its folder.")
    if os.path.isdir(path):
        return _find_in_folder(path, forced)
    require_regular(path)
    require_fetched(path)
    kind = forced or _kind_of(path)
    if kind is None:
        prefixed = ", ".join(f"{kind}:{path}" for kind in KINDS)
        raise DataError(
            f"{path} is not a tokenizer that can be read: neither a {', nor a '.join(KINDS.values())}\n"
            f"  if it is one, force its kind: {prefixed}."
        )
    return kind, path


def _find_in_folder(folder: Path, forced: str | None) -> tuple[str, Path]:
    usual = [file for name in ("tokenizer.json", "tokenizer.model") if is_there(file := folder / name)]
    with library_errors(f"cannot read {folder}"):
        others = sorted({*folder.glob("*.model"), *folder.glob("*.tiktoken")} - {*usual})
    found = [*usual, *others]
    if forced:
        found = [file for file in found if _kind_of(file) == forced][:1]
    elif usual:
        found = usual[:1]
    if not found:
        wanted = f"no {KINDS[forced]}" if forced else "no tokenizer: no tokenizer.json, *.model or *.tiktoken"
        raise DataError(f"{folder} contains {wanted}\n  give the file itself if it has another name.")
    if len(found) > 1:
        raise DataError(f"{folder} contains several tokenizers: {', '.join(f.name for f in found)}\n  name one.")
    return find_tokenizer(f"{forced}:{found[0]}" if forced else found[0])


def _kind_of(file: Path) -> str | None:
    start = _start_of(file)
    return next((kind for kind, pattern in STARTS.items() if pattern.match(start)), None)


def _start_of(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(4096)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
