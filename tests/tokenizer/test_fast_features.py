"""gigatoken supports the listed features, on texts that exercise them; known differences are not listed."""

import json
import random
from copy import deepcopy
from functools import cache
from itertools import product
from typing import Any

import pytest
from tokenizers import Tokenizer

from megagap.tokenizer.classes import byte_level, split_into_words
from megagap.tokenizer.fast_features import (
    BYTE_LEVEL_WORDS,
    METASPACES,
    NFC_FORMS,
    SPACE_NORMALIZERS,
    unknown_feature,
)
from megagap.tokenizer.words import LLAMA3_WORDS
from tests.tokenizer.tokenizer_folders import (
    SENTENCES,
    byte_level_bpe,
    changed,
    space_bpe,
    token,
    with_added,
    with_model,
)

gigatoken = pytest.importorskip("gigatoken")

PARTS = (
    "Gaul", "Gaulish", "gaul", "ish", "l\u0301", "\u0301", "\u0338", "e\u0301", "é", "\ufb01", "１", " ", "  ", "\n",
    "\r\n", "\t", "\u00a0", "\u3000", "\u2003", "\x85", "\x0b", "\x1c", "\u200b", "\ufeff", "a", "the", " the", "1",
    "12", "345", "'s", "'S", "'ſ", "'ll", "’s", "Ñ", "ǅ", "你", "🙂", "\x00", "_", "-", ".", "<|end_of_text|>",
    "<|begin_of_text|>", "<|", "|>", "<s>", "</s>", "§", "\u1100\u1161\u11a8", "\u0bc6\u0bbe", "\u2581", "\u212a", "Ω",
    "\u037e", "ß", "İ", "ı", "value", " names",
)  # fmt: skip


@cache
def texts() -> list[str]:
    draw = random.Random(0)
    return ["", *SENTENCES, *("".join(draw.choices(PARTS, k=draw.randint(1, 14))) for _ in range(3000))]


def differs(state: dict[str, Any]) -> str | None:
    """The shortest text to which gigatoken gives different ids from tokenizers; or that it refuses the tokenizer."""
    theirs = Tokenizer.from_str(json.dumps(state))
    theirs.no_truncation()
    expected = [encoding.ids for encoding in theirs.encode_batch(texts(), add_special_tokens=False)]
    try:
        ours = gigatoken.Tokenizer.from_json(theirs.to_str())
    except Exception:
        return "refused"
    wrong = [text for text, ids in zip(texts(), expected, strict=True) if ours.encode(text).tolist() != ids]
    return min(wrong, key=len) if wrong else None


BPE, SPACE = byte_level_bpe(), space_bpe()
SIZE = max(BPE["model"]["vocab"].values()) + 1
FLAGS = ("lstrip", "rstrip", "normalized", "special")


def listed() -> dict[str, dict[str, Any]]:
    states = {f"words {i}": changed(BPE, pre_tokenizer=words) for i, words in enumerate(BYTE_LEVEL_WORDS)}
    states |= {f"words {i}, prefers whole": with_model(s, ignore_merges=True) for i, s in enumerate(states.values())}
    states |= {f"NFC {i}": changed(BPE, normalizer=form) for i, form in enumerate(NFC_FORMS)}
    for values in product((False, True), repeat=4):
        flags = dict(zip(FLAGS, values, strict=True))
        states[f"added {flags}"] = with_added(BPE, token("Gaul", SIZE, **flags))
    for flags in ({}, {"lstrip": True}, {"rstrip": True}):
        nfc = changed(BPE, normalizer=NFC_FORMS[0])
        states[f"NFC, added {flags}"] = with_added(nfc, token("Gaul", SIZE, **flags))
    states["added within another"] = with_added(BPE, token("Gaul", SIZE), token("Gaulish", SIZE + 1))
    states["added blanks"] = with_added(BPE, token("  ", SIZE), token("\n", SIZE + 1))
    states["unknown token"] = with_model(BPE, unk_token="<|end_of_text|>", fuse_unk=True)
    states |= {f"spaces {i}": changed(SPACE, pre_tokenizer=words) for i, words in enumerate(METASPACES)}
    for i, normalizer in enumerate(SPACE_NORMALIZERS):
        states[f"normalised spaces {i}"] = changed(SPACE, normalizer=normalizer, pre_tokenizer=None)
    return states


def unlisted() -> dict[str, dict[str, Any]]:
    first = deepcopy(BPE)
    first["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "CharDelimiterSplit", "delimiter": "§"})
    mixed = with_added(BPE, token("Gaul", SIZE), token("Gaulish", SIZE + 1, normalized=True))
    nfc = changed(BPE, normalizer=NFC_FORMS[0])
    removed = split_into_words(LLAMA3_WORDS)
    removed["pretokenizers"][0]["behavior"] = "Removed"
    return {
        "single_word": with_added(BPE, token("Gaul", SIZE, single_word=True)),
        "a delimiter before": first,
        "overlapping, one normalized": mixed,
        "NFC, added normalized": with_added(nfc, token("Gaul", SIZE, normalized=True)),
        "words removed": changed(BPE, pre_tokenizer=removed),
        "no words": changed(BPE, pre_tokenizer=byte_level(add_prefix_space=False, use_regex=False)),
        "words after a prefix": changed(BPE, pre_tokenizer=split_into_words(LLAMA3_WORDS, add_prefix_space=True)),
        "no bytes": changed(BPE, pre_tokenizer=None),
        "end of word": with_model(BPE, end_of_word_suffix="</w>"),
    }


def written(state: dict[str, Any]) -> dict[str, Any]:
    """As the library writes it."""
    made: dict[str, Any] = json.loads(Tokenizer.from_str(json.dumps(state)).to_str())
    return made


@pytest.mark.parametrize("name", listed())
def test_what_is_listed_is_supported(name: str) -> None:
    state = listed()[name]
    assert unknown_feature(written(state)) is None
    assert differs(state) is None


@pytest.mark.parametrize("name", unlisted())
def test_what_gives_different_ids_is_not_listed(name: str) -> None:
    state = unlisted()[name]
    assert differs(state)
    assert unknown_feature(written(state))
