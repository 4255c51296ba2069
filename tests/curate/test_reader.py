"""A curation's input: every line is a document or counted as none, and no file is read twice or in part."""

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="pip install megagap[curate]")

from megagap.curate.counts import documents
from megagap.curate.reader import CorpusReader
from megagap.curate.run import Executor, run_curation
from megagap.curate.settings import Input, load_curation
from megagap.errors import ConfigError, DataError
from tests.token_files import FRENCH

GOOD = json.dumps({"text": FRENCH}).encode() + b"\n"


def read(folder: Path, **settings: str) -> tuple[list[str], dict[str, int]]:
    """Ids of the documents, and the reader's counts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    reader = CorpusReader(Input(folder=str(folder), **settings), files)
    ids = [str(document.id) for document in reader.run()]
    return ids, {name: int(stat.total) for name, stat in reader.stats.stats.items() if name != "doc_len"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "caf\xe9"}', "invalid UTF-8"),
        (b'{"text": "cut', "invalid JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": 5}', "'text' is not text"),
        (b'{"text": ["a", "b"]}', "'text' is not text"),
        (b'{"text": "half \\ud800"}', "'text' is not text"),
        (b'{"text": "a", "text": "b"}', "key 'text' more than once"),
        (b'{"text": ""}', "empty text"),
        (b'{"text": "whole", "title": "half \\ud800"}', "unwritable value"),
    ],
)
def test_a_line_that_is_no_document_is_counted_and_what_follows_is_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + line + b"\n\n" + GOOD)
    ids, counts = read(tmp_path)
    assert ids == ["a.jsonl/0", "a.jsonl/3"]
    assert counts == {"total": 3, "forwarded": 2, "dropped": 1, f"dropped_{reason}": 1}


@pytest.mark.parametrize("extra", [{"media": None}, {"metadata": "x"}, {"id": 0}, {"filter_reason": "short"}])
def test_values_beside_the_text_are_kept_whatever_they_are(tmp_path: Path, extra: dict[str, object]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": FRENCH, **extra}).encode())
    ids, counts = read(tmp_path)
    assert ids == [str(extra.get("id", "a.jsonl/0"))] and counts == {"total": 1, "forwarded": 1}


def test_a_file_that_is_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD * 5000)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read beyond line .* ends before the end marker"):
        read(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    corpus = tmp_path / "cor[p]us"
    corpus.mkdir()
    fables = [json.dumps({"text": f"{FRENCH} Fable {i}."}).encode() + b"\n" for i in range(6)]
    (corpus / "a.jsonl").write_bytes(b"".join(fables[:4]) + b'{"text": "caf\xe9"}\n' + b"".join(fables[4:]))
    (corpus / "b.jsonl").write_bytes(GOOD + json.dumps({"text": "x = 1; " * 20}).encode())
    path = tmp_path / "curation.toml"
    path.write_text('tasks = 2\n[input]\nfolder = "cor[p]us"\n[output]\nfolder = "out"\n[deduplicate]\n[mask]\n')
    return path


def test_every_line_is_kept_or_dropped_by_one_stage(recipe: Path) -> None:
    run_curation(load_curation(recipe), Executor())
    output = recipe.parent / "out"
    counts = json.loads((output / "counts.json").read_text())
    kept = list(documents(output / "curated"))
    dropped = {path.name: len(list(documents(path))) for path in (output / "dropped").iterdir()}
    assert dropped == {"read": 1, "language": 1, "deduplicate": 6}
    assert counts["documents"] == 9 == len(kept) + sum(dropped.values())
    assert {stage["stage"]: stage["dropped"] for stage in counts["stages"]} == {**dropped, "mask": 0}
    (fault,) = documents(output / "dropped/read")
    assert fault["id"] == "a.jsonl/4" and "UTF-8" in fault["text"]


def test_files_that_were_removed_between_two_stages_are_noticed(recipe: Path) -> None:
    run_curation(load_curation(recipe), Executor())
    output = recipe.parent / "out"
    for path in [
        *output.glob("logs/select/*/*"),
        *output.glob("logs/finish/*/*"),
        output / "work/filtered/00001.jsonl.gz",
    ]:
        path.unlink()
    with pytest.raises(DataError, match=r"deduplicate was given \d documents of the 7 that were kept before it"):
        run_curation(load_curation(recipe), Executor())


def test_an_output_folder_within_the_input_is_refused(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace('"out"', '"cor[p]us/out"'))
    with pytest.raises(ConfigError, match=r"output\.folder = .* is in input\.folder"):
        run_curation(load_curation(recipe), Executor())


def test_input_without_a_document_is_refused(recipe: Path) -> None:
    for path in recipe.parent.glob("cor*/*"):
        path.write_bytes(b"\n")
    with pytest.raises(DataError, match="has no document: 2 files are empty"):
        run_curation(load_curation(recipe), Executor())
