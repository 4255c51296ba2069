"""OpenAI's tiktoken with Llama 3's words and special tokens."""

from binascii import a2b_base64
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from tiktoken import Encoding
from tokenizers import Tokenizer

from megagap.errors import DataError, library_errors
from megagap.files import read_regular
from megagap.tokenizer import SpecialTokens, load_tokenizer
from megagap.tokenizer.words import CHARACTER_OF, LLAMA3_WORDS, without_long_whitespace

NAMED_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
SPECIAL_TOKENS = (*NAMED_TOKENS, *(f"<|reserved_special_token_{i}|>" for i in range(2, 256 + 2 - len(NAMED_TOKENS))))
"""Llama 3's 256 special tokens, whose ids follow the ranks (Llama 3.1's names; 3.0 had some of them reserved)."""


class TiktokenTokenizer:
    """A rank file, run by the ``tiktoken`` library.

    Such a file contains only tokens: how text is split into words, and which special tokens there are, is taken from
    Llama 3. Special tokens written out in a text are plain text, as to ``Encoding.encode_ordinary``, or these tokens.
    """

    special = SPECIAL_TOKENS

    def __init__(self, file: Path, spec: str, special_tokens: SpecialTokens | None) -> None:
        ranks = read_ranks(file)
        special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._ranks = ranks
        self._given = special_tokens
        self.special_tokens: SpecialTokens = special_tokens or "text"
        with library_errors(f"{file} cannot be used by tiktoken"):
            self._backend = Encoding(file.name, pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=special)
        self.spec = spec
        self.vocab_size = len(ranks) + len(special)
        self.bos: int | None = special["<|begin_of_text|>"]
        self.eod: int | None = special["<|end_of_text|>"]

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.spec, self._given)

    def encode(self, text: str) -> list[int]:
        return [int(i) for piece in self._pieces(text) for i in piece]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        arrays = [self._pieces(text) for text in texts]
        lengths = np.fromiter((sum(map(len, pieces)) for pieces in arrays), np.int64, len(arrays))
        return np.concatenate([np.zeros(0, np.uint32), *chain.from_iterable(arrays)]), lengths

    def _pieces(self, text: str) -> list[NDArray[np.uint32]]:
        # With no special tokens allowed or refused, this is encode_ordinary without building a list.
        allowed = {*self.special} if self.special_tokens == "parse" else set()
        with library_errors(f"the tokenizer {self.spec} cannot encode a text"):
            text.encode()  # half of a surrogate pair, which the library would replace
            return [
                self._backend.encode_to_numpy(piece, allowed_special=allowed, disallowed_special=())
                for piece in without_long_whitespace(text)
            ]

    @property
    def uses_threads(self) -> bool:
        return False

    @property
    def splits_at_spaces(self) -> bool:
        return True

    @property
    def keeps_bytes(self) -> bool:
        return True

    def vocabulary(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self._ranks.items()}

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids if i < self.vocab_size])


def read_ranks(file: Path) -> dict[bytes, int]:
    """The tokens of a rank file, a token in base64 and its rank in each line, in the order of their ranks.

    Raises :class:`DataError` for a malformed line, or if ranks or single bytes are missing.
    """
    # The library's own reader does not report lines, and caches files by their paths.
    lines = read_regular(file).splitlines()
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[a2b_base64(token, strict_mode=True)] = int(rank)
        except ValueError:
            shown = line[:60].decode("ascii", errors="replace")
            raise DataError(
                f"{file} is not a tiktoken rank file: line {number} is not a token in base64 and its rank: {shown!r}"
            ) from None
    # Special tokens follow the ranks, so these must have no gaps; every text can be encoded if every byte can.
    absent = {*range(len(ranks))} - {*ranks.values()}
    if absent:
        raise DataError(f"{file} is damaged: it has {len(ranks):,} tokens, but none of rank {min(absent)}")
    byte = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if byte is not None:
        raise DataError(f"{file} has no token for the byte {byte:#04x}, so that some texts cannot be encoded")
    return ranks


def to_hugging_face(file: Path) -> Tokenizer:
    """The rank file as a ``tokenizer.json`` with the same ids, but to which a special token written out is that token.

    Raises :class:`DataError` as :func:`read_ranks`.
    """
    ranks = read_ranks(file)
    return Tokenizer.from_str(json_of_ranks({rank: token for token, rank in ranks.items()}, SPECIAL_TOKENS))


def json_of_ranks(vocabulary: dict[int, bytes], special: Sequence[str] = ()) -> str:
    """A rank file with Llama 3's words as a ``tokenizer.json``; the ids of ``special`` follow the ranks.

    Any two tokens that together are a third may be merged into it; the lower its rank, the sooner.
    """
    rank_of = {token.decode("latin-1").translate(CHARACTER_OF): rank for rank, token in sorted(vocabulary.items())}
    merges: list[tuple[str, str]] = []
    for token in rank_of:
        pairs = [
            (left, right)
            for i in range(1, len(token))
            if (left := token[:i]) in rank_of and (right := token[i:]) in rank_of
        ]
        if len(pairs) > 1:
            # As Hugging Face's own converter has them; with Llama 3's vocabulary their order was never seen to matter.
            pairs.sort(key=lambda pair: (rank_of[pair[0]], rank_of[pair[1]]))
        merges += pairs
    words = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # ignore_merges: a word that is a token is that token, whether or not merges lead to it, as in tiktoken.
    model = {"type": "BPE", "ignore_merges": True, "byte_fallback": False, "vocab": rank_of, "merges": merges}
    unused: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [words, as_bytes]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(vocabulary) + i, "content": token} | flags for i, token in enumerate(special)]
    tokenizer = unused | {"version": "1.0", "added_tokens": added, "pre_tokenizer": pre_tokenizer, "decoder": as_bytes}
    model |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return orjson.dumps(tokenizer | {"model": model | {"fuse_unk": False}}).decode()
