import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
import zstandard

from megagap.errors import DataError
from megagap.preprocess.documents import read_texts
from megagap.preprocess.listing import find_inputs
from megagap.preprocess.units import Unit, read_units

Compress = Callable[[bytes], bytes]


def two_parts(compress: Compress) -> Compress:
    """As parallel compressors and ``cat`` create them."""
    return lambda data: compress(data[: len(data) // 3]) + compress(data[len(data) // 3 :])


def skippable_frame(data: bytes) -> bytes:
    """With a note of 100,000 bytes after the content."""
    return zstandard.compress(data) + b"\x50\x2a\x4d\x18" + (100_000).to_bytes(4, "little") + bytes(100_000)


FORMS: dict[str, Compress] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "gzip-parts": two_parts(gzip.compress),
    "gzip-padded": lambda data: gzip.compress(data) + bytes(512),
    "zstandard": zstandard.compress,
    "zstandard-parts": two_parts(zstandard.compress),
    "zstandard-note": skippable_frame,
}
COMPRESSED = {"gzip": gzip.compress, "zstandard": zstandard.ZstdCompressor(write_checksum=True).compress}


@pytest.fixture
def text() -> bytes:
    """JSON lines that do not compress to nothing."""
    return b"".join(json.dumps({"text": os.urandom(60).hex()}).encode() + b"\n" for _ in range(5000))


def units_of(*paths: Path, unit_bytes: int = 30_000, splits: bool = True) -> list[Unit]:
    return list(read_units(find_inputs(paths), ["text"], splits, unit_bytes=unit_bytes))


@pytest.mark.parametrize("form", FORMS)
def test_units_are_whole_lines_and_lose_nothing(tmp_path: Path, text: bytes, form: str) -> None:
    (tmp_path / "file").write_bytes(FORMS[form](text))
    units = units_of(tmp_path / "file")
    assert len(units) > 10
    assert b"".join(unit.data for unit in units) == text
    assert all(unit.data.endswith(b"\n") for unit in units[:-1])
    assert [unit.line for unit in units] == [1 + sum(u.data.count(b"\n") for u in units[:i]) for i in range(len(units))]


@pytest.mark.parametrize("form", FORMS)
def test_progress_and_checksum_count_the_bytes_of_the_file(tmp_path: Path, text: bytes, form: str) -> None:
    content = FORMS[form](text)
    (tmp_path / "file").write_bytes(content)
    units = units_of(tmp_path / "file", tmp_path / "file")
    assert sum(unit.size for unit in units) == 2 * len(content)
    assert [unit.file_checksum for unit in units if unit.file_checksum] == [xxhash.xxh3_64_hexdigest(content)] * 2


@pytest.mark.parametrize("form", FORMS)
def test_reading_resumes_at_any_mark(tmp_path: Path, text: bytes, form: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(FORMS[form](text))
    units = units_of(tmp_path / "one", tmp_path / "two")
    for i in range(0, len(units), 7):
        inputs = find_inputs([tmp_path / "one", tmp_path / "two"])
        rest = list(read_units(inputs, ["text"], True, units[i].next, 30_000))
        assert b"".join(unit.data for unit in rest) == b"".join(unit.data for unit in units[i + 1 :])
        assert [u.file_checksum for u in rest if u.file_checksum] == [
            u.file_checksum for u in units[i + 1 :] if u.file_checksum
        ]


@pytest.mark.parametrize("form", COMPRESSED)
def test_a_compressed_file_cut_anywhere_names_file_and_line(tmp_path: Path, text: bytes, form: str) -> None:
    whole = COMPRESSED[form](text)
    for length in (len(whole) - 1, len(whole) // 2, 300):
        (tmp_path / "cut").write_bytes(whole[:length])
        read = b""
        with pytest.raises(
            DataError, match=r"cut cannot be read beyond line [\d,]+: its compressed data ends"
        ) as error:
            for unit in read_units(find_inputs([tmp_path / "cut"]), ["text"], True, unit_bytes=100):
                read += unit.data
        named = int(re.search(r"beyond line ([\d,]+)", str(error.value))[1].replace(",", ""))  # type: ignore[index]
        assert 0 <= named - read.count(b"\n") <= 1
        assert named >= 5000 * length / len(whole) - 2500 and named <= 5000


@pytest.mark.parametrize("form", COMPRESSED)
def test_a_damaged_compressed_file_names_file_and_line(tmp_path: Path, text: bytes, form: str) -> None:
    damaged = bytearray(COMPRESSED[form](text))
    damaged[len(damaged) // 2] ^= 0x55
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged cannot be read beyond line [\d,]+: "):
        units_of(tmp_path / "damaged")


@pytest.mark.parametrize("form", COMPRESSED)
def test_what_follows_compressed_data_is_not_dropped_silently(tmp_path: Path, text: bytes, form: str) -> None:
    (tmp_path / "tail").write_bytes(COMPRESSED[form](text) + b'{"text": "more"}\n')
    with pytest.raises(DataError, match=r"tail cannot be read beyond line [\d,]+: "):
        units_of(tmp_path / "tail")


def test_a_file_made_with_the_longest_window_is_read(tmp_path: Path, text: bytes) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj(size=-1)
    (tmp_path / "long").write_bytes(compressor.compress(text) + compressor.flush())
    assert b"".join(unit.data for unit in units_of(tmp_path / "long")) == text


def test_frames_without_content_are_skipped(tmp_path: Path, text: bytes) -> None:
    """pzstd begins with one."""
    frame = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    (tmp_path / "frames").write_bytes(frame + zstandard.compress(text) + frame)
    assert b"".join(unit.data for unit in units_of(tmp_path / "frames")) == text


def test_empty_files_have_no_lines(tmp_path: Path) -> None:
    for name, content in (("plain", b""), ("gzip", gzip.compress(b"")), ("zstandard", zstandard.compress(b""))):
        (tmp_path / name).write_bytes(content)
        assert [unit.data for unit in units_of(tmp_path / name)] == [b""]


def test_compressed_json_lines_and_plain_text_are_distinguished_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "un"}\n{"text": "deux"}'))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"trois\nquatre"))
    texts = list(read_texts([tmp_path / "a.jsonl.gz", tmp_path / "b.txt.zst"], "text"))
    assert texts == ["un", "deux", "trois\nquatre"]
