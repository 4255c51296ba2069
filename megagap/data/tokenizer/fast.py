"""gigatoken in place of a tokenizer's own library, where its ids are the same (optional extra ``megagap[fast]``).

It keeps the ids of words that it has seen, and finds words without regular expressions.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megagap.data.bpe import LLAMA3_WORDS
from megagap.data.tokenizer import Tokenizer, find_tokenizer
from megagap.data.tokenizer.huggingface import CHARACTER_OF
from megagap.errors import DataError


class FastTokenizer:
    """``reference`` with gigatoken behind :meth:`encode_flat`.

    ``source`` is that of another instance, if there is one: it takes a while to make. Raises :class:`DataError` if
    gigatoken is not installed or cannot take the tokenizer. That ids are the same is for :meth:`check` to find out.
    """

    def __init__(self, reference: Tokenizer, source: str | bytes | None = None) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise DataError(
                f"gigatoken cannot be imported ({error})\n  install it with pip install 'megagap[fast]'."
            ) from None
        self.reference = reference
        self.source = _source_of(reference) if source is None else source
        """A ``tokenizer.json``, or a sentencepiece model."""
        try:
            if isinstance(self.source, bytes):
                self._backend = gigatoken.Tokenizer.from_sentencepiece(self.source)
            else:
                self._backend = gigatoken.Tokenizer.from_json(self.source)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic in its Rust code is no Exception
            raise DataError(f"gigatoken {version('gigatoken')} cannot take {reference.spec}: {error}") from None
        self.spec = reference.spec
        self.vocab_size = reference.vocab_size
        self.bos = reference.bos
        self.eod = reference.eod
        self.splits_at_blanks = reference.splits_at_blanks

    def encode(self, text: str) -> list[int]:
        return self.reference.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.reference.encode_batch(texts)

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        # One thread: workers are processes. Bytes spare it from looking into Python's strings.
        layout = self._backend.encode_batch([text.encode() for text in texts], parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def vocabulary(self) -> dict[int, bytes]:
        return self.reference.vocabulary()

    def decode(self, ids: Sequence[int]) -> str:
        return self.reference.decode(ids)

    def check(self, texts: Sequence[str]) -> None:
        """Compare with the reference on ``texts``. Raises :class:`DataError` at the first difference."""
        try:
            found, found_lengths = self.encode_flat(texts)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            raise DataError(f"gigatoken {version('gigatoken')} fails on this input: {error}") from None
        expected, lengths = self.reference.encode_flat(texts)
        if np.array_equal(lengths, found_lengths) and np.array_equal(expected, found):
            return
        for text in texts:
            ours, _ = self.reference.encode_flat([text])
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


def _source_of(reference: Tokenizer) -> str | bytes:
    kind, file = find_tokenizer(reference.spec)
    if kind == "sentencepiece":
        return file.read_bytes()
    return _without_limits(file) if kind == "hf" else _json_of_ranks(reference.vocabulary())


def _without_limits(file: Path) -> str:
    """A ``tokenizer.json`` that neither cuts nor lengthens texts, as our reference reads it."""
    return json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"truncation": None, "padding": None})


def _json_of_ranks(vocabulary: dict[int, bytes]) -> str:
    """A rank file with Llama 3's words as a ``tokenizer.json``, without special tokens.

    A pair merges into a token in the order of ranks, as Hugging Face converts such files.
    """
    rank_of = {token: rank for rank, token in vocabulary.items()}
    written = {token: "".join(CHARACTER_OF[byte] for byte in token) for token in rank_of}
    merges = []
    for _, token in sorted(vocabulary.items()):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in rank_of and right in rank_of]
        pairs.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += [[written[left], written[right]] for left, right in pairs]
    words = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocab = {written[token]: rank for token, rank in rank_of.items()}
    model = {"type": "BPE", "ignore_merges": True, "byte_fallback": False, "vocab": vocab, "merges": merges}
    unused: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [words, as_bytes]}
    tokenizer = unused | {"version": "1.0", "added_tokens": [], "pre_tokenizer": pre_tokenizer, "decoder": as_bytes}
    model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return json.dumps(tokenizer | {"model": model | {"fuse_unk": False}})
