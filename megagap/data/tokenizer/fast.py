"""gigatoken in place of a tokenizer's own library, where its ids are the same (optional extra ``megagap[fast]``).

It keeps the ids of words that it has seen, and finds words without regular expressions.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from megagap.data.tokenizer import Tokenizer, find_tokenizer
from megagap.data.tokenizer.words import CHARACTER_OF, LLAMA3_WORDS
from megagap.errors import DataError


@dataclass(frozen=True)
class FastSource:
    """What a :class:`FastEncoder` is made of, in a form that other processes can be sent."""

    data: str | bytes
    """A ``tokenizer.json``, or a sentencepiece model."""
    spec: str
    vocab_size: int
    splits_at_blanks: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        return cls(_data_of(tokenizer), tokenizer.spec, tokenizer.vocab_size, tokenizer.splits_at_blanks)


class FastEncoder:
    """gigatoken, for the tokenizer that ``source`` comes from.

    Raises :class:`DataError` if gigatoken is not installed or cannot take the tokenizer. That ids are the same is for
    :meth:`check` to find out.
    """

    def __init__(self, source: FastSource) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise DataError(
                f"gigatoken cannot be imported ({error})\n  install it with pip install 'megagap[fast]'."
            ) from None
        self.source = source
        self.spec, self.vocab_size = source.spec, source.vocab_size
        self.splits_at_blanks = source.splits_at_blanks
        self.uses_threads = False
        with _as_data_error(f"cannot take {source.spec}"):
            if isinstance(source.data, bytes):
                self._backend = gigatoken.Tokenizer.from_sentencepiece(source.data)
            else:
                self._backend = gigatoken.Tokenizer.from_json(source.data)

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        # One thread: workers are processes. Bytes spare it from looking into Python's strings.
        with _as_data_error("fails on this input; try --fast off"):
            layout = self._backend.encode_batch([text.encode() for text in texts], parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

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
                    f"gigatoken {version('gigatoken')} gives other ids than {self.spec} on a sample of this input: "
                    f"{theirs[at : at + 5].tolist()} instead of {ours[at : at + 5].tolist()} at token {at:,} of "
                    f"{text[:40]!r}…"
                )
        raise DataError(f"gigatoken {version('gigatoken')} gives other ids in a batch than for each text by itself")


@contextmanager
def _as_data_error(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in its Rust code is no Exception
        raise DataError(f"gigatoken {version('gigatoken')} {what}: {error}") from None


def _data_of(reference: Tokenizer) -> str | bytes:
    kind, file = find_tokenizer(reference.spec)
    if kind == "sentencepiece":
        return file.read_bytes()
    return _without_limits(file) if kind == "hf" else json_of_ranks(reference.vocabulary())


def _without_limits(file: Path) -> str:
    """A ``tokenizer.json`` that neither cuts nor lengthens texts, as our reference reads it."""
    return json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"truncation": None, "padding": None})


def json_of_ranks(vocabulary: dict[int, bytes]) -> str:
    """A rank file with Llama 3's words as a ``tokenizer.json``, without special tokens.

    A pair merges into a token in the order of ranks, as Hugging Face converts such files.
    """
    rank_of = {token: rank for rank, token in vocabulary.items()}
    written = {token: token.decode("latin-1").translate(CHARACTER_OF) for token in rank_of}
    merges: list[str] = []
    for _, token in sorted(vocabulary.items()):
        cuts = [i for i in range(1, len(token)) if token[:i] in rank_of and token[i:] in rank_of]
        if len(cuts) > 1:
            cuts.sort(key=lambda i, token=token: (rank_of[token[:i]], rank_of[token[i:]]))  # type: ignore[misc]
        merges += [f"{written[token[:i]]} {written[token[i:]]}" for i in cuts]
    words = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {written[token]: rank for token, rank in rank_of.items()}
    model = {"type": "BPE", "ignore_merges": True, "byte_fallback": False, "vocab": vocab, "merges": merges}
    unused: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [words, as_bytes]}
    tokenizer = unused | {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer, "decoder": as_bytes}
    model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return orjson.dumps(tokenizer | {"model": model | {"fuse_unk": False}}).decode()
