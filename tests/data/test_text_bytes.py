"""How many bytes of text tokens stand for: exact or unknown."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from megagap.data.indexed import IndexedDataset
from megagap.data.manifest import read_manifest
from megagap.data.text_bytes import UnknownBytesError, text_bytes
from megagap.preprocess import preprocess
from megagap.tokenizer import load_tokenizer
from tests.few import WriteTokens


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[[list[str]], Path]:
    def write(texts: list[str]) -> Path:
        file = tmp_path / "text.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    return write


def made(file: Path, tokenizer: Path, **options: object) -> str:
    prefix = str(file.with_suffix(""))
    preprocess([file], prefix, str(tokenizer), append_eod=True, **options)  # type: ignore[arg-type]
    return f"{prefix}_text_document"


def tokens_of(prefix: str) -> np.ndarray:
    return IndexedDataset(prefix).tokens.astype(np.int64)


@pytest.mark.parametrize("kind", ["tokenizer_folder", "bpe_of_lines", "rank_file"])
@pytest.mark.parametrize("from_manifest", [True, False])
def test_the_bytes_of_all_tokens_are_those_of_the_texts(
    request: pytest.FixtureRequest,
    corpus_of: Callable[[list[str]], Path],
    lines: list[str],
    texts: list[str],
    kind: str,
    from_manifest: bool,
) -> None:
    tokenizer = request.getfixturevalue(kind)
    written = [*texts, *lines[::100], "a\u0301 \u00e1 \ufb01  two  blanks ", "spelled out: <|end_of_text|> ", "\u0000"]
    prefix = made(corpus_of(written), tokenizer, prepend_bos=True)
    known = text_bytes([prefix], None if from_manifest else load_tokenizer(tokenizer))
    manifest = read_manifest(prefix)
    assert manifest and known.count(tokens_of(prefix)) == manifest.text_bytes == sum(len(t.encode()) for t in written)


def test_without_a_manifest_the_models_tokenizer_tells_and_only_ends_and_beginnings_have_no_text(
    tokenizer_folder: Path, write_tokens: WriteTokens
) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode("Déjà vu")
    assert tokenizer.eod is not None
    prefix = write_tokens("bare", [[*ids, tokenizer.eod]])
    known = text_bytes([prefix], tokenizer)
    assert known.count(tokens_of(prefix)) == len("Déjà vu".encode())
    assert known.count(np.array([tokenizer.vocab_size])) is None
    with pytest.raises(UnknownBytesError, match="no tokenizer is known"):
        text_bytes([prefix], None)


def test_other_special_tokens_of_unclear_origin_make_the_bytes_unknown(
    rank_file: Path, write_tokens: WriteTokens
) -> None:
    tokenizer = load_tokenizer(rank_file)
    reserved = tokenizer.vocab_size - 1
    prefix = write_tokens("bare", [[*tokenizer.encode("text"), reserved]])
    assert text_bytes([prefix], tokenizer).count(tokens_of(prefix)) is None


def test_special_tokens_that_were_written_out_and_became_ids_make_the_bytes_unknown(
    corpus_of: Callable[[list[str]], Path], tokenizer_folder: Path
) -> None:
    file = corpus_of(["one <|end_of_text|> two"])
    with pytest.raises(UnknownBytesError, match="special tokens written out"):
        text_bytes([made(file, tokenizer_folder, special_tokens="parse")], None)
    none = corpus_of(["nothing special"])
    prefix = made(none, tokenizer_folder, special_tokens="parse")
    assert text_bytes([prefix], None).count(tokens_of(prefix)) == len("nothing special")


def test_a_sentencepiece_model_loses_the_bytes(
    corpus_of: Callable[[list[str]], Path], sentencepiece_model: Path, write_tokens: WriteTokens
) -> None:
    with pytest.raises(UnknownBytesError, match="sentencepiece"):
        text_bytes([made(corpus_of(["the  text"]), sentencepiece_model)], None)
    with pytest.raises(UnknownBytesError, match="may change a text"):
        text_bytes([write_tokens("bare", [[3, 4]])], load_tokenizer(sentencepiece_model))


def changed(folder: Path, copy: Path, change: Callable[[Backend], None]) -> Path:
    shutil.copytree(folder, copy)
    backend = Backend.from_file(str(copy / "tokenizer.json"))
    change(backend)
    backend.save(str(copy / "tokenizer.json"))
    return copy


def set_normalizer(backend: Backend) -> None:
    backend.normalizer = normalizers.NFC()


def set_prefix_space(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def drop_blanks(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def drop_by_whitespace(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@pytest.mark.parametrize("change", [set_normalizer, set_prefix_space, drop_blanks, drop_by_whitespace])
def test_a_tokenizer_that_changes_texts_makes_the_bytes_unknown(
    corpus_of: Callable[[list[str]], Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    change: Callable[[Backend], None],
) -> None:
    other = changed(tokenizer_folder, tmp_path / "other", change)
    assert load_tokenizer(tokenizer_folder).keeps_bytes and not load_tokenizer(other).keeps_bytes
    prefix = made(corpus_of(["a\u0301 text"]), other)
    with pytest.raises(UnknownBytesError, match="may change a text"):
        text_bytes([prefix], None)
    # Nor does the same vocabulary without that: the file was not made with it.
    shutil.rmtree(other)
    with pytest.raises(UnknownBytesError, match="is not available"):
        text_bytes([prefix], load_tokenizer(tokenizer_folder))
