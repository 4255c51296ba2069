"""Long texts are encoded in pieces, with the ids of the whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from megagap.data.indexed import IndexedDataset
from megagap.preprocess import job, preprocess
from megagap.preprocess.encoder import Encoder, pieces_of
from megagap.preprocess.units import read_units
from megagap.tokenizer import load_tokenizer
from megagap.tokenizer.words import LLAMA3_WORDS, QWEN2_WORDS

# White space of many kinds, contractions, digits, punctuation, letters of several scripts, an added token.
ALPHABET = [
    *("a", "Z", "é", "你", "'s", "'", "7", "½", ".", "!", "-", " ", " ", " ", "\n", "\r", "\t", "\u00a0", "\u3000"),
    *("\x1c", "\u200b", "\u0301", "🙂", "<|end_of_text|>"),
]
TEXTS = st.lists(st.sampled_from(ALPHABET), max_size=40).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, rank_file: Path, bpe_of_lines: Path) -> dict[str, Path]:
    """Each kind of words that is known to end before spaces."""
    folder = tmp_path_factory.mktemp("words")
    found = {"llama3": bpe_of_lines / "tokenizer.json", "tiktoken": rank_file}
    for name, words in (("qwen2", QWEN2_WORDS), ("gpt2", None)):
        tokenizer = Tokenizer.from_file(str(bpe_of_lines / "tokenizer.json"))
        split = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, as_bytes]) if split else as_bytes
        found[name] = folder / f"{name}.json"
        tokenizer.save(str(found[name]))
    return found


@pytest.mark.parametrize("kind", ["llama3", "tiktoken", "qwen2", "gpt2"])
def test_pieces_have_the_ids_of_the_whole(tokenizers: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(tokenizers[kind])
    assert tokenizer.splits_at_spaces

    @settings(deadline=None, max_examples=400)
    @given(TEXTS, st.integers(1, 5))
    def check(text: str, size: int) -> None:
        pieces = list(pieces_of(text, size))
        assert "".join(pieces) == text
        assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)

    check()


def test_encoding_of_long_documents_is_that_of_the_whole(
    tokenizers: dict[str, Path], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megagap.preprocess import encoder

    tokenizer = load_tokenizer(tokenizers["llama3"])
    monkeypatch.setattr(encoder, "pieces_of", lambda text: pieces_of(text, 100))
    monkeypatch.setattr(encoder, "PIECE", 300)
    texts = ["", "".join(lines[:200]), "x", "".join(lines[2000:2100]), ""]
    made = Encoder(tokenizer, ["text"], bos=0, eod=1).encode_documents(texts)
    expected = [[0, *ids, 1] for ids in tokenizer.encode_batch(texts) if ids]
    assert made.tokens.tolist() == sum(expected, [])
    assert made.lengths.tolist() == list(map(len, expected))
    assert made.empty == 2


def without(change):  # type: ignore[no-untyped-def]
    def make(folder: Path, bpe: Path) -> Path:
        tokenizer = Tokenizer.from_file(str(bpe / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return make


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.NFKC()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "model", models.Unigram([("a", 0.0)], 0)),
        lambda t: t.add_tokens([AddedToken("two words")]),
        lambda t: t.add_tokens([AddedToken("<x>", rstrip=True)]),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Split(Regex(LLAMA3_WORDS + " "), "isolated")),
    ],
)
def test_where_nothing_is_proven_nothing_is_split(tmp_path: Path, bpe_of_lines: Path, change) -> None:  # type: ignore[no-untyped-def]
    assert load_tokenizer(bpe_of_lines).splits_at_spaces
    assert not load_tokenizer(without(change)(tmp_path, bpe_of_lines)).splits_at_spaces


def test_sentencepiece_texts_are_not_split(sentencepiece_model: Path) -> None:
    assert not load_tokenizer(sentencepiece_model).splits_at_spaces


@pytest.mark.parametrize("min_tokens", [0, 10, 400])
def test_a_plain_text_in_pieces_is_one_document(
    tmp_path: Path, tokenizers: dict[str, Path], lines: list[str], monkeypatch: pytest.MonkeyPatch, min_tokens: int
) -> None:
    texts = ["".join(lines[100 * i : 100 * i + length]) for i, length in enumerate((50, 1, 0, 2, 80))]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, newline="")
    monkeypatch.setattr(job, "read_units", lambda *given: read_units(*given, unit_bytes=100))
    summary = preprocess(
        [tmp_path], str(tmp_path / "out"), str(tokenizers["llama3"]), append_eod=True, prepend_bos=True,
        min_tokens=min_tokens,
    )  # fmt: skip
    whole = [ids.tolist() for ids in map(np.array, load_tokenizer(tokenizers["llama3"]).encode_batch(texts))]
    expected = [[0, *ids, 1] for ids in whole if len(ids) >= max(min_tokens, 1)]
    assert [document.tolist() for document in IndexedDataset(tmp_path / "out_text_document")] == expected
    assert summary.pairs[0].empty == 1 and summary.pairs[0].short == 4 - len(expected)
