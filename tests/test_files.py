"""Files appear under their name when whole, and what the system refuses is said in one message."""

from pathlib import Path

import pytest

from megagap.errors import DataError
from megagap.files import make_folder, write_bytes, write_text, writing


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
