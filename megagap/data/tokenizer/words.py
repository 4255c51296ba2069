"""How texts are cut into words, and how byte-level tokens are written."""

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's words: contractions, letters with a leading mark, at most three digits, punctuation, line ends, blanks."""

QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
CHARACTER_OF = {byte: chr(byte) for byte in VISIBLE} | {
    byte: chr(256 + i) for i, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)
}
"""How byte-level tokens are written (GPT-2): visible bytes as themselves, the others as characters from 256 on."""
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}
