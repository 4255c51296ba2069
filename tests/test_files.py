"""Files appear under their name when whole, and what the system refuses is said in one message."""

import errno
import os
import stat
from pathlib import Path

import pytest

from megagap.errors import CheckpointError, DataError
from megagap.files import Lock, make_folder, reading, write_bytes, write_text, writing, written_by_library


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "é\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=rf"cannot write {tmp_path}/a: No space left"), writing(tmp_path / "a"):
        write_bytes(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == "é\n".encode()


def test_the_folder_of_a_file_is_made_or_named(tmp_path: Path) -> None:
    with writing(tmp_path / "x" / "y" / "a"):
        write_text(tmp_path / "x" / "y" / "a", "")
    for make in (make_folder, lambda folder: writing(folder / "b").__enter__()):
        with pytest.raises(DataError, match=f"cannot make the folder {tmp_path}/x/y/a"):
            make(tmp_path / "x" / "y" / "a")


def test_a_file_written_by_a_library_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with written_by_library(tmp_path / "a") as partial:
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device")])
def test_a_library_that_cannot_write_leaves_what_was_there_and_names_the_file(tmp_path, error):
    write_text(tmp_path / "a", "old")
    with (
        pytest.raises(DataError, match=rf"cannot write {tmp_path}/a: No space left"),
        written_by_library(tmp_path / "a") as partial,
    ):
        partial.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "cannot read .*absent: No such file or directory"),
        (".", None, "cannot read .*: Is a directory"),
        ("a", b"ok \xff", r"cannot read .*a: it is not valid UTF-8 \(invalid start byte at byte 3\)"),
        ("a\0b", None, r"cannot read '.*a\\x00b': embedded null byte"),
        ("x" * 300, None, "File name too long"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message), reading(tmp_path / name, CheckpointError):
        (tmp_path / name).read_text(encoding="utf-8")


def test_a_missing_file_can_be_answered_within(tmp_path):
    with reading(tmp_path / "absent"):
        try:
            (tmp_path / "absent").read_bytes()
        except FileNotFoundError:
            return
    raise AssertionError


def test_a_lock_that_cannot_name_its_holder_leaves_no_file(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("socket.gethostname", full)  # called between opening and writing
    with pytest.raises(OSError, match="No space left"):
        Lock(tmp_path / "lock")
    assert not list(tmp_path.iterdir())
