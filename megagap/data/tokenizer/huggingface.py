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

from megagap.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, flatten, load_tokenizer
from megagap.data.tokenizer.words import BYTE_OF, LLAMA3_WORDS, QWEN2_WORDS
from megagap.errors import DataError


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _words(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(use_regex=False)]}


WORDS_THAT_END_BEFORE_BLANKS = (_words(LLAMA3_WORDS), _words(QWEN2_WORDS), _byte_level(use_regex=True))
"""Pre-tokenisers (of Llama 3, Qwen 2, GPT-2) known to cut between a visible character and a blank, whatever surrounds.

In each of their regular expressions a blank stands only at the start of an alternative, or among white space alone, and
the only look-around, ``(?!\\S)``, looks from the end of white space at what follows it.
"""


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, run by the ``tokenizers`` library; ``tokenizer_config.json`` beside it is heeded.

    Special tokens written out in a text become these tokens, as everywhere in Hugging Face's libraries.
    """

    def __init__(self, file: Path, spec: str) -> None:
        try:
            self._backend = Backend.from_str(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{file} is no Hugging Face tokenizer.json: {error}") from None
        # A file may ask for either, which would cut or lengthen documents.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.spec = spec
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        config = file.with_name("tokenizer_config.json")
        named = _read_json(config) if config.exists() else {}
        self.bos = self._special(config, "bos_token", named, BEGIN_OF_TEXT)
        self.eod = self._special(config, "eos_token", named, END_OF_TEXT)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_tokenizer, (self.spec,)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the character offsets of the tokens.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        return flatten(self.encode_batch(texts))

    @property
    def uses_threads(self) -> bool:
        return True

    @cached_property
    def splits_at_blanks(self) -> bool:
        model = self._backend.model
        return (
            self._backend.normalizer is None
            and _state_of(self._backend.pre_tokenizer) in WORDS_THAT_END_BEFORE_BLANKS
            and isinstance(model, BPE)
            and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
            and all(_is_plain(token) for token in self._backend.get_added_tokens_decoder().values())
        )

    def vocabulary(self) -> dict[int, bytes]:
        added = self._backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        ordinary = {i: t for t, i in self._backend.get_vocab(with_added_tokens=True).items() if i not in special}
        if (_state_of(self._backend.decoder) or {}).get("type") != "ByteLevel":
            return {i: token.encode() for i, token in ordinary.items()}
        return {i: t.encode() if i in added else bytes(map(BYTE_OF.__getitem__, t)) for i, t in ordinary.items()}

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def _special(self, config: Path, key: str, named: dict[str, Any], usual: Sequence[str]) -> int | None:
        token = named.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            return next((i for i in map(self._backend.token_to_id, usual) if i is not None), None)
        identifier: int | None = self._backend.token_to_id(token) if isinstance(token, str) else None
        if identifier is None:
            raise DataError(f"{config} names {key} = {token!r}, which the tokenizer.json beside it does not have")
        return identifier


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} should hold a JSON object")
    return value


def _state_of(component: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as it stands in ``tokenizer.json``; offsets, which we do not use, as by default."""
    if component is None:
        return None
    state: dict[str, Any] = json.loads(component.__getstate__())
    for part in (state, *state.get("pretokenizers", ())):
        if part["type"] == "ByteLevel":
            part["trim_offsets"] = True
    return state


def _is_plain(token: AddedToken) -> bool:
    """Whether an added token is found in a text without regard to the blanks around it, and holds none."""
    return not (token.lstrip or token.rstrip or token.single_word or any(map(str.isspace, token.content)))
