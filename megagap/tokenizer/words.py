"""How texts are split into words, and how byte-level tokens are written."""

import re
from collections.abc import Iterator

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's words: contractions, letters with a leading mark, up to three digits, punctuation, line ends, spaces."""

QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN3_5_WORDS = QWEN2_WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""OpenAI's o200k, also of Llama 4."""

VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
CHARACTER_OF = {byte: chr(byte) for byte in VISIBLE} | {
    byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)
}
"""How byte-level tokens are written (GPT-2): visible bytes as themselves, the others as characters from 256 on."""
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}

LONGEST_WHITESPACE = 400_000
"""Characters; tiktoken's regular expressions overflow their stack somewhere above this."""


def without_long_whitespace(text: str) -> Iterator[str]:
    """``text`` in pieces with at most ``LONGEST_WHITESPACE`` white space in a row: nearly always in one piece."""
    start = 0
    if len(text) > LONGEST_WHITESPACE:
        for blank in re.finditer(r"\s+", text):
            for cut in range(blank.start() + LONGEST_WHITESPACE, blank.end(), LONGEST_WHITESPACE):
                yield text[start:cut]
                start = cut
    yield text[start:]
