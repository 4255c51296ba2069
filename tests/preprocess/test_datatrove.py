"""The adapter for datatrove: two local tasks and a merge equal preprocessing."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="pip install megagap[curate]")

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader

from megagap.data.indexed import IndexedDataset
from megagap.data.manifest import read_manifest
from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.preprocess.datatrove import TokenFileWriter
from megagap.preprocess.merge import merge_datasets
from megagap.tokenizer import SpecialTokens, load_tokenizer


@pytest.mark.parametrize("workers", [1, 2])
def test_two_local_tasks_and_a_merge_are_what_preprocessing_gives(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, workers: int
) -> None:
    for i in range(2):  # datatrove distributes whole files over tasks
        lines = [json.dumps({"text": texts[j % 4] + f" {i} {j}"}) for j in range(100)]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{i}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    pipeline = [JsonlReader(str(tmp_path / "in")), TokenFileWriter(str(tmp_path / "web"), str(tokenizer_folder))]
    executor = LocalPipelineExecutor(pipeline, tasks=2, workers=workers, logging_dir=str(tmp_path / "log"))
    executor.run()
    shards = [str(tmp_path / f"web-0000{i}-of-00002_text_document") for i in range(2)]
    merge_datasets(shards, str(tmp_path / "merged"))
    preprocess([tmp_path / "in"], str(tmp_path / "whole"), str(tokenizer_folder), append_eod=True)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"merged{ending}").read_bytes() == (tmp_path / f"whole_text_document{ending}").read_bytes()
    manifest = read_manifest(tmp_path / "merged")
    assert manifest and manifest.documents == 200
    assert not list(tmp_path.glob("*.partial*")) and not list(tmp_path.glob("*.lock"))


def test_an_error_of_the_earlier_pipeline_is_not_mistaken_for_one_of_writing(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    def unreadable() -> Iterator[Document]:
        yield Document("some text", "0")
        raise FileNotFoundError(2, "No such file or directory", "crawl/7.jsonl")

    with pytest.raises(FileNotFoundError, match=r"crawl/7\.jsonl"):
        list(TokenFileWriter(str(tmp_path / "web"), str(tokenizer_folder)).run(unreadable()))
    assert not list(tmp_path.glob("web*"))


def test_a_document_that_cannot_be_encoded_is_named_by_its_id(tmp_path: Path, tokenizer_folder: Path) -> None:
    documents = (Document("some text", "first"), Document("half a \ud800", "second"))
    with pytest.raises(DataError, match="document 'second' has no text that can be encoded"):
        list(TokenFileWriter(str(tmp_path / "web"), str(tokenizer_folder)).run(iter(documents)))
    assert not list(tmp_path.glob("web*"))


@pytest.mark.parametrize("choice", ["text", "parse"])
def test_special_tokens_in_texts_are_what_was_asked_for_and_counted(
    tmp_path: Path, tokenizer_folder: Path, choice: SpecialTokens
) -> None:
    writer = TokenFileWriter(str(tmp_path / "web"), str(tokenizer_folder), special_tokens=choice, append_eod=False)
    list(writer.run(iter((Document("a <|end_of_text|>", "0"),))))
    prefix = tmp_path / "web-00000-of-00001_text_document"
    manifest = read_manifest(prefix)
    assert manifest and (manifest.special_tokens, manifest.special_tokens_in_texts) == (choice, 1)
    assert IndexedDataset(prefix)[0].tolist() == load_tokenizer(tokenizer_folder, choice).encode("a <|end_of_text|>")


@pytest.mark.parametrize("text", [None, 3, "half a pair \ud800"])
def test_a_document_without_text_is_named_by_its_id(tmp_path: Path, tokenizer_folder: Path, text: str) -> None:
    documents = [Document("some text", "crawl/0"), Document(text, "crawl/1")]
    with pytest.raises(DataError, match="the document 'crawl/1' has no text that can be encoded"):
        list(TokenFileWriter(str(tmp_path / "web"), str(tokenizer_folder)).run(iter(documents)))
    assert not list(tmp_path.glob("web*"))
