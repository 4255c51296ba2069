import gzip
import json
import shutil
from pathlib import Path

import pytest

from megagap.errors import DataError
from megagap.preprocess import bpe
from megagap.preprocess.bpe import train_tokenizer
from megagap.tokenizer import load_tokenizer


def edited(folder: Path, target: Path, name: str, change: dict[str, object]) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / name).read_text()) | change
    (target / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    (target / "special_tokens_map.json").unlink()  # which transformers believes rather than the configuration
    return target


def test_trained_tokenizer_loads_in_transformers_and_encodes_the_same(tokenizer_folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(tokenizer_folder), load_tokenizer(tokenizer_folder)
    assert [theirs(text)["input_ids"] for text in texts] == ours.encode_batch(texts)
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eod, ours.bos, ours.vocab_size)


def test_trained_tokenizer_has_exactly_the_ids_asked_for(tokenizer_folder: Path) -> None:
    assert load_tokenizer(tokenizer_folder).vocab_size == 300


def test_any_text_survives_encoding_and_decoding(tokenizer_folder: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    for text in [*texts, "", " ", "\r\n\t", "ßø 漢字 👩‍🚀 \x00", "1234567 '  s"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tokenizer([corpus], tmp_path / "a", 320)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    train_tokenizer([corpus], tmp_path / "b", 320)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_digits_are_never_merged_beyond_three(tmp_path: Path) -> None:
    (tmp_path / "digits.txt").write_text("123456 " * 500)
    train_tokenizer([tmp_path / "digits.txt"], tmp_path / "t", 280)
    tokenizer = load_tokenizer(tmp_path / "t")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("123456")] == ["123", "456"]


def test_short_text_gives_fewer_ids(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abab")
    assert train_tokenizer([tmp_path / "short.txt"], tmp_path / "t", 1000).vocab_size < 265


def test_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match="need 258"):
        train_tokenizer([corpus], tmp_path / "t", 257)


def test_vocabulary_counts_added_tokens_and_gaps(tokenizer_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    added = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    added.add_special_tokens(["<extra>"])
    added.save(str(tmp_path / "added.json"))
    Tokenizer(models.BPE({"a": 0, "b": 7}, [])).save(str(tmp_path / "gap.json"))
    assert load_tokenizer(tmp_path / "added.json").vocab_size == 301
    assert load_tokenizer(tmp_path / "gap.json").vocab_size == 8


@pytest.mark.parametrize("eos", ["<|begin_of_text|>", {"content": "<|begin_of_text|>"}])
def test_config_names_the_end_of_text(tokenizer_folder: Path, tmp_path: Path, eos: object) -> None:
    folder = edited(tokenizer_folder, tmp_path / "t", "tokenizer_config.json", {"eos_token": eos})
    assert load_tokenizer(folder).eod == 0


def test_end_of_text_is_found_without_a_config(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path / "mine.json")
    tokenizer = load_tokenizer(f"hf:{tmp_path / 'mine.json'}")
    assert (tokenizer.bos, tokenizer.eod) == (0, 1)


def test_config_naming_an_unknown_end_of_text_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = edited(tokenizer_folder, tmp_path / "t", "tokenizer_config.json", {"eos_token": "<none>"})
    with pytest.raises(DataError, match=r"tokenizer_config\.json names eos_token = '<none>'"):
        load_tokenizer(folder)


def test_truncation_and_padding_in_the_file_do_not_affect_documents(
    tokenizer_folder: Path, tmp_path: Path, texts: list[str]
) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(texts) == load_tokenizer(tokenizer_folder).encode_batch(texts)


def test_what_is_not_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model": 3}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    faults: list[tuple[str | Path, str]] = [
        (tmp_path / "absent", "does not exist"),
        (tmp_path, r"contains no tokenizer: no tokenizer\.json"),
        (tmp_path / "bad.json", r"bad\.json is not a Hugging Face tokenizer"),
        (f"hf:{tmp_path / 'binary.json'}", r"binary\.json is not a Hugging Face tokenizer"),
    ]
    for spec, message in faults:
        with pytest.raises(DataError, match=message):
            load_tokenizer(spec)


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": ""}\n'])
def test_training_without_text_is_refused_and_writes_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "t", 300)
    assert not (tmp_path / "t").exists()


def test_training_can_skip_malformed_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a text"}\n{"text": null}\n{"no": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "t", 300)
    skipped: list[DataError] = []
    trained = train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "t", 300, skip=skipped.append)
    assert (trained.documents, trained.bytes) == (1, len("a text")) and trained.vocab_size > 258
    assert [error.args[0].split(":")[0].split(", ")[1] for error in skipped] == ["line 2", "line 3"]


def test_training_counts_documents_and_uncompressed_bytes_of_text(tmp_path: Path, corpus: Path) -> None:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines() if line]
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "book.txt").write_text("a plain text " * 200_000)  # two pieces
    inputs = [tmp_path / "corpus.jsonl.gz", tmp_path / "book.txt"]
    trained = train_tokenizer(inputs, tmp_path / "t", 300)
    assert trained.documents == len(texts) + 1
    assert trained.bytes == sum(len(text.encode()) for text in texts) + 13 * 200_000
    assert 0 < trained.sample_bytes <= trained.bytes


def test_bytes_per_token_are_those_of_the_text_itself_where_it_is_short(tmp_path: Path, corpus: Path) -> None:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines() if line]
    trained = train_tokenizer([corpus], tmp_path / "t", 300)
    tokens = sum(map(len, load_tokenizer(tmp_path / "t").encode_batch(texts)))
    assert trained.sample_bytes == trained.bytes
    assert trained.bytes_per_token == pytest.approx(trained.bytes / tokens)


def test_of_much_text_bytes_per_token_are_measured_on_a_sample_from_all_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe, "SAMPLED_PARTS", 100)
    lines = [
        f"{i % 7} some words " * (1 + i // 500) for i in range(1000)
    ]  # documents of two kinds, one after the other
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    trained = train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "t", 280)
    assert 13 * 100 < trained.sample_bytes < 26 * 100
    tokens = sum(map(len, load_tokenizer(tmp_path / "t").encode_batch(lines)))
    assert trained.bytes_per_token == pytest.approx(trained.bytes / tokens, rel=0.1)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_tokenizer_that_exists_is_not_overwritten(tmp_path: Path, corpus: Path, name: str) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / name).write_text("old")
    with pytest.raises(DataError, match=f"t has a tokenizer already: {name}\n  choose another output"):
        train_tokenizer([corpus], tmp_path / "t", 300)
    assert [path.read_text() for path in (tmp_path / "t").iterdir()] == ["old"]


def test_a_tokenizer_may_be_written_beside_other_files(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    train_tokenizer([corpus], tmp_path, 300)
    assert (tmp_path / "tokenizer.json").exists() and (tmp_path / "notes.txt").read_text() == "mine"
