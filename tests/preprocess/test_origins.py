"""Every document of a pair is traced to the line or row that it was made from, whatever was left out or rearranged."""

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megagap.data.indexed import IndexedDataset
from megagap.data.manifest import read_manifest
from megagap.data.origins import Origins, UnknownOriginsError
from megagap.preprocess import arrange, job, preprocess
from megagap.preprocess.merge import merge_datasets
from megagap.preprocess.units import read_units
from megagap.tokenizer import load_tokenizer

Make = Callable[..., str]


@pytest.fixture
def inputs(tmp_path: Path, texts: list[str]) -> list[Path]:
    """JSON lines with blank, empty, short and malformed ones and repetitions, plain and compressed; rows; two texts."""
    lines = [json.dumps({"text": texts[i % 4] + str(i % 70), "title": f"title {i}"}) for i in range(200)]
    for place, line in ((0, ""), (7, '{"text": "", "title": "some"}'), (8, "{"), (90, "  "), (91, '{"text": "a"}')):
        lines.insert(place, line)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))  # without a line end at the end
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines[:60]) + "\n\n").encode()))
    (tmp_path / "c.txt").write_text(texts[0] * 30 + "\n" + texts[1])
    rows = [f"row {i} {texts[2]}" if i % 5 else "" for i in range(40)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text(texts[1])
    return [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.parquet", "e.txt")]


@pytest.fixture
def made(tmp_path: Path, inputs: list[Path], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Preprocesses the inputs, cut into small units."""
    monkeypatch.setattr(job, "read_units", partial(read_units, unit_bytes=500))
    monkeypatch.setattr(arrange, "BUCKET_BYTES", 2000)

    def make(name: str, **options: Any) -> str:
        options = dict(append_eod=True, on_error="skip", min_tokens=3) | options
        return preprocess(inputs, str(tmp_path / name), str(tokenizer_folder), **options).pairs[0].prefix

    return make


def text_at(file: str, unit: str | None, number: int) -> str:
    """Read from the input anew."""
    if unit is None:
        return Path(file).read_text()
    if unit == "row":
        return str(parquet.read_table(file)["text"][number - 1])
    data = Path(file).read_bytes()
    line = (gzip.decompress(data) if file.endswith(".gz") else data).split(b"\n")[number - 1]
    return str(json.loads(line)["text"])


def require_origins(prefix: str, tokenizer_folder: Path) -> None:
    pair, origins, tokenizer = IndexedDataset(prefix), Origins(prefix), load_tokenizer(str(tokenizer_folder))
    found = [origins[i] for i in range(pair.document_count)]
    assert len({(o.file, o.number) for o in found}) == len(found) > 200
    for document, origin in enumerate(found):
        text = tokenizer.decode(pair.document(document)[:-1].tolist())
        assert text == text_at(origin.file, origin.unit, origin.number), (document, origin)


@pytest.mark.parametrize(
    "options", [{}, {"workers": 2}, {"shuffle_documents": 5}], ids=["in order", "workers", "shuffled"]
)
def test_each_document_is_the_text_at_its_origin(made: Make, tokenizer_folder: Path, options: dict[str, Any]) -> None:
    require_origins(made("out", **options), tokenizer_folder)


def test_of_repeated_documents_the_first_is_named(made: Make, tokenizer_folder: Path) -> None:
    prefix = made("out", dedup=True, shuffle_documents=5, min_tokens=0)
    origins, manifest = Origins(prefix), read_manifest(prefix)
    assert manifest and manifest.left_out.duplicate > 100
    found = [origins[i] for i in range(manifest.documents)]
    # Nothing of the second file, which repeats lines of the first; of these, none after the first round of numbers.
    assert {Path(o.file).name for o in found} == {"a.jsonl", "c.txt", "d.parquet", "e.txt"}
    tokenizer, pair = load_tokenizer(str(tokenizer_folder)), IndexedDataset(prefix)
    for i, origin in enumerate(found):
        assert tokenizer.decode(pair.document(i)[:-1].tolist()) == text_at(origin.file, origin.unit, origin.number)


def test_the_map_is_the_same_for_any_number_of_workers(made: Make) -> None:
    one, two = (Path(made(name, workers=n) + ".origins").read_bytes() for name, n in (("one", 1), ("two", 2)))
    assert one == two


@pytest.mark.parametrize("present", [True, False])
def test_a_part_of_a_file_names_lines_of_the_whole_file_where_that_is_still_there(
    made: Make, inputs: list[Path], present: bool
) -> None:
    whole, shards = made("whole"), [made("part", part=(i, 4)) for i in range(4)]
    merged = merge_datasets(shards, f"{whole}-merged").prefix
    expected = [Origins(whole)[i] for i in range(IndexedDataset(whole).document_count)]
    if not present:
        inputs[0].rename(inputs[0].with_suffix(".moved"))
    assert [Origins(merged)[i] for i in range(len(expected))] == expected
    apart = [origins[i] for s in shards for origins in [Origins(s)] for i in range(IndexedDataset(s).document_count)]
    if present:
        assert apart == expected
    else:
        first = next(origin for origin in apart if origin.from_byte)
        assert first.describe(2).endswith(f", counted from byte {first.from_byte:,}")
        rest = inputs[0].with_suffix(".moved").read_bytes()[first.from_byte :].split(b"\n", 1)[1]
        assert b'"text"' in rest.split(b"\n")[first.number - 1]


def test_pairs_that_do_not_say_are_told_from_others(made: Make, caplog: pytest.LogCaptureFixture) -> None:
    prefix, other = made("out"), made("other")
    path = Path(f"{prefix}.json")
    manifest = json.loads(path.read_text())
    Path(f"{prefix}.origins").unlink()
    with pytest.raises(UnknownOriginsError, match="is missing"):
        Origins(prefix)
    del manifest["files"][".origins"]  # as an earlier version wrote it
    for record in manifest["inputs"]:
        del record["records"], record["kind"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UnknownOriginsError, match="has no map of origins"):
        Origins(prefix)
    merged = merge_datasets([other, prefix], f"{prefix}-merged").prefix
    assert "cannot say where its documents came from" in caplog.text
    with pytest.raises(UnknownOriginsError):
        Origins(merged)
    path.unlink()
    with pytest.raises(UnknownOriginsError, match="has no manifest"):
        Origins(prefix)
