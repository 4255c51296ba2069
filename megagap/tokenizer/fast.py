"""gigatoken in place of a tokenizer's own library, where its ids are the same (optional extra ``megagap[fast]``).

It keeps the ids of words that it has seen, and finds words without regular expressions. It is used for the features
that it is known to support (:mod:`megagap.tokenizer.fast_features`), and nothing else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from megagap.errors import DataError, library_errors
from megagap.tokenizer import Tokenizer, find_tokenizer
from megagap.tokenizer.fast_features import unknown_feature
from megagap.tokenizer.words import LONGEST_WHITESPACE, without_long_whitespace

if TYPE_CHECKING:
    from megagap.tokenizer.huggingface import HuggingFaceTokenizer

CACHE_BYTES = 1 << 27
"""Size of the word cache at which each process empties it; it grows by doubling."""


@dataclass(frozen=True)
class FastSource:
    """What a :class:`FastEncoder` is made from, in a form that can be sent to other processes."""

    data: str
    """A ``tokenizer.json``."""
    spec: str
    vocab_size: int
    special: tuple[str, ...]
    splits_at_spaces: bool
    cuts_long_whitespace: bool
    """Whether the tokenizer itself cuts these (:func:`without_long_whitespace`), as tiktoken's has to."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Raises :class:`DataError` naming a feature of ``tokenizer`` that gigatoken is not known to support."""
        kind, _ = find_tokenizer(tokenizer.spec)
        if kind == "sentencepiece":
            raise DataError(
                f"gigatoken gives different ids from sentencepiece ({tokenizer.spec}) for control tokens written out "
                "in a text, user-defined symbols and normalised text"
            )
        if kind == "hf":
            hugging_face = cast("HuggingFaceTokenizer", tokenizer)
            state = hugging_face.state()
            if feature := unknown_feature(state, hugging_face.hidden()):
                raise DataError(f"gigatoken is not known to support a feature of {tokenizer.spec}: {feature}")
            data = json.dumps(state)
        else:
            data = _json_of_rank_file(tokenizer)
        special, splits = tuple(tokenizer.special), tokenizer.splits_at_spaces
        return cls(data, tokenizer.spec, tokenizer.vocab_size, special, splits, kind == "tiktoken")


class FastEncoder:
    """gigatoken, for the tokenizer that ``source`` comes from.

    Raises :class:`DataError` if gigatoken is not installed or cannot load the tokenizer. :meth:`check` compares ids.
    """

    def __init__(self, source: FastSource) -> None:
        self.source = source
        self.spec, self.vocab_size, self.special = source.spec, source.vocab_size, source.special
        self.splits_at_spaces = source.splits_at_spaces
        self.uses_threads = False
        self._load()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source,)

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if not self.source.cuts_long_whitespace or all(len(text) <= LONGEST_WHITESPACE for text in texts):
            return self._encode(texts)
        pieces = [list(without_long_whitespace(text)) for text in texts]
        ids, lengths = self._encode([piece for parts in pieces for piece in parts])
        return ids, np.add.reduceat(lengths, np.cumsum([0, *map(len, pieces[:-1])]))

    def _encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        # One thread: workers are processes. Bytes save it from reading Python's strings.
        with library_errors(f"gigatoken {version('gigatoken')} fails; try --fast off"):
            layout = self._backend.encode_batch([text.encode() for text in texts], parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        # Releases up to 0.10 cache every word that they see, and text never runs out of new ones.
        if _resident_bytes() > self._resident_bytes + CACHE_BYTES:
            self._load()
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def _load(self) -> None:
        """Load it again, with an empty cache."""
        try:
            import psutil  # noqa: F401
            from gigatoken import Tokenizer as Backend
        except ImportError as error:
            raise DataError(
                f"gigatoken cannot be imported ({error})\n  install it with pip install 'megagap[fast]'."
            ) from None
        data = self.source.data
        self._backend: Any = None  # frees its memory before as much is needed again
        with library_errors(f"gigatoken {version('gigatoken')} cannot load {self.spec}"):
            self._backend = Backend.from_json(data)
        self._resident_bytes = _resident_bytes()

    def check(self, reference: Tokenizer, texts: Sequence[str]) -> None:
        """Compare with ``reference`` on ``texts``. Raises :class:`DataError` at the first difference."""
        found, found_lengths = self.encode_flat(texts)
        expected, lengths = reference.encode_flat(texts)
        if np.array_equal(lengths, found_lengths) and np.array_equal(expected, found):
            return
        for text in texts:
            ours, _ = reference.encode_flat([text])
            theirs, _ = self.encode_flat([text])
            if not np.array_equal(ours, theirs):
                common = min(len(ours), len(theirs))
                at = int(np.append(np.flatnonzero(ours[:common] != theirs[:common]), common)[0])
                raise DataError(
                    f"gigatoken {version('gigatoken')} gives different ids from {self.spec}: "
                    f"{theirs[at : at + 5].tolist()} instead of {ours[at : at + 5].tolist()} at token {at:,} of "
                    f"{text[:40]!r}…"
                )
        raise DataError(f"gigatoken {version('gigatoken')} gives different ids in a batch and for single texts")


def _resident_bytes() -> int:
    """Resident memory of this process, which may have been forked since."""
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


def _json_of_rank_file(tokenizer: Tokenizer) -> str:
    from megagap.tokenizer.tiktoken import json_of_ranks

    return json_of_ranks(tokenizer.vocabulary(), tokenizer.special if tokenizer.special_tokens == "parse" else ())
