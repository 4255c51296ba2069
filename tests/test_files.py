"""Files appear under their name when whole, and what the system refuses is said in one message."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megagap.checkpoint.huggingface_import import read_model_folder
from megagap.data.indexed import IndexedDataset
from megagap.errors import CheckpointError, DataError, MegagapError
from megagap.files import (
    LineFile,
    Lock,
    LockedError,
    make_folder,
    reading,
    require_writable,
    require_writable_folder,
    sources_digest,
    write_bytes,
    write_text,
    writing,
    written_by_library,
)
from megagap.preprocess.documents import read_texts
from megagap.tokenizer import load_tokenizer


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
        with pytest.raises(DataError, match=f"cannot create the folder {tmp_path}/x/y/a"):
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


REFUSALS = ["ENOSYS", "EOPNOTSUPP", "ENOLCK", "EPERM", "EACCES", "EINVAL", "EIO"]


@pytest.mark.parametrize("code", REFUSALS)
def test_where_the_file_system_cannot_lock_it_is_said_and_work_goes_on(tmp_path, monkeypatch, caplog, code):
    def flock(file, operation):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr("fcntl.flock", flock)
    lock = Lock(tmp_path / "lock")
    assert "cannot lock files" in caplog.text and f"{tmp_path}/lock" in caplog.text
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_a_lock_that_is_held_names_its_holder_and_can_be_waited_for(tmp_path):
    program = "import sys; from megagap.files import Lock; lock = Lock(sys.argv[1]); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    for wait in (0.0, 0.3):
        with pytest.raises(LockedError, match=f"process {holder.pid} on"):
            Lock(tmp_path / "lock", wait)
    holder.communicate(b"\n")
    Lock(tmp_path / "lock", wait=60).release()


def test_lines_are_seen_at_once_and_an_unfinished_one_swallows_none(tmp_path):
    (tmp_path / "a").write_text('{"x"')
    lines = LineFile(tmp_path / "a")
    lines.append("é")
    assert (tmp_path / "a").read_text() == '{"x"\né\n'
    lines.append("\udcff")  # a file name that is no UTF-8
    lines.sync()
    lines.close()
    assert (tmp_path / "a").read_bytes().splitlines()[2] == b"\\udcff"


def test_a_line_that_the_disk_has_no_room_for_is_taken_back(tmp_path):
    """Of which a part was written before the file reached the largest size that is allowed."""
    program = (
        "import resource, sys; from megagap.files import LineFile; file = LineFile(sys.argv[1]);"
        "file.append('x' * 60); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); file.append('y' * 60)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a"], capture_output=True, text=True)
    assert f"cannot write {tmp_path}/a: File too large" in done.stderr
    assert (tmp_path / "a").read_text() == "x" * 60 + "\n"


def no_folder(path):
    path.parent.parent.mkdir()
    path.parent.touch()


def dangling(path):
    path.parent.mkdir(parents=True)
    path.symlink_to("/nowhere-at-all/x")


def circle(path):
    path.parent.mkdir(parents=True)
    path.symlink_to(path)


def folder(path):
    path.mkdir(parents=True)


def pipe(path):
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (folder, "there is a folder where a file is needed"),
        (dangling, "it is a link to /nowhere-at-all/x, which does not exist"),
        (circle, "symbolic links"),
        (no_folder, "there is a file where a folder is needed"),
        (pipe, "No such device"),
    ],
)
def test_what_cannot_be_written_later_is_found_before(tmp_path, damage, reason):
    path = tmp_path / "a" / "b" / "file"
    damage(path)
    with pytest.raises(DataError) as error:
        require_writable(path)
    assert reason in str(error.value) and str(tmp_path / "a" / "b") in str(error.value)


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "there").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link", "new", "new_folder/new"):
        require_writable(tmp_path / name)
    require_writable_folder(tmp_path / "new_folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "new_folder", "there"]
    assert (tmp_path / "there").read_text() == "x"


@pytest.mark.parametrize(
    "code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "EMFILE", "EIO", "ESTALE"]
)
def test_what_the_system_refuses_is_said_with_what_to_do(tmp_path, code):
    number = getattr(errno, code)
    with pytest.raises(DataError) as error, writing(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    first, cure = str(error.value).splitlines()
    assert first == f"data error: cannot write {tmp_path}/a: {os.strerror(number)}"
    assert len(cure) > 10


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.txt", lambda path: list(read_texts([path], "text"))),
        ("a.jsonl", lambda path: list(read_texts([path], "text"))),
        ("a.jsonl.gz", lambda path: list(read_texts([path], "text"))),
        ("a.parquet", lambda path: list(read_texts([path], "text"))),
        ("a_text_document.idx", IndexedDataset),
        ("a_text_document.bin", IndexedDataset),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer.model", load_tokenizer),
        ("model.safetensors", lambda path: read_model_folder(path.parent)),
        ("model.safetensors.index.json", lambda path: read_model_folder(path.parent)),
        ("config.json", lambda path: read_model_folder(path.parent)),
    ],
)
def test_a_file_that_git_lfs_has_not_fetched_is_told(tmp_path, name, read):
    for beside in ("a_text_document.idx", "a_text_document.bin"):
        (tmp_path / beside).write_bytes(bytes(200))
    config = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "num_attention_heads": 1}))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(MegagapError, match=rf"{name} is a Git LFS pointer(.|\n)*git lfs pull"):
        read(tmp_path / name)


def test_a_changed_source_file_is_another_version(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = sources_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert sources_digest(tmp_path) != before
