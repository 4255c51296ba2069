"""Which features of a ``tokenizer.json`` gigatoken is known to support.

Found by comparing gigatoken 0.10 with ``tokenizers`` on texts made for each feature
(tests/tokenizer/test_fast_features.py): it silently ignores much that it does not know, so that a sample of texts may
miss the difference. For whatever is not listed here, it is not used.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any

from megagap.tokenizer.classes import byte_level, split_into_words
from megagap.tokenizer.words import LLAMA3_WORDS, O200K_WORDS, QWEN2_WORDS, QWEN3_5_WORDS

NFC = {"type": "NFC"}
NFC_FORMS: tuple[Any, ...] = (NFC, {"type": "Sequence", "normalizers": [NFC]})
BYTE_LEVEL_WORDS: tuple[Any, ...] = (
    byte_level(add_prefix_space=False, use_regex=True),
    byte_level(add_prefix_space=True, use_regex=True),
    *map(split_into_words, (LLAMA3_WORDS, QWEN2_WORDS, QWEN3_5_WORDS, O200K_WORDS)),
)

_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACE_NORMALIZERS: tuple[Any, ...] = (
    None,
    _SPACES,
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _SPACES]},
)
"""Those of sentencepiece models as ``transformers`` writes them (Llama 2, Gemma)."""
METASPACES: tuple[Any, ...] = tuple(
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    for scheme, split in product(("first", "always", "never"), (False, True))
)
MODEL_OPTIONS = {"dropout": (None, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
"""Those that it ignores, with the values allowed. It supports ``ignore_merges``; ``unk_token`` and ``fuse_unk`` never
matter if every byte has a token."""


def unknown_feature(state: Mapping[str, Any], hidden: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """The first feature of a ``tokenizer.json`` that gigatoken is not known to support, with its value, or None.

    ``state`` as the ``tokenizers`` library writes it. ``hidden``: special tokens that are not in it, since they are
    text; ``tokenizers`` finds them nevertheless, and skips other added tokens that begin within them.
    """
    return next(chain(_unknown_features(state), _unknown_hidden(hidden, state["added_tokens"])), None)


def _unknown_hidden(hidden: Sequence[Mapping[str, Any]], tokens: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for token, other in product(hidden, tokens):
        takes_blanks = token["lstrip"] or token["rstrip"] or other["lstrip"] or other["rstrip"]
        if takes_blanks or _can_overlap(token["content"], other["content"]):
            yield f"the special token {token['content']!r}, which is text, may overlap {other['content']!r}"


def _unknown_features(state: Mapping[str, Any]) -> Iterator[str]:
    model = state["model"]
    if model["type"] != "BPE":
        yield f"model.type = {model['type']!r}"
        return
    for option, known in MODEL_OPTIONS.items():
        if model.get(option) not in known:
            yield f"model.{option} = {model[option]!r}"
    normalizer, words = state["normalizer"], _without_offsets(state["pre_tokenizer"])
    if model["byte_fallback"]:
        if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
            yield "model.byte_fallback without tokens for all bytes"
        normalizers, pre_tokenizers = SPACE_NORMALIZERS, (None, *METASPACES)
        if words is not None and normalizer is not None:
            yield f"normalizer = {normalizer!r} before pre_tokenizer = {words!r}"
    else:
        normalizers, pre_tokenizers = (None, *NFC_FORMS), BYTE_LEVEL_WORDS
    if normalizer not in normalizers:
        yield f"normalizer = {normalizer!r}"
    if words not in pre_tokenizers:
        yield f"pre_tokenizer = {words!r}"
    yield from _unknown_added(state["added_tokens"], normalizer)
    if _adds_prefix(words):
        for token in state["added_tokens"]:
            if token["content"].startswith((" ", "▁")):
                yield f"the added token {token['content']!r} with the prefix of {words!r}"


def _adds_prefix(words: Any) -> bool:
    """Whether a pre-tokenizer puts a space before a text."""
    parts = words.get("pretokenizers", [words]) if isinstance(words, dict) else []
    return any(part.get("add_prefix_space") or part.get("prepend_scheme", "never") != "never" for part in parts)


def _without_offsets(words: Any) -> Any:
    """A pre-tokenizer without the options that only affect token offsets."""
    if not isinstance(words, dict):
        return words
    if words.get("type") == "Sequence":
        return words | {"pretokenizers": [_without_offsets(part) for part in words["pretokenizers"]]}
    return words | {"trim_offsets": True} if words.get("type") == "ByteLevel" else words


def _unknown_added(tokens: list[dict[str, Any]], normalizer: Any) -> Iterator[str]:
    for token in tokens:
        name = f"the added token {token['content']!r}"
        if token["single_word"]:
            yield f"{name}: single_word"
        if normalizer is not None and token["normalized"]:
            yield f"{name}: normalized, with a normalizer"
        if normalizer is not None and not _is_never_normalised(token["content"]):
            yield f"{name}: a normalizer may change or make its characters"
    eager = next((token["content"] for token in tokens if token["lstrip"] or token["rstrip"]), None)
    blank = next((token["content"] for token in tokens if any(map(str.isspace, token["content"]))), None)
    if eager is not None and blank is not None:
        yield f"the added token {eager!r} strips spaces around it, and {blank!r} contains some"
    # tokenizers finds all that are not normalized before any that is; gigatoken, the longest of all.
    raw = [token["content"] for token in tokens if not token["normalized"]]
    normalised = [token["content"] for token in tokens if token["normalized"]]
    for one, other in product(raw, normalised):
        if _can_overlap(one, other):
            yield f"the added tokens {one!r} and {other!r} may overlap, and only one is normalized"
            return


def _is_never_normalised(content: str) -> bool:
    """Visible ASCII characters that no others are normalised to (U+212A to K, U+037E to ``;``, U+1FEF to `````)."""
    return all("!" <= character <= "~" and character not in "K;`" for character in content)


def _can_overlap(one: str, other: str) -> bool:
    if one in other or other in one:
        return True
    shorter = min(len(one), len(other))
    return any(one[-n:] == other[:n] or other[-n:] == one[:n] for n in range(1, shorter))
