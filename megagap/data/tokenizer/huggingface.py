"""Hugging Face's ``tokenizer.json``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megagap.data.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT
from megagap.errors import DataError


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

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the character offsets of the tokens.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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
