"""Ids and end-of-text ids are those of ``transformers``, whatever a tokenizer's folder contains; else it is refused."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megagap.errors import DataError
from megagap.preprocess.fast import Fast, choose_encoder
from megagap.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.tokenizer_folders import TEXTS, Folder, folders

FOLDERS = folders()


@dataclass(frozen=True)
class Pair:
    """A folder as ``transformers`` loads it and as megagap does, or what either says instead."""

    folder: Folder
    path: Path
    theirs: Any
    ours: Tokenizer | DataError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pair]]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("folders")
    made = []
    for i, folder in enumerate(FOLDERS):
        path = folder.write(root / str(i))
        try:
            theirs: Any = AutoTokenizer.from_pretrained(path)
        except Exception as error:
            theirs = error
        try:
            ours: Tokenizer | DataError = load_tokenizer(path, "parse")
        except DataError as error:
            ours = error
        made.append(Pair(folder, path, theirs, ours))
    yield made
    logging.set_verbosity(level)


def ids_of(tokenizer: Any, split: bool | None = None) -> list[list[int]]:
    given = {} if split is None else {"split_special_tokens": split}
    ids: list[list[int]] = tokenizer(list(TEXTS), add_special_tokens=False, **given)["input_ids"]
    return ids


def flat(encoder: Any) -> list[list[int]]:
    ids, lengths = encoder.encode_flat(TEXTS)
    found, start = [], 0
    for length in lengths.tolist():
        found.append(ids[start : start + length].tolist())
        start += length
    return found


def test_the_grid_has_hundreds_of_folders_few_of_which_are_refused(pairs: list[Pair]) -> None:
    refused = {pair.folder.name for pair in pairs if isinstance(pair.ours, DataError)}
    assert len(pairs) >= 300
    assert refused == {folder.name for folder in FOLDERS if folder.refused}
    assert len(refused) < 0.06 * len(pairs)


def test_a_refusal_names_the_file_and_what_is_not_supported(pairs: list[Pair]) -> None:
    for pair in pairs:
        if pair.folder.refused:
            assert re.search(re.escape(pair.folder.refused), str(pair.ours)), (pair.folder.name, str(pair.ours))
            assert str(pair.path) in str(pair.ours), pair.folder.name


def test_ids_are_those_of_transformers(pairs: list[Pair]) -> None:
    wrong = []
    for pair in pairs:
        if isinstance(pair.ours, DataError):
            continue
        assert not isinstance(pair.theirs, Exception), (pair.folder.name, pair.theirs)
        expected, found = ids_of(pair.theirs), pair.ours.encode_batch(TEXTS)
        if expected != found:
            texts = zip(TEXTS, expected, found, strict=True)
            wrong.append((pair.folder.name, *next(text for text in texts if text[1] != text[2])))
    assert not wrong


def test_begin_and_end_of_text_and_vocabulary_are_those_of_transformers(pairs: list[Pair]) -> None:
    wrong = []
    for pair in pairs:
        if isinstance(pair.ours, DataError):
            continue
        expected = (pair.theirs.bos_token_id, pair.theirs.eos_token_id, max(pair.theirs.get_vocab().values()) + 1)
        found = (pair.ours.bos, pair.ours.eod, pair.ours.vocab_size)
        if expected != found:
            wrong.append((pair.folder.name, expected, found))
    assert not wrong


@pytest.mark.parametrize("special_tokens", ["parse", "text"])
@pytest.mark.parametrize("fast", ["auto", "on"])
def test_the_fast_path_gives_the_ids_of_the_library_or_is_not_used(
    pairs: list[Pair], fast: Fast, special_tokens: Any
) -> None:
    pytest.importorskip("gigatoken")
    taken, wrong = 0, []
    for pair in pairs:
        if isinstance(pair.ours, DataError):
            continue
        reference = load_tokenizer(pair.path, special_tokens)
        try:
            encoder, note = choose_encoder(reference, fast, [], [])
        except DataError as error:
            assert fast == "on" and "is not known to support a feature" in str(error), (pair.folder.name, error)
            continue
        taken += note is None
        assert note is None or "is not known to support a feature" in note, (pair.folder.name, note)
        if flat(encoder) != reference.encode_batch(TEXTS):
            wrong.append(pair.folder.name)
    assert not wrong
    assert taken > 100


def test_text_has_no_special_tokens(pairs: list[Pair]) -> None:
    """Except for the unknown token, and those that are also ordinary words of the vocabulary."""
    for pair in pairs:
        if isinstance(pair.ours, DataError):
            continue
        tokenizer = load_tokenizer(pair.path, "text")
        special = {token: pair.theirs.convert_tokens_to_ids(token) for token in tokenizer.special}
        ordinary = {"the", "Gaul", pair.theirs.unk_token, (pair.folder.tokenizer["model"].get("unk_token"))}
        forbidden = {i for token, i in special.items() if token not in ordinary and "unk" not in token.lower()}
        found = {i for ids in tokenizer.encode_batch(TEXTS) for i in ids} & forbidden
        assert not found, (pair.folder.name, found, special)


def test_text_of_a_byte_level_bpe_equals_split_special_tokens_of_transformers(pairs: list[Pair]) -> None:
    compared = 0
    for pair in pairs:
        if isinstance(pair.ours, DataError) or pair.folder.tokenizer["model"]["type"] != "BPE":
            continue
        flagged = {t.content for t in pair.theirs.added_tokens_decoder.values() if t.special}
        if flagged >= {*pair.ours.special} and not pair.folder.tokenizer["model"]["ignore_merges"]:
            ours = load_tokenizer(pair.path, "text").encode_batch(TEXTS)
            assert ours == ids_of(pair.theirs, split=True), pair.folder.name
            compared += 1
    assert compared > 100
