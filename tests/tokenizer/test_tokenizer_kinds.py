"""Which kind of tokenizer a specification means, and what is special about sentencepiece and tiktoken."""

import shutil
from base64 import b64encode
from pathlib import Path

import pytest

from megagap.errors import DataError
from megagap.tokenizer import find_tokenizer, load_tokenizer


@pytest.fixture
def files(tmp_path: Path, tokenizer_folder: Path, sentencepiece_model: Path, rank_file: Path) -> dict[str, Path]:
    """A file of each kind, all under the same name."""
    sources = {
        "hf": tokenizer_folder / "tokenizer.json",
        "sentencepiece": sentencepiece_model,
        "tiktoken": rank_file,
    }
    for kind, source in sources.items():
        (tmp_path / kind).mkdir()
        shutil.copy(source, tmp_path / kind / "tokenizer.model")
    return {kind: tmp_path / kind / "tokenizer.model" for kind in sources}


def test_kinds_are_detected_by_content_not_by_name(files: dict[str, Path]) -> None:
    for kind, file in files.items():
        assert find_tokenizer(file) == find_tokenizer(file.parent) == (kind, file)
        loaded = load_tokenizer(file)
        assert loaded.encode_batch(["bonjour"]) == [loaded.encode("bonjour")] != [[]]


def test_a_folder_of_several_means_tokenizer_json_unless_a_kind_is_forced(
    files: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for kind, name in (("tiktoken", "a.tiktoken"), ("sentencepiece", "tokenizer.model"), ("hf", "tokenizer.json")):
        shutil.copy(files[kind], folder / name)
        assert find_tokenizer(folder) == (kind, folder / name)
    assert find_tokenizer(f"sentencepiece:{folder}") == ("sentencepiece", folder / "tokenizer.model")
    assert find_tokenizer(f"tiktoken:{folder}") == ("tiktoken", folder / "a.tiktoken")


def test_a_folder_of_several_without_a_usual_name_is_ambiguous(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(files["sentencepiece"], tmp_path / "a.model")
    shutil.copy(files["tiktoken"], tmp_path / "b.tiktoken")
    with pytest.raises(DataError, match=r"several tokenizers: a\.model, b\.tiktoken"):
        load_tokenizer(tmp_path)
    assert find_tokenizer(f"tiktoken:{tmp_path}") == ("tiktoken", tmp_path / "b.tiktoken")


def test_a_file_of_unknown_kind_is_refused_by_name(tmp_path: Path, files: dict[str, Path]) -> None:
    contents = {
        "noise.model": b"\xff\xfe\x00",
        "empty.model": b"",
        "text.model": b"Once upon a time\n",
        "pointer.model": b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\n",
        "cut.model": files["sentencepiece"].read_bytes()[:100],
        "pieceless.model": b"\n\x02\n\x00",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    faults = {
        "absent": r"absent does not exist",
        "noise.model": r"noise\.model is not a tokenizer that can be read: neither a .*json, nor a .*, nor a tiktoken",
        "empty.model": r"empty\.model is not a tokenizer that can be read",
        "text.model": r"text\.model is not a tokenizer that can be read",
        "pointer.model": r"git lfs pull",
        "cut.model": r"cut\.model is not a sentencepiece model",
        "pieceless.model": r"pieceless\.model is not a sentencepiece model",
    }
    for name, message in faults.items():
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)


def test_forcing_another_kind_is_refused(files: dict[str, Path]) -> None:
    for kind, other in (("hf", "tiktoken"), ("sentencepiece", "tiktoken"), ("tiktoken", "hf")):
        with pytest.raises(DataError, match=r"tokenizer\.model is not a "):
            load_tokenizer(f"{kind}:{files[other]}")
        with pytest.raises(DataError, match=f"{other} contains no .*{kind if kind != 'hf' else 'json'}"):
            load_tokenizer(f"{kind}:{files[other].parent}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, "b25l"], r"line 1001 is not a token in base64 and its rank: 'b25l'"),
        (lambda lines: [lines[0], "%%%% 3", *lines[2:]], r"line 2 is not a token"),
        (lambda lines: [lines[0], "b25l x", *lines[2:]], r"line 2 is not a token"),
        (lambda lines: [*lines[:500], *lines[501:]], r"997 tokens, but none of rank 500"),
        (lambda lines: [*lines[:500], lines[499], *lines[501:]], r"997 tokens, but none of rank 500"),
    ],
)
def test_a_damaged_rank_file_names_what_is_wrong(rank_file: Path, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    lines = rank_file.read_text().splitlines()
    assert len(lines) == 998
    lines = [*lines, "b25lIG1vcmU= 998", "YW5kIG9uZQ== 999"] if "1001" in message else lines
    (tmp_path / "damaged.model").write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(DataError, match=rf"damaged\.model .*{message}"):
        load_tokenizer(tmp_path / "damaged.model")


def test_a_rank_file_without_all_bytes_is_refused(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256) if byte != 0xC3] + [b"ab"]
    (tmp_path / "t.model").write_text("".join(f"{b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    with pytest.raises(DataError, match="no token for the byte 0xc3"):
        load_tokenizer(tmp_path / "t.model")


SPECIAL = "a<|end_of_text|>b</s><|begin_of_text|>"


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_special_tokens_in_a_text_are_plain_text(files: dict[str, Path], kind: str) -> None:
    tokenizer = load_tokenizer(files[kind])
    ids = tokenizer.encode(SPECIAL)
    assert tokenizer.eod not in ids and tokenizer.bos not in ids
    assert tokenizer.decode(ids) == SPECIAL


def test_special_tokens_in_a_text_are_themselves_for_hugging_face(files: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(files["hf"])
    ids = tokenizer.encode(SPECIAL)
    assert (ids.count(tokenizer.eod), ids.count(tokenizer.bos)) == (1, 1)
    assert tokenizer.decode(ids) == SPECIAL


def test_decoding_writes_special_tokens_out_and_leaves_unknown_ids_out(files: dict[str, Path]) -> None:
    ends = {"hf": "<|end_of_text|>", "sentencepiece": "</s>", "tiktoken": "<|end_of_text|>"}
    for kind, file in files.items():
        tokenizer = load_tokenizer(file)
        assert tokenizer.eod is not None
        ids = [*tokenizer.encode("un"), tokenizer.eod, *tokenizer.encode("deux"), tokenizer.vocab_size, 10**6]
        assert tokenizer.decode(ids) == f"un{ends[kind]}deux"


def test_any_text_survives_tiktoken(files: dict[str, Path], texts: list[str]) -> None:
    tokenizer = load_tokenizer(files["tiktoken"])
    for text in [*texts, "", " ", "\r\n\t", "ßø 漢字 👩‍🚀 \x00", "1234567 '  s"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_character_survives_sentencepiece_with_bytes(files: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(files["sentencepiece"])
    for text in ("", "ßø 漢字 👩‍🚀", "l'été : « œuvre »"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_names_its_special_tokens(tmp_path: Path, sentencepiece_model: Path, lines: list[str]) -> None:
    from sentencepiece import SentencePieceTrainer

    usual = load_tokenizer(sentencepiece_model)
    assert (usual.vocab_size, usual.bos, usual.eod) == (1000, 1, 2)
    settings = dict(vocab_size=300, bos_id=-1, eos_id=-1, minloglevel=2, hard_vocab_limit=False)
    for name, control, eod in (("a", ["<|endoftext|>"], 1), ("b", ["<other>"], None)):
        with open(tmp_path / f"{name}.model", "wb") as model:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines[:1000]), model_writer=model, control_symbols=control, **settings
            )
        tokenizer = load_tokenizer(tmp_path / f"{name}.model")
        assert (tokenizer.bos, tokenizer.eod) == (None, eod)


@pytest.mark.parametrize("blank", [" ", "\n", " \n", "\t\u00a0"])
def test_very_long_white_space_does_not_crash_tiktoken(rank_file: Path, blank: str) -> None:
    tokenizer = load_tokenizer(rank_file)
    # More than its regular expressions can backtrack over: the library alone panics on white space.
    text = "début" + blank * (1_500_000 // len(blank)) + "fin"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("word", ["a", "^", "漢", "1"])
def test_very_long_words_do_not_crash_tiktoken(rank_file: Path, word: str) -> None:
    tokenizer = load_tokenizer(rank_file)
    assert tokenizer.decode(tokenizer.encode(word * 300_000)) == word * 300_000


def test_long_documents_have_the_ids_of_tiktoken(rank_file: Path, lines: list[str]) -> None:
    tokenizer = load_tokenizer(rank_file)
    text = "".join(lines) * 3 + " " * 300_000 + "fin"
    assert len(text) > 900_000
    assert tokenizer.encode(text) == tokenizer._backend.encode_ordinary(text)  # type: ignore[attr-defined]
