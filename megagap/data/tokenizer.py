"""Where :func:`load_tokenizer` was before tokenizers had a package of their own: programs import it from here."""

from megagap.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
