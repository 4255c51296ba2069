"""The manifest records what was read and written, and is trusted only if it belongs to its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.manifest import Manifest, read_manifest
from megagap.errors import DataError
from megagap.preprocess import preprocess


@pytest.fixture
def prefix(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> str:
    with open(corpus, "ab") as file:
        file.write(b'{"text": 3}\n{"body": "x"}\n{"body": "y"}\n{"text": "a"}\n')
    options: dict[str, Any] = dict(append_eod=True, on_error="skip", min_tokens=2)
    return preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder), **options).pairs[0].prefix


def manifest_of(prefix: str) -> Manifest:
    manifest = read_manifest(prefix)
    assert manifest is not None
    return manifest


def test_it_records_inputs_documents_and_files(prefix: str, corpus: Path) -> None:
    manifest = manifest_of(prefix)
    dataset = IndexedDataset(prefix)
    lines = [json.loads(line) for line in corpus.read_text().splitlines() if line]
    texts = [line["text"] for line in lines if isinstance(line.get("text"), str) and len(line["text"]) > 1]
    assert (
        (manifest.documents, manifest.tokens)
        == (dataset.document_count, dataset.token_count)
        == (200, len(dataset.tokens))
    )
    assert manifest.characters == sum(map(len, texts))
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.content_bytes == corpus.stat().st_size
    assert manifest.left_out.model_dump() == {
        "empty": 1,
        "short": 1,
        "duplicate": 0,
        "malformed": {"'text' is not text": 1, "no key 'text'": 2},
        "first_malformed": [
            f"{corpus}, line 203: the value of 'text' is int, not text",
            f"{corpus}, line 204: the document has no key 'text'; it has 'body'",
            f"{corpus}, line 205: the document has no key 'text'; it has 'body'",
        ],
    }
    content = corpus.read_bytes()
    (record,) = manifest.inputs
    assert (record.path, record.size, record.checksum) == (str(corpus), len(content), xxhash.xxh3_64_hexdigest(content))
    assert (record.kind, record.records) == ("lines", 206)
    for ending, file in manifest.files.items():
        data = Path(prefix + ending).read_bytes()
        assert (file.size, file.checksum) == (len(data), xxhash.xxh3_64_hexdigest(data))
    manifest.require_files(prefix)


def test_the_same_run_gives_the_same_manifest(
    prefix: str, tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    options: dict[str, Any] = dict(append_eod=True, on_error="skip", min_tokens=2, workers=2)
    again = preprocess([corpus], str(tmp_path / "again"), str(tokenizer_folder), **options).pairs[0].prefix
    assert Path(f"{again}.json").read_bytes() == Path(f"{prefix}.json").read_bytes()


def test_a_pair_that_was_not_preprocessed_has_none(prefix: str) -> None:
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        writer.add_document([1])
    assert read_manifest(prefix) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(tokens=-1), "tokens: Input should be greater than or equal to 0"),
        (lambda m: m.pop("tokenizer"), "tokenizer: Field required"),
        (lambda m: m.update(more=1), "more: Extra inputs"),
        (lambda m: m.update(manifest_version=2), "manifest_version"),
        (lambda m: m["files"].pop(".idx"), r"should list a \.bin and an \.idx"),
        (lambda m: m["files"][".bin"].update(size=2), "do not belong together"),
    ],
)
def test_an_invalid_manifest_is_refused(prefix: str, change: Any, message: str) -> None:
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_manifest(prefix)
    path.write_text("{")
    with pytest.raises(DataError, match="is not a token-file manifest"):
        read_manifest(prefix)
