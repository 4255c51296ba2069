"""Whatever is wrong with a Parquet file or a value in it is reported with file and row."""

import io
import random
import subprocess
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagap.errors import DataError
from megagap.preprocess import parquet, preprocess
from megagap.preprocess.documents import Fault, documents_of
from megagap.preprocess.listing import find_inputs
from megagap.preprocess.units import read_units

ROOT = Path(__file__).parents[2]


def documents_in(path: Path) -> list[tuple[str, ...] | Fault]:
    return [d for unit in read_units(find_inputs([path]), ["text"], True) for d in documents_of(unit, ["text"])]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["zwölf", "b"]),
        pa.array(["zwölf", "b"], pa.large_string()),
        pa.array(["zwölf", "b"], pa.string_view()),
        pa.array(["zwölf", "b"]).dictionary_encode(),
        pa.array(["zwölf".encode(), b"b"]),
        pa.array(["zwölf".encode(), b"b"], pa.large_binary()),
        pa.array(["zwölf".encode(), b"b     "], pa.binary(6)),
    ],
    ids=lambda column: str(column.type),
)
def test_every_type_of_text_is_read(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [d[0].strip() for d in documents_in(tmp_path / "a.parquet")] == ["zwölf", "b"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pa.array([1, 2]), "is int"),
        (pa.array([1.5, 2.5]), "is float"),
        (pa.array([True, False]), "is bool"),
        (pa.array([None, None]), "is NoneType"),
        (pa.array([["a"], ["b"]]), "is list"),
        (pa.array([{"text": "a"}, {"text": "b"}]), "is dict"),
        (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32())), "is list"),
        (pa.array([date(2024, 1, 1)] * 2), "is date"),
        (pa.array([2**62] * 2, pa.timestamp("us")), "the value of 'text' cannot be read"),
        (pa.array([Decimal("1.5")] * 2), "is Decimal"),
        (pa.array([1, 2]).dictionary_encode(), "is int"),
        (pa.array([b"\xff", b"\xfe"]), "not valid UTF-8"),
        (pa.array([b"\xff", b"\xfe"]).dictionary_encode(), "not valid UTF-8"),
    ],
    ids=lambda value: str(value.type) if hasattr(value, "type") else "",
)
def test_a_value_that_is_not_text_is_a_fault_of_its_row_and_can_be_skipped(
    tmp_path: Path, tokenizer_folder: Path, column: Any, said: str
) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["fine"]}), tmp_path / "b.parquet")
    faults = documents_in(tmp_path / "a.parquet")
    assert len(faults) == 2 and all(isinstance(fault, Fault) and said in fault.details for fault in faults)
    arguments = ([tmp_path], str(tmp_path / "out"), str(tokenizer_folder))
    with pytest.raises(DataError, match=r"a\.parquet, row 1: "):
        preprocess(*arguments)
    summary = preprocess(*arguments, on_error="skip")
    assert (summary.skipped, summary.pairs[0].documents) == (2, 1)


def test_text_in_a_column_of_strings_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff"])
    texts = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    fine, fault = documents_in(tmp_path / "a.parquet")
    assert fine == ("fine",) and isinstance(fault, Fault) and fault.reason == "invalid UTF-8"


def test_a_column_name_that_occurs_twice_is_refused_at_the_start(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 2 columns 'text'"):
        find_inputs([tmp_path])


def test_a_missing_column_is_reported_before_anything_is_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    pq.write_table(pa.table({"body": ["a"], "meta": [{"text": "b"}]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no column 'text'; it has 'body', 'meta'"):
        find_inputs([tmp_path])


def test_an_encrypted_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PARE" + bytes(100) + b"PARE")
    with pytest.raises(DataError, match=r"a\.parquet is an encrypted Parquet file"):
        find_inputs([tmp_path / "a.parquet"])


def test_an_unknown_compression_is_reported_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet", compression="zstd")

    def refuse(*_: Any, **__: Any) -> None:
        raise pa.ArrowNotImplementedError("Support for codec 'zstd' not built")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    with pytest.raises(DataError, match=r"a\.parquet cannot be read beyond row 0: Support for codec 'zstd' not built"):
        documents_in(tmp_path / "a.parquet")


def test_without_pyarrow_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'megagap\[parquet\]'"):
        find_inputs([tmp_path])


def test_missing_rows_that_the_footer_promises_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "a.parquet", row_group_size=50)
    iter_batches = pq.ParquetFile.iter_batches

    def short(self: Any, *given: Any, **named: Any) -> Any:
        return (batch.slice(0, 40) for batch in iter_batches(self, *given, **named))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short)
    with pytest.raises(DataError, match="row group 0 should end with row 50 and ends with 40"):
        documents_in(tmp_path / "a.parquet")


FORMS: dict[str, dict[str, Any]] = {
    "plain": dict(compression="none", use_dictionary=False),
    "snappy": {},
    "zstd": dict(compression="zstd"),
    "pages-v2": dict(data_page_version="2.0", compression="gzip"),
}


@pytest.mark.parametrize("form", FORMS)
def test_damage_anywhere_is_reported_with_the_file_if_it_is_detectable(tmp_path: Path, form: str) -> None:
    draw = random.Random(0)
    texts = [f"word {draw.randrange(10**6)} " * 20 for _ in range(300)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=100, **FORMS[form])
    whole, path, told = sink.getvalue(), tmp_path / "a.parquet", 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 2, 20])):
            # In the footer, which is short but critical, as often as in the rest.
            at = draw.choice([draw.randrange(4, len(damaged)), len(damaged) - 1 - draw.randrange(500)])
            damaged[at] = draw.randrange(256)
        if draw.random() < 0.2:
            del damaged[draw.randrange(8, len(damaged)) :]
        path.write_bytes(damaged)
        try:
            documents_in(path)
        except DataError as error:
            assert "a.parquet" in str(error)
            told += 1
    assert told > 50


FOOTERS = """
import sys
from pathlib import Path
from megagap.errors import DataError
from tests.preprocess.test_parquet import documents_in

path = Path(sys.argv[1])
whole = path.read_bytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
told = 0
for at in range(footer, len(whole)):
    for value in (13, 255):
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1:])
        try:
            documents_in(path)
        except DataError:
            told += 1
print(told)
"""
"""Every byte of a footer is spoilt, in a process of its own."""


def test_no_byte_of_a_footer_ends_the_process(tmp_path: Path) -> None:
    """pyarrow may throw what Python cannot catch, such as for column statistics of a wrong length."""
    pq.write_table(pa.table({"text": pa.nulls(3), "more": ["a", None, "c"]}), tmp_path / "a.parquet")
    done = subprocess.run(
        [sys.executable, "-c", FOOTERS, tmp_path / "a.parquet"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and int(done.stdout) > 300, done.stderr


def test_the_units_of_a_file_add_up_to_the_size_of_its_texts(tmp_path: Path) -> None:
    texts = [f"text {i} " * (i % 50) for i in range(3000)]
    table = pa.table({"text": texts, "text.more": texts, "other": ["x" * 99] * 3000})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", row_group_size=700, use_dictionary=False)
    (file,) = find_inputs([tmp_path / "a.parquet"])
    units = list(read_units([file], ["text"], splits_texts=True, unit_bytes=10_000))
    content = sum(len(text) + 4 for text in texts)  # each has its length before it
    assert sum(unit.content_size for unit in units) == pytest.approx(content, rel=0.02)
    middle = read_units([file], ["text"], splits_texts=True, start=units[3].next, unit_bytes=10_000)
    resumed = sum(unit.content_size for unit in (*units[:4], *middle))
    assert resumed == pytest.approx(sum(unit.content_size for unit in units), rel=0.001)


def test_only_one_module_calls_pyarrow() -> None:
    package = Path(parquet.__file__).parents[1]
    users = [path.name for path in package.rglob("*.py") if "import pyarrow" in path.read_text(encoding="utf-8")]
    assert users == ["parquet.py"]
