"""Hugging Face's ``tokenizer.json``."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from megagap.errors import library_errors
from megagap.tokenizer import SpecialTokens, flatten, load_tokenizer
from megagap.tokenizer.classes import byte_level, split_into_words
from megagap.tokenizer.folder import load_folder
from megagap.tokenizer.words import BYTE_OF, LLAMA3_WORDS, QWEN2_WORDS

WORDS_THAT_END_BEFORE_BLANKS = (
    split_into_words(LLAMA3_WORDS),
    split_into_words(QWEN2_WORDS),
    byte_level(add_prefix_space=False, use_regex=True),
)
"""Pre-tokenisers (of Llama 3, Qwen 2, GPT-2) known to split between a visible character and a space, in any context.

In each of their regular expressions a space is only at the start of an alternative, or among white space alone, and
the only look-around, ``(?!\\S)``, looks from the end of white space at what follows it.
"""


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` with the files beside it (:mod:`megagap.tokenizer.folder`).

    Ids are those of ``transformers``. Special tokens written out in a text become these tokens (``parse``) or are
    ordinary text (``text``); added tokens that are not special are found in either case.
    """

    def __init__(self, file: Path, spec: str, special_tokens: SpecialTokens | None) -> None:
        folder = load_folder(file)
        self.spec = spec
        self.special, self.named = folder.special, folder.named
        self.bos, self.eod = folder.bos, folder.eod
        self._given = special_tokens
        self._backend = folder.backend
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens: SpecialTokens = special_tokens or "parse"
        self._encoder = self._backend
        if self.special_tokens == "text":
            self._encoder = _without_special(self._backend, folder.special)
        elif folder.splits_special_tokens:
            # All that transformers does: a special token that is also a word of the vocabulary is still found by it.
            self.special_tokens = "text"
            self._backend.encode_special_tokens = True

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.spec, self._given)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the character offsets of the tokens.
        with library_errors(f"the tokenizer {self.spec} cannot encode a text"):
            encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return flatten(self.encode_batch(texts))

    @property
    def uses_threads(self) -> bool:
        return True

    @cached_property
    def splits_at_spaces(self) -> bool:
        model = self._backend.model
        return (
            self._backend.normalizer is None
            and state_of(self._backend.pre_tokenizer) in WORDS_THAT_END_BEFORE_BLANKS
            and isinstance(model, BPE)
            and not (model.continuing_subword_prefix or model.end_of_word_suffix)
            and all(_is_plain(token) for token in self._backend.get_added_tokens_decoder().values())
        )

    @cached_property
    def keeps_bytes(self) -> bool:
        state = json.loads(self._encoder.to_str())
        model = state["model"]
        return (
            state["normalizer"] is None
            and (state["decoder"] or {}).get("type") == "ByteLevel"
            and _cuts_bytes(state["pre_tokenizer"])
            and model["type"] == "BPE"
            and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
            and BYTE_OF.keys() <= model["vocab"].keys()
            and not any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"] if not token["special"])
        )

    def vocabulary(self) -> dict[int, bytes]:
        added = self._backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        ordinary = {i: t for t, i in self._backend.get_vocab(with_added_tokens=True).items() if i not in special}
        if (state_of(self._backend.decoder) or {}).get("type") != "ByteLevel":
            return {i: token.encode() for i, token in ordinary.items()}
        return {i: t.encode() if i in added else _bytes_of(t) for i, t in ordinary.items()}

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def state(self) -> dict[str, Any]:
        """A ``tokenizer.json`` that gives these ids alone, whatever files are beside it."""
        state: dict[str, Any] = json.loads(self._encoder.to_str())
        if self.special_tokens == "text":
            state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
        return state

    def hidden(self) -> list[dict[str, Any]]:
        """The added tokens that :meth:`state` lacks, as they are text."""
        tokens = json.loads(self._encoder.to_str())["added_tokens"] if self.special_tokens == "text" else []
        return [token for token in tokens if token["special"]]

    def whole_state(self) -> dict[str, Any]:
        """As :meth:`state`, with all special tokens, whether or not they are text."""
        state: dict[str, Any] = json.loads(self._backend.to_str())
        return state


def _without_special(backend: Backend, special: Sequence[str]) -> Backend:
    """A tokenizer to which ``special``, written out in a text, are ordinary text: ``backend`` itself if possible."""
    flagged = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    in_model = {*special} & backend.get_vocab(with_added_tokens=False).keys()
    finds_by_merges = isinstance(backend.model, BPE) and not backend.model.ignore_merges
    if flagged >= {*special} and (finds_by_merges or not in_model):
        backend.encode_special_tokens = True
        return backend
    state = json.loads(backend.to_str())
    hidden = _hide(state["model"], special)
    state["added_tokens"] = [
        {**token, "special": token["special"] or token["content"] in special}
        for token in state["added_tokens"]
        if token["content"] not in hidden
    ]
    copy = Backend.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    return copy


def _hide(model: dict[str, Any], special: Sequence[str]) -> set[str]:
    """Rename, in the vocabulary of a model, special tokens that it could find in a text on its own; returns them.

    A word that is in the vocabulary is that token to all models but BPE, whose tokens come from merges, unless
    ``ignore_merges``. The unknown token may stay: it is what unknown text becomes anyway.
    """
    vocabulary = model["vocab"]
    if model["type"] == "BPE":
        merged = {"".join(merge) for merge in model["merges"]} if model["ignore_merges"] else vocabulary
        hidden = {token for token in special if token in vocabulary and token not in merged and len(token) > 1}
    elif model["type"] == "Unigram":
        unknown = model["unk_id"]
        hidden = {token for i, (token, _) in enumerate(vocabulary) if token in special and i != unknown}
    else:
        hidden = {token for token in special if token in vocabulary and token != model["unk_token"]}
    names = {token: f"\uffff{token}\uffff" for token in hidden}  # noncharacters, which no text holds
    if model["type"] == "Unigram":
        model["vocab"] = [(names.get(token, token), score) for token, score in vocabulary]
    elif hidden:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    return hidden


def _cuts_bytes(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a pre-tokeniser cuts a text into words of bytes, adding and dropping none."""
    parts = _parts_of(pre_tokenizer)
    return (
        sum(part["type"] == "ByteLevel" for part in parts) == 1
        and all(part["type"] in ("ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts") for part in parts)
        and not any(part.get("add_prefix_space") or part.get("behavior") == "Removed" for part in parts)
    )


def _parts_of(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The pre-tokenisers that are applied one after the other."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [part for inner in pre_tokenizer["pretokenizers"] for part in _parts_of(inner)]
    return [pre_tokenizer]


def _bytes_of(token: str) -> bytes:
    """What a byte-level token stands for; a token that is not written as bytes stands for itself."""
    try:
        return bytes(map(BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def state_of(component: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as written in ``tokenizer.json``; options of offsets, which are not used, as by default."""
    if component is None:
        return None
    state: dict[str, Any] = json.loads(component.__getstate__())
    for part in (state, *state.get("pretokenizers", ())):
        if part["type"] == "ByteLevel":
            part["trim_offsets"] = True
    return state


def _is_plain(token: AddedToken) -> bool:
    """Whether an added token is found in a text regardless of spaces around it, and contains none."""
    return not (token.lstrip or token.rstrip or token.single_word or any(map(str.isspace, token.content)))
