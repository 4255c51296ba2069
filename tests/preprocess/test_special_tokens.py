"""A special token that a text spells out is text, or that token, as asked for; and is counted."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from megagap.data.indexed import IndexedDataset
from megagap.data.manifest import Manifest, read_manifest
from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.preprocess.merge import merge_datasets
from megagap.tokenizer import SpecialTokens, load_tokenizer
from megagap.tokenizer.occurrences import Occurrences
from megagap.tokenizer.tiktoken import to_hugging_face

SPELLED = "see <|end_of_text|> and<|begin_of_text|><|end_of_text|> here </s> <s>"


@pytest.fixture
def kinds(tokenizer_folder: Path, rank_file: Path, sentencepiece_model: Path) -> dict[str, Path]:
    return {"hf": tokenizer_folder, "tiktoken": rank_file, "sentencepiece": sentencepiece_model}


@pytest.fixture
def spelled(tmp_path: Path) -> Path:
    file = tmp_path / "spelled.jsonl"
    file.write_text(json.dumps({"text": SPELLED}) + '\n{"text": "nothing"}\n')
    return file


def manifest_of(prefix: str) -> Manifest:
    manifest = read_manifest(prefix)
    assert manifest
    return manifest


@pytest.mark.parametrize(("kind", "count"), [("hf", 3), ("tiktoken", 3), ("sentencepiece", 2)])
def test_special_tokens_stay_text_by_default_and_are_counted(
    tmp_path: Path, spelled: Path, kinds: dict[str, Path], kind: str, count: int
) -> None:
    summary = preprocess([spelled], str(tmp_path / "out"), str(kinds[kind]))
    tokenizer = load_tokenizer(kinds[kind], "text")
    document = IndexedDataset(tmp_path / "out_text_document").document(0).tolist()
    assert document == tokenizer.encode(SPELLED)
    assert not {*document} & {tokenizer.bos, tokenizer.eod}
    assert tokenizer.decode(document).strip() == SPELLED
    manifest = manifest_of(summary.pairs[0].prefix)
    assert (manifest.arguments.special_tokens, manifest.special_tokens_in_texts) == ("text", count)
    assert summary.notes[-1].endswith(f"in the texts of 'text' {count} times; they became ordinary text")


@pytest.mark.parametrize("kind", ["hf", "tiktoken"])
@pytest.mark.parametrize("fast", ["off", "on"])
def test_parsed_special_tokens_are_tokens(
    tmp_path: Path, spelled: Path, kinds: dict[str, Path], kind: str, fast: Any
) -> None:
    if fast == "on":
        pytest.importorskip("gigatoken")
    summary = preprocess([spelled], str(tmp_path / "out"), str(kinds[kind]), special_tokens="parse", fast=fast)
    from tokenizers import Tokenizer

    hf = Tokenizer.from_file(str(kinds["hf"] / "tokenizer.json")) if kind == "hf" else to_hugging_face(kinds[kind])
    document = IndexedDataset(tmp_path / "out_text_document").document(0).tolist()
    assert document == hf.encode(SPELLED, add_special_tokens=False).ids
    tokenizer = load_tokenizer(kinds[kind])
    assert document.count(tokenizer.eod) == 2 and document.count(tokenizer.bos) == 1
    assert manifest_of(summary.pairs[0].prefix).special_tokens_in_texts == 3
    assert "these tokens" in summary.notes[-1]


def test_the_fast_path_leaves_text_as_text(tmp_path: Path, spelled: Path, kinds: dict[str, Path]) -> None:
    pytest.importorskip("gigatoken")
    for kind in ("hf", "tiktoken"):
        for fast in ("on", "off"):
            preprocess([spelled], str(tmp_path / f"{kind}-{fast}"), str(kinds[kind]), fast=fast)  # type: ignore[arg-type]
        on, off = ((tmp_path / f"{kind}-{fast}_text_document.bin").read_bytes() for fast in ("on", "off"))
        assert on == off


def test_sentencepiece_cannot_parse(tmp_path: Path, spelled: Path, kinds: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"control tokens in a text are always text(.|\n)*--special-tokens text"):
        preprocess([spelled], str(tmp_path / "out"), str(kinds["sentencepiece"]), special_tokens="parse")


def test_pieces_of_plain_texts_are_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "long.txt").write_text("word <|end_of_text|> " * 150_000)
    summary = preprocess([tmp_path / "long.txt"], str(tmp_path / "out"), str(tokenizer_folder), workers=2)
    assert manifest_of(summary.pairs[0].prefix).special_tokens_in_texts == 150_000


def test_documents_that_are_left_out_are_not_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "<|end_of_text|>"}\n' + json.dumps({"text": "word " * 99}))
    options: dict[str, Any] = dict(min_tokens=50)
    summary = preprocess([tmp_path / "a.jsonl"], str(tmp_path / "out"), str(tokenizer_folder), **options)
    assert manifest_of(summary.pairs[0].prefix).special_tokens_in_texts == 0
    assert not any("special tokens" in note for note in summary.notes)


def test_a_finished_run_with_the_other_choice_is_not_mistaken_for_this_one(
    tmp_path: Path, spelled: Path, tokenizer_folder: Path
) -> None:
    arguments: tuple[Any, ...] = ([spelled], str(tmp_path / "out"), str(tokenizer_folder))
    preprocess(*arguments, special_tokens="parse")
    assert "finished already" in preprocess(*arguments, special_tokens="parse", resume=True).notes[0]
    preprocess(*arguments, special_tokens="text", resume=True)
    assert manifest_of(str(tmp_path / "out_text_document")).arguments.special_tokens == "text"


def test_a_finished_run_with_other_settings_beside_the_tokenizer_is_not_mistaken_for_this_one(
    tmp_path: Path, spelled: Path, tokenizer_folder: Path
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    arguments: tuple[Any, ...] = ([spelled], str(tmp_path / "out"), str(folder))
    first = manifest_of(preprocess(*arguments).pairs[0].prefix)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    summary = preprocess(*arguments, resume=True)
    assert not any("finished already" in note for note in summary.notes)
    assert manifest_of(summary.pairs[0].prefix).tokenizer.effective != first.tokenizer.effective


def older(prefix: str) -> None:
    """As in manifests older than this option."""
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    del manifest["arguments"]["special_tokens"], manifest["special_tokens_in_texts"], manifest["tokenizer"]["effective"]
    Path(f"{prefix}.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("kind", "was"), [("hf", "parse"), ("tiktoken", "text"), ("sentencepiece", "text")])
def test_older_manifests_mean_the_old_default(
    tmp_path: Path, spelled: Path, kinds: dict[str, Path], kind: str, was: SpecialTokens
) -> None:
    arguments: tuple[Any, ...] = ([spelled], str(tmp_path / "out"), str(kinds[kind]))
    prefix = preprocess(*arguments, special_tokens=was).pairs[0].prefix
    older(prefix)
    assert manifest_of(prefix).special_tokens == was
    assert "finished already" in preprocess(*arguments, special_tokens=was, resume=True).notes[0]


def test_pairs_of_different_choices_are_not_merged(tmp_path: Path, spelled: Path, tokenizer_folder: Path) -> None:
    prefixes = {}
    for choice in ("text", "parse"):
        arguments: tuple[Any, ...] = ([spelled], str(tmp_path / choice), str(tokenizer_folder))
        prefixes[choice] = preprocess(*arguments, special_tokens=choice).pairs[0].prefix  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"made with special_tokens = text, .* with parse"):
        merge_datasets([*prefixes.values()], str(tmp_path / "merged"))
    merge_datasets([prefixes["text"]] * 2, str(tmp_path / "merged"))
    merged = manifest_of(str(tmp_path / "merged"))
    assert (merged.arguments.special_tokens, merged.special_tokens_in_texts) == ("text", 6)
    older(prefixes["parse"])
    merge_datasets([prefixes["parse"]] * 2, str(tmp_path / "old"))
    merged = manifest_of(str(tmp_path / "old"))
    assert (merged.arguments.special_tokens, merged.special_tokens_in_texts) == ("parse", None)


@pytest.mark.parametrize("choice", ["text", "parse"])
def test_the_choice_goes_with_a_pickled_tokenizer(kinds: dict[str, Path], choice: SpecialTokens) -> None:
    for kind in ("hf", "tiktoken"):
        tokenizer = load_tokenizer(kinds[kind], choice)
        assert pickle.loads(pickle.dumps(tokenizer)).encode(SPELLED) == tokenizer.encode(SPELLED)


@pytest.mark.parametrize(
    ("tokens", "text", "count"),
    [
        ((), "a<s>", 0),
        (("<s>", "</s>"), "<s>a</s><s", 2),
        (("<|a|>", "<|a|>b"), "<|a|>b<|a|>c", 2),
        (("aa",), "aaa", 1),
        (("<s>", "[PAD]", ".*"), "[PAD].*x<s>", 3),
    ],
)
def test_occurrences_are_counted(tokens: tuple[str, ...], text: str, count: int) -> None:
    assert Occurrences(tokens)(text) == count
