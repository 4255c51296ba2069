"""Words as datatrove's filters count them, without a model to download."""

import re
from typing import Any

from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from megagap.errors import ConfigError

_SENTENCE = re.compile(r".+?(?:[.!?…]+[\"'”»)]*(?=\s|$)|\n+|$)", re.DOTALL)

HASHES = HashConfig(precision=64, hash_fc="sha1")
"""Of n-grams. Not datatrove's default: its xxhash hands over strings, which xxhash 4 refuses."""


class PlainWords(WordTokenizer):  # type: ignore[misc,unused-ignore]
    """Words are what blanks separate, as in the filters' own papers (Rae et al. 2021): for languages that write them.
    Much faster than spaCy, which takes punctuation marks for words of their own.

    datatrove's blocks take an instance in place of a language's name. All instances are equal, so that its cache of
    split texts works.
    """

    def __init__(self) -> None:
        super().__init__(None)

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _SENTENCE.finditer(text) if match[0].strip()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlainWords)

    def __hash__(self) -> int:
        return hash(PlainWords)


def word_tokenizer(choice: str, language: str) -> Any:
    """What datatrove's blocks take as ``language``: an instance of :class:`PlainWords`, or for ``spacy`` the name of a
    language, whose rules come with the package spacy. Raises :class:`ConfigError` if that is not installed."""
    if choice == "plain":
        return PlainWords()
    try:
        import spacy  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise ConfigError(
            'words = "spacy" needs the package spacy, which this Python lacks\n'
            '  install it (pip install spacy; no model has to be downloaded), or set words = "plain".'
        ) from None
    return language
