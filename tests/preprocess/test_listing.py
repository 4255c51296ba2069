"""Every file among the inputs is read, refused, or listed with the reason in the notes and the manifest."""

import bz2
import gzip
import io
import json
import os
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megagap.data.manifest import read_manifest
from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.preprocess.listing import Listing, find_inputs, list_inputs

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"]}), sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": ["one"]})
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With one file that is read in any case."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(LINES)
    return tmp_path / "in"


def names(listing: Listing) -> list[str]:
    return [os.path.basename(file.path) for file in listing.inputs]


def unread(listing: Listing, folder: Path) -> dict[str, str]:
    return {file.path.removeprefix(f"{folder}/"): file.reason for file in listing.unread}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("part-00000", LINES),
        ("F.JSONL", LINES),
        ("e.jsonlines", LINES),
        ("n.ndjson", LINES),
        ("x.json", LINES),
        ("dump.txt.1", LINES),
        ("blank-first", b"\n\n" + LINES),
        ("mark", b"\xef\xbb\xbf" + LINES),
        ("part-1.gz", gzip.compress(LINES, mtime=0)),
        ("z.ZSTD", zstandard.compress(LINES)),
        ("P.GZIP", gzip.compress(LINES, mtime=0)),
        ("table", parquet()),
        ("T.PARQUET", parquet()),
        ("Prose.TXT", b"Some prose."),
        ("long-line", json.dumps({"id": "x" * 100_000, "text": "one"}).encode()),
    ],
)
def test_a_file_of_text_in_a_folder_is_read_whatever_its_name(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    listing = list_inputs([folder])
    assert sorted(names(listing)) == sorted(["a.jsonl", name]) and not listing.unread


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.jsonl.bz2", bz2.compress(LINES), "is compressed with bzip2"),
        ("d.xz", b"\xfd7zXZ\x00rest", "is compressed with xz"),
        ("d.zip", b"PK\x03\x04rest", "is compressed with zip"),
        ("d.7z", b"7z\xbc\xaf'\x1c", "is compressed with 7-Zip"),
        ("d.tar", tar(), "is a tar archive"),
        ("d.tar.gz", gzip.compress(tar(), mtime=0), "is a tar archive"),
        ("d.arrow", arrow(), "is an Arrow file"),
        ("d.pdf", b"%PDF-1.7\n", "is a PDF"),
        ("d.db", b"SQLite format 3\x00", "is an SQLite database"),
        ("d.warc.gz", gzip.compress(b"WARC/1.0\r\n", mtime=0), "is a web archive"),
        ("d.npy", b"\x93NUMPY\x01", "is a numpy array"),
        ("utf16", LINES.decode().encode("utf-16"), "is in UTF-16"),
        ("utf16-without-mark", LINES.decode().encode("utf-16-le"), "is binary or in UTF-16"),
        ("README.md", b"# About\n\ntext\n", "is not JSON lines: it starts with '# About'"),
        ("data.csv", b"text,id\none,1\n", "looks like CSV"),
        ("data.tsv.gz", gzip.compress(b"text\tid\none\t1\n", mtime=0), "looks like CSV"),
        ("index.html", b"<!doctype html>\n<p>", "is HTML or XML"),
        ("array.json", b'[{"text": "one"}]', "is a JSON array"),
        ("pretty.json", b'{\n  "text": "one"\n}\n', "is JSON spread over several lines"),
        ("dataset_info.json", b'{"builder_name": "json"}', "its first line has no key 'text'"),
        ("tokenizer.json", b'{"version": "1.0", "x": "' + b"y" * 200_000 + b'"}', "its first line has no key 'text'"),
        ("cut.gz", gzip.compress(LINES, mtime=0)[:5], "cannot be read beyond line 0"),
        ("blank", b"\n \n", "it has only blank lines"),
        ("empty", b"", "empty"),
        (".hidden.jsonl", LINES, "hidden"),
        ("_part.jsonl", LINES, "hidden"),
        ("x.partial.journal", LINES, "an unfinished file"),
        ("x.jsonl.partial-123", LINES, "an unfinished file"),
        ("_temporary/x.jsonl", LINES, "hidden"),
    ],
)
def test_a_file_in_a_folder_that_is_not_read_is_listed_with_the_reason(
    folder: Path, tokenizer_folder: Path, name: str, content: bytes, reason: str
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    summary = preprocess([folder], str(folder.parent / "out"), str(tokenizer_folder))
    top = name.partition("/")[0]
    assert "1 file is not read" in summary.notes[0] and top in summary.notes[0] and reason in summary.notes[0]
    manifest = read_manifest(summary.pairs[0].prefix)
    assert manifest and len(manifest.inputs) == 1
    (record,) = manifest.unread
    assert record.path.startswith(str(folder / top)) and reason in record.reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'[{"text": "one"}]', "is a JSON array"),
        ("b.jsonl", bz2.compress(LINES), "is compressed with bzip2"),
        ("b.jsonl.gz", gzip.compress(b"<html>", mtime=0), "is HTML or XML"),
        ("b.parquet", b"not at all", "is not what its name says"),
        ("b.txt", b"a\0b\0c\0d\0", "is binary or in UTF-16"),
    ],
)
def test_a_file_named_like_text_in_another_format_is_refused(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    for given in (folder, f"{folder}/*", folder / name):
        with pytest.raises(DataError, match=message):
            find_inputs([given])


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # as a socket's path must be short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "fifo": (make_fifo, "not a regular file"),
    "socket": (make_socket, "not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "broken": (lambda path: path.symlink_to("nowhere"), "a link to nowhere: No such file or directory"),
    "itself": (lambda path: path.symlink_to(path.name), "a link to itself: Too many levels of symbolic links"),
    "parent": (lambda path: path.symlink_to(".."), ""),
    "here": (lambda path: path.symlink_to("."), "the same folder as"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("given", ["folder", "pattern", "deep pattern"])
def test_what_is_not_a_file_is_listed_and_never_waited_for(folder: Path, kind: str, given: str) -> None:
    make, reason = SPECIAL[kind]
    make(folder / kind)
    listing = list_inputs([{"folder": folder, "pattern": f"{folder}/*", "deep pattern": f"{folder}/**/*"}[given]])
    assert names(listing) == ["a.jsonl"]
    assert any(kind in path and reason in why for path, why in unread(listing, folder).items())


def test_links_are_followed_and_each_file_is_read_once(folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    (other / "b.jsonl").write_bytes(LINES)
    (folder / "linked").symlink_to(other)
    (folder / "soft.jsonl").symlink_to("a.jsonl")
    os.link(folder / "a.jsonl", folder / "hard.jsonl")
    (folder / "again").symlink_to("linked")
    for given in (folder, f"{folder}/**", f"{folder}/**/*.jsonl"):
        listing = list_inputs([given])
        assert names(listing) == ["a.jsonl", "b.jsonl"]
        reasons = unread(listing, folder)
        assert reasons["soft.jsonl"] == reasons["hard.jsonl"] == f"the same file as {folder}/a.jsonl"
        assert f"the same folder as {folder}/again" in reasons["linked/"]


def test_a_file_with_several_names_is_read_once_and_reported(folder: Path) -> None:
    listing = list_inputs([folder, f"{folder}/*.jsonl", folder / "a.jsonl"])
    assert names(listing) == ["a.jsonl"]
    assert listing.notes == [f"1 file is read once, though named more than once: {folder}/a.jsonl"]


def test_a_file_that_was_named_twice_is_read_twice_and_reported(folder: Path) -> None:
    (folder / "soft.jsonl").symlink_to("a.jsonl")
    listing = list_inputs([folder / "a.jsonl", folder / "a.jsonl", folder / "soft.jsonl"])
    assert names(listing) == ["a.jsonl", "a.jsonl", "soft.jsonl"]
    assert "2 files are read again because named more than once" in listing.notes[0]


def test_copies_of_a_file_are_reported(folder: Path, tokenizer_folder: Path) -> None:
    shutil.copy(folder / "a.jsonl", folder / "b.jsonl")
    summary = preprocess([folder], str(folder.parent / "out"), str(tokenizer_folder))
    assert summary.pairs[0].documents == 4
    assert f"{folder}/b.jsonl (as {folder}/a.jsonl)" in summary.notes[0]


def test_empty_files_are_reported(folder: Path) -> None:
    (folder / "b.jsonl").write_bytes(b"")
    (folder / "c.txt").write_bytes(b"")
    assert list_inputs([folder]).notes == [f"2 files are empty: {folder}/b.jsonl, {folder}/c.txt"]


def test_hidden_files_that_patterns_leave_out_are_reported(folder: Path) -> None:
    for name in (".b.jsonl", ".c/d.jsonl", ".notes"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(LINES)
    assert set(unread(list_inputs([f"{folder}/*.jsonl"]), folder)) == {".b.jsonl"}
    assert set(unread(list_inputs([f"{folder}/**/*.jsonl"]), folder)) == {".b.jsonl", ".c/"}
    assert names(list_inputs([f"{folder}/.*.jsonl"])) == [".b.jsonl"]


def test_a_folder_that_a_pattern_matches_is_read(folder: Path) -> None:
    (folder / "sub/deep").mkdir(parents=True)
    (folder / "sub/deep/b.jsonl").write_bytes(LINES)
    assert names(list_inputs([f"{folder}/s*"])) == ["b.jsonl"]
    assert names(list_inputs([f"{folder}/*/deep"])) == ["b.jsonl"]


def test_patterns_match_what_globs_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glob import glob

    for name in ("b.jsonl", "x/c.jsonl", "x/y/d.jsonl", "x/y/e1.txt", "x/y/e[2].txt", "z.w/f.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() if name.endswith("txt") else LINES + name.encode())
    monkeypatch.chdir(folder)
    for pattern in (
        "*.jsonl", "**/*.jsonl", "x/**/*.jsonl", "*/*.jsonl", "**/y/*", "x/?/[cd]*", "./x/*/d.jsonl", "**/e[[]2].txt",
        f"{folder}/**/*.txt", "x/../*.jsonl", "**/x/**/e?.*",
    ):  # fmt: skip
        expected = sorted(os.path.normpath(path) for path in glob(pattern, recursive=True) if os.path.isfile(path))
        assert sorted(os.path.normpath(file.path) for file in find_inputs([pattern])) == expected, pattern


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_refused_by_name(folder: Path) -> None:
    (folder / "secret").mkdir(mode=0)
    try:
        for given in (folder, f"{folder}/**/*.jsonl"):
            with pytest.raises(DataError, match=r"cannot read the folder .*secret: Permission denied"):
                find_inputs([given])
    finally:
        (folder / "secret").chmod(0o700)


def test_a_folder_that_the_system_refuses_to_list_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = os.listdir

    def refuse(path: str) -> list[str]:
        if os.path.basename(path) in ("secret", "lost+found"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "listdir", refuse)
    (folder / "lost+found").mkdir()
    assert unread(list_inputs([folder]), folder) == {"lost+found/": "Permission denied"}
    (folder / "secret").mkdir()
    for given in (folder, f"{folder}/**/*.jsonl"):
        with pytest.raises(DataError, match=r"cannot read the folder .*secret: Permission denied"):
            find_inputs([given])


def test_the_same_command_works_again_with_its_output_among_the_inputs(folder: Path, tokenizer_folder: Path) -> None:
    before = [file.name for file in folder.iterdir()]
    for given in ([folder], [f"{folder}/*"], None):
        for resume in (False, True, False):
            names = given or sorted(folder.iterdir())  # as a shell expands them
            summary = preprocess(names, str(folder / "o"), str(tokenizer_folder), resume=resume)
            assert summary.pairs[0].documents == 2
            assert ("finished already" in "".join(summary.notes)) == resume
            manifest = read_manifest(folder / "o_text_document")
            assert manifest and not manifest.unread and [Path(i.path).name for i in manifest.inputs] == before


def test_other_pairs_and_a_tokenizer_in_the_folder_are_not_text(folder: Path, tokenizer_folder: Path) -> None:
    preprocess([folder], str(folder / "other"), str(tokenizer_folder))
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    summary = preprocess([folder], str(folder / "o"), str(tokenizer_folder))
    assert summary.pairs[0].documents == 2
    assert all(f"other_text_document{ending}" in summary.notes[0] for ending in (".bin", ".idx", ".json"))
    assert "tokenizer/tokenizer.json" in summary.notes[0]
    assert "is the manifest of a token file" in summary.notes[0]


def test_the_message_for_a_folder_without_text_says_what_it_contains(tokenizer_folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"contains no file to read\n(.|\n)*tokenizer\.json: is JSON spread over several lines"
    ):
        find_inputs([tokenizer_folder])


def test_merged_shards_have_the_unread_files_of_the_whole(folder: Path, tokenizer_folder: Path) -> None:
    from megagap.preprocess.merge import merge_datasets

    (folder / "README").write_text("hello")
    out = str(folder.parent / "out")
    parts = [preprocess([folder], out, str(tokenizer_folder), part=(i, 2)).pairs[0].prefix for i in range(2)]
    manifest = read_manifest(merge_datasets(parts, out).prefix)
    assert manifest and [Path(record.path).name for record in manifest.unread] == ["README"]
