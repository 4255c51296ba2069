"""Ids are those of each library itself, on 5,000 lines of French, English and code."""

from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from megagap.checkpoint.companions import copy_tokenizer
from megagap.tokenizer import Tokenizer, load_tokenizer


def assert_agrees(tokenizer: Tokenizer, lines: list[str], expected: list[list[int]]) -> None:
    assert len(lines) == 5000
    assert tokenizer.encode_batch(lines) == expected
    assert [tokenizer.encode(line) for line in lines[::50]] == expected[::50]


def test_hugging_face_ids_are_those_of_transformers(bpe_of_lines: Path, lines: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe_of_lines)
    assert_agrees(load_tokenizer(bpe_of_lines), lines, theirs(lines, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_ids_are_those_of_its_library(
    sentencepiece_model: Path, lines: list[str], tmp_path: Path, model_type: str
) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    file = sentencepiece_model
    if model_type == "unigram":
        file = tmp_path / "unigram.model"
        with open(file, "wb") as model:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, vocab_size=1000, num_threads=1, minloglevel=2
            )
    theirs = SentencePieceProcessor()
    theirs.Load(str(file))
    assert_agrees(load_tokenizer(file), lines, [theirs.EncodeAsIds(line) for line in lines])


def test_tiktoken_ids_of_a_rank_file_are_those_of_its_library(rank_file: Path, lines: list[str]) -> None:
    from tiktoken import Encoding

    ranks = {b64decode(token): int(rank) for token, rank in map(str.split, rank_file.read_text().splitlines())}
    words = (  # as Llama 3 publishes it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    theirs = Encoding("theirs", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|end_of_text|>": len(ranks)})
    assert_agrees(load_tokenizer(rank_file), lines, [theirs.encode_ordinary(line) for line in lines])


def test_a_rank_file_and_the_tokenizer_json_of_the_same_pairs_agree(
    rank_file: Path, bpe_of_lines: Path, lines: list[str]
) -> None:
    theirs = load_tokenizer(bpe_of_lines).encode_batch(lines)
    assert_agrees(load_tokenizer(rank_file), lines, [[i - 2 for i in ids] for ids in theirs])


def test_llama_3_ids_and_special_tokens_are_those_of_its_own_tokenizer(lines: list[str]) -> None:
    pytest.importorskip("llama_models", reason="Llama 3's own rank file: pip install -r requirements.txt")
    from llama_models.llama3 import tokenizer as llama3

    file = Path(llama3.__file__).with_name("tokenizer.model")
    theirs, ours = llama3.Tokenizer(file), load_tokenizer(file)
    assert_agrees(ours, lines, [theirs.encode(line, bos=False, eos=False) for line in lines])
    assert (ours.vocab_size, ours.bos, ours.eod) == (128_256, theirs.bos_id, theirs.eos_id)
    assert len(theirs.special_tokens) == 256
    assert {ours.decode([i]): i for i in range(128_000, 128_256)} == theirs.special_tokens


def exported(source: Path, folder: Path) -> Any:
    """As ``to-hf`` writes it beside a model, loaded by transformers."""
    from transformers import AutoTokenizer

    folder.mkdir()
    copy_tokenizer(str(source), load_tokenizer(source), 64, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_an_exported_rank_file_gives_the_same_ids_in_transformers(
    rank_file: Path, lines: list[str], tmp_path: Path
) -> None:
    ours, theirs = load_tokenizer(rank_file), exported(rank_file, tmp_path / "hf")
    assert_agrees(ours, lines, theirs(lines, add_special_tokens=False)["input_ids"])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)
    assert theirs.model_max_length == 64


def test_an_exported_llama_3_rank_file_gives_the_same_ids_in_transformers(lines: list[str], tmp_path: Path) -> None:
    llama3 = pytest.importorskip("llama_models.llama3.tokenizer", reason="pip install -r requirements.txt")
    file = Path(llama3.__file__).with_name("tokenizer.model")
    ours, theirs = load_tokenizer(file), exported(file, tmp_path / "hf")
    assert_agrees(ours, lines, theirs(lines, add_special_tokens=False)["input_ids"])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)
    assert theirs.convert_tokens_to_ids("<|eot_id|>") == 128_009


def test_an_exported_sentencepiece_model_gives_the_same_ids_in_transformers_except_for_leading_spaces(
    lines: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from sentencepiece import SentencePieceTrainer

    file = tmp_path / "tokenizer.model"
    with open(file, "wb") as model:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=1000, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    ours, theirs = load_tokenizer(file), exported(file, tmp_path / "hf")
    texts = [line.lstrip() for line in lines]
    assert_agrees(ours, texts, theirs(texts, add_special_tokens=False)["input_ids"])
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos, ours.eod)
    assert "different ids to texts that begin with spaces" in caplog.text and "normalises" not in caplog.text


def test_the_export_of_a_sentencepiece_model_that_normalises_says_so(
    sentencepiece_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported(sentencepiece_model, tmp_path / "hf")
    assert "or that the model normalises" in caplog.text
