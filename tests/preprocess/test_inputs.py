"""Which files are read, as which kind, and how they are sharded."""

import gzip
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megagap.data.origins import lines_before
from megagap.errors import DataError
from megagap.preprocess import job, preprocess
from megagap.preprocess.documents import Fault, documents_of
from megagap.preprocess.inputs import Input, shard
from megagap.preprocess.listing import find_inputs
from megagap.preprocess.units import read_units


def texts_in(inputs: list[Input], unit_bytes: int = 100) -> list[str]:
    """Each document's text; a plain text is joined from its pieces."""
    found: list[str] = []
    for unit in read_units(inputs, ["text"], True, unit_bytes=unit_bytes):
        if unit.kind != "text":
            for document in documents_of(unit, ["text"]):
                assert not isinstance(document, Fault), document
                found.append(document[0])
        elif unit.begins:
            found.append(unit.data.decode())
        else:
            found[-1] += unit.data.decode()
    return found


def write_lines(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_folders_and_patterns_are_read_by_path_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.json", "a.jsonl", "_temporary/x.jsonl", ".hidden.jsonl", "b/.git/x.jsonl"):
        write_lines(tmp_path / name, [name])
    (tmp_path / "b/notes.md").write_text("not read")
    assert texts_in(find_inputs([tmp_path])) == ["a.jsonl", "b/1.json", "b/2.jsonl"]
    assert texts_in(find_inputs([f"{tmp_path}/b/*.jsonl", f"{tmp_path}/a*"])) == ["b/2.jsonl", "a.jsonl"]
    with pytest.raises(DataError, match=r"no file matches .*\*\.parquet"):
        find_inputs([f"{tmp_path}/*.parquet"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty contains no file to read"):
        find_inputs([tmp_path / "empty"])


def test_kinds_are_detected_by_content_and_plain_texts_also_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.txt", ["one", "two"])
    pq.write_table(pa.table({"text": ["three", "four"], "id": [1, 2]}), tmp_path / "table")
    (tmp_path / "prose.txt.gz").write_bytes(gzip.compress(b"five\n\nstill five"))
    files = [tmp_path / name for name in ("lines.txt", "table", "prose.txt.gz")]
    assert texts_in(find_inputs(files)) == ["one", "two", "three", "four", "five\n\nstill five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bz2", b"BZh91AY", "is compressed with bzip2, which is not supported"),
        ("a.zip", b"PK\x03\x04", "is compressed with zip"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "is in UTF-16; only UTF-8 is supported"),
        ("a.gz", b"\x1f\x8b\x08\x00garbage", "cannot be read beyond line 0"),
        ("a.jsonl.gz", b"", "a.jsonl.gz has only 0 bytes"),
        ("a.parquet", b"PAR", "a.parquet has only 3 bytes"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet cannot be read beyond row 0"),
        ("a.txt", b"fine\nand \xff not", r"a.txt, line 2: not valid UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "half', "a.jsonl, line 2: not valid JSON at character 10: Unter"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}', "a.jsonl, line 2: not valid UTF-8"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_reason(
    tmp_path: Path, tokenizer_folder: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        preprocess([tmp_path / name], str(tmp_path / "out"), str(tokenizer_folder))
    assert not list(tmp_path.glob("out*"))


def test_a_file_that_needs_a_dictionary_is_not_called_damaged(tmp_path: Path) -> None:
    samples = [f'{{"text": "hello world {i} of dictionaries"}}'.encode() for i in range(2000)]
    compressor = zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(1000, samples))
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(b'{"text": "a"}\n' * 100))
    with pytest.raises(DataError, match=r"a\.jsonl\.zst was compressed with a dictionary .*, or .*\n.*zstd -d -D"):
        list(read_units(find_inputs([tmp_path / "a.jsonl.zst"]), ["text"], splits_texts=True))


def test_a_byte_order_mark_at_the_start_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo")
    assert texts_in(find_inputs([tmp_path / "a.jsonl", tmp_path / "b.txt"])) == ["one", "two"]


def test_parquet_columns_of_bytes_nulls_and_bad_utf8_are_documents_or_faults_by_row(tmp_path: Path) -> None:
    values = pa.array([b"one", None, b"\xff", "zwölf".encode()], pa.binary())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet", row_group_size=3)
    units = list(read_units(find_inputs([tmp_path / "a.parquet"]), ["text"], True, unit_bytes=1))
    found = [(unit.line, document) for unit in units for document in documents_of(unit, ["text"])]
    assert [line for line, _ in found] == [1, 2, 3, 4]
    assert [d.reason if isinstance(d, Fault) else d[0] for _, d in found] == [
        "one", "'text' is not text", "invalid UTF-8", "zwölf",
    ]  # fmt: skip
    with pytest.raises(DataError, match="has no column 'body'; it has 'text'"):
        list(read_units(find_inputs([tmp_path / "a.parquet"]), ["body"], True))


def test_reading_resumes_at_any_row(tmp_path: Path) -> None:
    texts = [f"document {i} " * (i % 9 + 1) for i in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=70)
    inputs = find_inputs([tmp_path / "a.parquet"])
    units = list(read_units(inputs, ["text"], True, unit_bytes=700))
    assert len(units) > 20
    for i in range(0, len(units) - 1, 5):
        rest = read_units(inputs, ["text"], True, units[i].next, 700)
        done = sum(1 for unit in units[: i + 1] for _ in documents_of(unit, ["text"]))
        assert [d[0] for unit in rest for d in documents_of(unit, ["text"])] == texts[done:]  # type: ignore[index]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.text("ab é\n", max_size=30), max_size=6), min_size=1, max_size=4),
    st.integers(1, 9),
    st.booleans(),
)
def test_shards_concatenated_are_exactly_the_whole(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], count: int, last_newline: bool
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    for i, texts in enumerate(files):
        path = folder / f"{i}.jsonl"
        write_lines(path, texts)
        if not last_newline and texts:
            path.write_bytes(path.read_bytes()[:-1])
        if i == 2:
            path.write_bytes(gzip.compress(path.read_bytes()))
    inputs = find_inputs([folder])
    parts = [shard(inputs, i, count) for i in range(count)]
    assert [text for part in parts for text in texts_in(part, 7)] == [text for texts in files for text in texts]


def test_json_lines_are_distinguished_from_text_even_with_a_long_first_line_or_short_frames(tmp_path: Path) -> None:
    long = "word " * 100_000
    write_lines(tmp_path / "1.txt", [long, "two"])
    lines = json.dumps({"text": "three"}).encode() + b"\n"
    frames = [zstandard.compress(lines[i : i + 4]) for i in range(0, len(lines), 4)]
    (tmp_path / "2.txt.zst").write_bytes(b"".join(frames))
    assert texts_in(find_inputs([tmp_path])) == [long, "two", "three"]
    (tmp_path / "3.txt").write_text("{" + long)
    assert texts_in(find_inputs([tmp_path / "3.txt"])) == ["{" + long]


@pytest.mark.parametrize("kind", ["dictionary", "string_view", "binary_view"])
def test_units_of_parquet_texts_that_share_buffers_contain_only_their_own(tmp_path: Path, kind: str) -> None:
    texts = [f"{i} " * 500 for i in range(1000)]
    column = pa.array(texts)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    inputs = find_inputs([tmp_path])
    assert texts_in(inputs, 100_000) == texts
    assert sum(len(unit.data) for unit in read_units(inputs, ["text"], True, unit_bytes=100_000)) < 3_000_000


def test_skipping_in_a_shard_counts_the_lines_before_for_reported_faults_only(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(100)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{\n" * 1000)
    counted = []
    monkeypatch.setattr(job, "lines_before", lambda *part: (counted.append(part), lines_before(*part))[1])
    monkeypatch.setattr(job, "read_units", partial(read_units, unit_bytes=100))
    summary = preprocess(
        [tmp_path / "a.jsonl"], str(tmp_path / "out"), str(tokenizer_folder), part=(1, 2), on_error="skip"
    )
    assert summary.skipped == 1000 and "line 101: not valid JSON" in summary.first_skipped[0]
    assert len(counted) <= 5


def test_faults_in_a_shard_name_the_line_of_the_file(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(100)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 101: not valid JSON"):
        preprocess([tmp_path / "a.jsonl"], str(tmp_path / "out"), str(tokenizer_folder), part=(3, 4))


def test_a_pipe_is_read_but_neither_resumed_nor_sharded(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(100)])
    os.mkfifo(tmp_path / "pipe")
    arguments = ([tmp_path / "pipe"], str(tmp_path / "out"), str(tokenizer_folder))
    with pytest.raises(DataError, match=r"is (no|not a) regular file"):
        preprocess(*arguments, resume=True)
    with pytest.raises(DataError, match=r"is (no|not a) regular file"):
        preprocess(*arguments, part=(0, 2))
    feeder = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((tmp_path / "a.jsonl").read_bytes()))
    feeder.start()
    assert preprocess(*arguments).pairs[0].documents == 100
    feeder.join()


def test_standard_input_is_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    tool = Path(__file__).parents[2] / "tools/preprocess_data.py"
    command = [sys.executable, tool, "--input", "/dev/stdin", "--output-prefix", tmp_path / "out", "--workers", "1"]
    done = subprocess.run(
        [*command, "--tokenizer", tokenizer_folder], input='{"text": "one"}\n', capture_output=True, text=True
    )
    assert done.returncode == 0 and ": 1 document, " in done.stdout, done.stderr


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(100)])
    units = read_units(find_inputs([tmp_path / "a.jsonl"]), ["text"], True, unit_bytes=200)
    next(units)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match="it changed while it was read"):
        list(units)
