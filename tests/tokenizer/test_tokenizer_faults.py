"""A fault in a tokenizer's files, or of its library on a text, is reported in megagap's words, with a place."""

import json
from base64 import b64encode
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from megagap.data.indexed import IndexedDataset
from megagap.data.manifest import read_manifest
from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.tokenizer import load_tokenizer
from tests.tokenizer.tokenizer_folders import byte_level_bpe, token

BPE = byte_level_bpe()
LONE = "\ud800"


def model(**options: Any) -> dict[str, Any]:
    return BPE | {"model": BPE["model"] | options}


def words(kind: str, **options: Any) -> dict[str, Any]:
    return {"added_tokens": [], "model": {"type": kind, "unk_token": "[UNK]"} | options}


FILES: dict[str, Any] = {
    "nothing": "", "null": "null", "a number": "3", "a list": "[]", "cut short": json.dumps(BPE)[:3000],
    "deep": "[" * 100_000, "deep objects": '{"a":' * 100_000, "many digits": '{"model": ' + "9" * 5000 + "}",
    "a byte-order mark": "\ufeff" + json.dumps(BPE), "no UTF-8": b"{\xff}",
    "no model": {key: value for key, value in BPE.items() if key != "model"}, "model null": BPE | {"model": None},
    "model a list": BPE | {"model": []}, "unknown model": model(type="Other"),
    "negative id": model(vocab={"a": -1}), "id a fraction": model(vocab={"a": 0.5}),
    "id a text": model(vocab={"a": "0"}),
    "huge id": model(vocab=BPE["model"]["vocab"] | {"zz": 2**31}), "larger id": model(vocab={"a": 2**40}),
    "one id twice": model(vocab=BPE["model"]["vocab"] | {"zz": 5}), "no vocabulary": model(vocab={}, merges=[]),
    "half a character": model(vocab=BPE["model"]["vocab"] | {LONE: 360}),
    "merge of nothing": model(merges=[["q", "no"]]),
    "merge of three": model(merges=["a b c"]), "dropout a text": model(dropout="x"), "dropout 2": model(dropout=2),
    "prefix that panics": model(continuing_subword_prefix="##"),
    "bad pattern": BPE | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                            "invert": False}},
    "unknown words": BPE | {"pre_tokenizer": {"type": "Other"}}, "words a list": BPE | {"pre_tokenizer": []},
    "words null": BPE | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": None}},
    "normalizer a text": BPE | {"normalizer": "NFC"}, "unknown decoder": BPE | {"decoder": {"type": "Other"}},
    "bad charsmap": BPE | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "truncation": BPE | {"truncation": {"x": 1}}, "padding": BPE | {"padding": {"pad_token": 3}},
    "added a text": BPE | {"added_tokens": "x"}, "added texts": BPE | {"added_tokens": ["x"]},
    "added an object": BPE | {"added_tokens": {"a": 1}}, "added without id": BPE | {"added_tokens": [token("x")]},
    "added id": BPE | {"added_tokens": [token("x") | {"id": -5}]},
    "added nothing": BPE | {"added_tokens": [token("", 9)]},
    "added half a character": BPE | {"added_tokens": [token(LONE, 9)]},
    "unigram of nothing": words("Unigram", vocab=[], unk_id=0),
    "unknown unigram": words("Unigram", vocab=[["a", 0.0]], unk_id=7),
}  # fmt: skip

BESIDE: dict[str, tuple[str, Any]] = {
    "config a list": ("tokenizer_config.json", []), "config cut short": ("tokenizer_config.json", '{"eos'),
    "eos a number": ("tokenizer_config.json", {"eos_token": 3}),
    "eos empty": ("tokenizer_config.json", {"eos_token": ""}),
    "eos of a number": ("tokenizer_config.json", {"eos_token": {"content": 3}}),
    "eos half a character": ("tokenizer_config.json", {"eos_token": LONE}),
    "eos with odd flags": ("tokenizer_config.json", {"pad_token": {"content": "p", "lstrip": "x"}}),
    "code": ("tokenizer_config.json", {"auto_map": [1, 2]}),
    "files": ("tokenizer_config.json", {"fast_tokenizer_files": 3}),
    "decoder a list": ("tokenizer_config.json", {"added_tokens_decoder": []}),
    "decoder null": ("tokenizer_config.json", {"added_tokens_decoder": None}),
    "decoder without ids": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    "decoder of null": ("tokenizer_config.json", {"added_tokens_decoder": {"5": None}}),
    "extra a number": ("tokenizer_config.json", {"extra_special_tokens": 3}),
    "extra numbers": ("tokenizer_config.json", {"extra_special_tokens": [3]}),
    "extra object": ("tokenizer_config.json", {"extra_special_tokens": {"a": 3}}),
    "additional a text": ("tokenizer_config.json", {"additional_special_tokens": "<a>"}),
    "split a text": ("tokenizer_config.json", {"split_special_tokens": "yes"}),
    "prefix a text": ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": "yes"}),
    "unknown a number": ("tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer", "unk_token": 3}),
    "mistral": ("tokenizer_config.json", {"fix_mistral_regex": True}),
    "inputs": ("tokenizer_config.json", {"init_inputs": ["x"]}),
    "map a list": ("special_tokens_map.json", []), "map of a number": ("special_tokens_map.json", {"eos_token": 5}),
    "map of nothing": ("special_tokens_map.json", {"eos_token": {}}),
    "map of numbers": ("special_tokens_map.json", {"additional_special_tokens": [5]}),
    "map extra": ("special_tokens_map.json", {"extra_special_tokens": 5}),
    "added a list": ("added_tokens.json", []), "added of texts": ("added_tokens.json", {"x": "y"}),
    "added nothing": ("added_tokens.json", {"": 400}), "model cut short": ("config.json", "{"),
}  # fmt: skip


def write(path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("name", FILES)
def test_a_broken_tokenizer_json_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "tokenizer.json", FILES[name])
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}")


@pytest.mark.parametrize("name", BESIDE)
def test_a_broken_file_beside_it_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / "tokenizer.json", BPE)
    file, content = BESIDE[name]
    write(tmp_path / file, content)
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / file) in str(error.value)


BYTES = [bytes([byte]) for byte in range(256)]


def ranks(*more: tuple[bytes, int]) -> bytes:
    tokens = [*((token, i) for i, token in enumerate(BYTES)), *more]
    return b"".join(b64encode(token) + b" %d\n" % rank for token, rank in tokens)


@pytest.mark.parametrize(
    "content",
    [b"", b"!!!! 0\n", ranks((b"zz", 3)), ranks((b"a", 256)), ranks((b"zz", 300)), ranks((b"zz", -1)),
     ranks((b"zz", 10**30)), ranks() + b"abc 256\n", ranks() + b"\xff 256\n", ranks()[:-5], ranks() + b"enp6"],
)  # fmt: skip
def test_a_broken_rank_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(DataError, match=r"t\.model"):
        load_tokenizer(f"tiktoken:{tmp_path / 't.model'}")


def test_a_sentencepiece_model_that_is_damaged_anywhere_is_refused_or_works(
    tmp_path: Path, sentencepiece_model: Path
) -> None:
    content = sentencepiece_model.read_bytes()
    file = tmp_path / "t.model"
    variants = [content[:length] for length in range(0, len(content), 797)]
    variants += [content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :] for i in range(0, len(content), 797)]
    refused = 0
    for variant in variants:
        file.write_bytes(variant)
        try:
            tokenizer = load_tokenizer(f"sentencepiece:{file}")
            tokenizer.encode_batch(["a text", "é \x00"])
            tokenizer.vocabulary()
        except DataError as error:
            assert str(file) in str(error)
            refused += 1
    assert refused > len(variants) // 3


@pytest.mark.parametrize("kind", ["hf", "tiktoken", "sentencepiece"])
@pytest.mark.parametrize("text", ["\x00", "a\x00b", LONE, "a" + LONE, "\ufffe", "x" * 100_000])
def test_an_unusual_text_is_encoded_or_refused(
    kind: str, text: str, tokenizer_folder: Path, rank_file: Path, sentencepiece_model: Path
) -> None:
    spec = {"hf": tokenizer_folder, "tiktoken": rank_file, "sentencepiece": sentencepiece_model}[kind]
    tokenizer = load_tokenizer(spec)
    if LONE in text:
        for encode in (tokenizer.encode, lambda text: tokenizer.encode_flat([text])):
            with pytest.raises(DataError, match="cannot encode a text"):
                encode(text)
    else:
        assert tokenizer.encode(text) == tokenizer.encode_flat([text])[0].tolist()


@pytest.fixture
def fails_on_some(tmp_path: Path) -> Path:
    """A vocabulary that lacks its unknown token, so that the library fails on some texts."""
    state = words("WordLevel", vocab={"known": 0, "word": 1})
    write(tmp_path / "tokenizer.json", deepcopy(state) | {"pre_tokenizer": {"type": "Whitespace"}})
    return tmp_path


LINES = '{"text": "known word"}\n\n{"text": "strange"}\n{"text": "word"}\n{"text": "known odd"}\n{"no": 1}\n'


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_the_library_fails_on_is_named_by_file_and_line(
    tmp_path: Path, fails_on_some: Path, workers: int
) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: the tokenizer .* cannot encode a text: .*UNK"):
        preprocess([tmp_path / "a.jsonl"], str(tmp_path / "out"), str(fails_on_some), workers=workers)
    assert not list(tmp_path.glob("out*"))


def test_documents_that_the_library_fails_on_can_be_skipped(tmp_path: Path, fails_on_some: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    preprocess([tmp_path / "a.jsonl"], str(tmp_path / "out"), str(fails_on_some), on_error="skip")
    dataset, manifest = IndexedDataset(tmp_path / "out_text_document"), read_manifest(tmp_path / "out_text_document")
    assert [document.tolist() for document in dataset] == [[0, 1], [1]]
    assert manifest
    assert manifest.left_out.malformed == {"cannot be tokenised": 2, "no key 'text'": 1}
    assert [fault.split(":")[0].split(", ")[1] for fault in manifest.left_out.first_malformed] == [
        "line 3", "line 5", "line 6"
    ]  # fmt: skip


def test_a_plain_text_that_the_library_fails_on_ends_the_run_with_its_name(tmp_path: Path, fails_on_some: Path) -> None:
    (tmp_path / "a.txt").write_text("strange")
    with pytest.raises(DataError, match=r"a\.txt, line 1: the tokenizer .* cannot encode a text"):
        preprocess([tmp_path / "a.txt"], str(tmp_path / "out"), str(fails_on_some))


def test_an_impossible_name_is_refused() -> None:
    for spec in ("/x\0y", "a" * 5000, "hf:" + "a" * 5000):
        with pytest.raises(DataError):
            load_tokenizer(spec)
