import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megagap.data.jsonlines import read_chunks, read_texts
from megagap.errors import DataError

Compress = Callable[[bytes], bytes]


def two_parts(compress: Compress) -> Compress:
    """As parallel compressors and ``cat`` make them."""
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


@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_whole_lines_and_lose_nothing(tmp_path: Path, text: bytes, form: str) -> None:
    (tmp_path / "file").write_bytes(FORMS[form](text))
    chunks = list(read_chunks([tmp_path / "file"], 30_000))
    assert len(chunks) > 10
    assert b"".join(line for chunk in chunks for line in chunk.lines) == text
    first_lines = [chunk.first_line for chunk in chunks]
    assert first_lines == [1 + sum(len(c.lines) for c in chunks[:i]) for i in range(len(chunks))]


@pytest.mark.parametrize("form", FORMS)
def test_progress_counts_the_bytes_of_the_file(tmp_path: Path, text: bytes, form: str) -> None:
    (tmp_path / "file").write_bytes(FORMS[form](text))
    sizes = [chunk.size for chunk in read_chunks([tmp_path / "file"], 1)]
    assert sum(sizes) == (tmp_path / "file").stat().st_size
    assert max(sizes) < sum(sizes) / 2


@pytest.mark.parametrize("form", COMPRESSED)
def test_a_compressed_file_cut_anywhere_names_file_and_line(tmp_path: Path, text: bytes, form: str) -> None:
    whole = COMPRESSED[form](text)
    for length in (len(whole) - 1, len(whole) // 2, 30):
        (tmp_path / "cut").write_bytes(whole[:length])
        read = 0
        with pytest.raises(
            DataError, match=r"cut cannot be read beyond line [\d,]+: its compressed data ends"
        ) as error:
            for chunk in read_chunks([tmp_path / "cut"], 1):
                read += len(chunk.lines)
        assert f"beyond line {read:,}:" in str(error.value)
        assert read >= 5000 * length / len(whole) - 2500 and read <= 5000


@pytest.mark.parametrize("form", COMPRESSED)
def test_a_damaged_compressed_file_names_file_and_line(tmp_path: Path, text: bytes, form: str) -> None:
    damaged = bytearray(COMPRESSED[form](text))
    damaged[len(damaged) // 2] ^= 0x55
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged cannot be read beyond line [\d,]+: "):
        list(read_chunks([tmp_path / "damaged"]))


@pytest.mark.parametrize("form", COMPRESSED)
def test_what_follows_compressed_data_is_not_dropped_in_silence(tmp_path: Path, text: bytes, form: str) -> None:
    (tmp_path / "tail").write_bytes(COMPRESSED[form](text) + b'{"text": "more"}\n')
    with pytest.raises(DataError, match=r"tail cannot be read beyond line [\d,]+: "):
        list(read_chunks([tmp_path / "tail"]))


def test_a_file_made_with_the_longest_window_is_read(tmp_path: Path, text: bytes) -> None:
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj(size=-1)
    (tmp_path / "long").write_bytes(compressor.compress(text) + compressor.flush())
    assert sum(len(chunk.lines) for chunk in read_chunks([tmp_path / "long"])) == 5000


def test_empty_files_hold_no_lines(tmp_path: Path) -> None:
    for name, content in (("plain", b""), ("gzip", gzip.compress(b"")), ("zstandard", zstandard.compress(b""))):
        (tmp_path / name).write_bytes(content)
        assert [chunk.lines for chunk in read_chunks([tmp_path / name]) if chunk.lines] == []


def test_texts_of_compressed_json_lines_and_plain_text_are_told_apart_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "un"}\n{"text": "deux"}'))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"trois\nquatre"))
    texts = list(read_texts([tmp_path / "a.jsonl.gz", tmp_path / "b.txt.zst"], "text"))
    assert texts == ["un", "deux", "trois\nquatre"]
