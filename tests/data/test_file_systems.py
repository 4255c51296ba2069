"""What the system refuses is reported at the start if possible, else names the file; nothing half-written is left."""

import builtins
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.partial import CannotWriteError, lock_pair
from megagap.data.sources import TokenSource
from megagap.errors import DataError
from megagap.preprocess import arrange, preprocess
from megagap.preprocess import inputs as inputs_module
from megagap.preprocess import job as job_module
from megagap.preprocess.merge import merge_datasets
from megagap.timeline import Source
from tests.launching import SECONDS
from tests.warm_start import python

TOOLS = Path(__file__).parents[2] / "tools"

FINISHED = "finished already, by an earlier run from the same inputs: nothing was done"


def refused(code: int) -> Callable[..., Any]:
    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    return refuse


@pytest.fixture
def finished(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """The arguments of a run that has finished."""
    (tmp_path / "out").mkdir()
    arguments = dict(inputs=[corpus], output_prefix=str(tmp_path / "out/o"), tokenizer=str(tokenizer_folder))
    preprocess(**arguments)  # type: ignore[arg-type]
    return arguments


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EPERM])
@pytest.mark.parametrize("leftovers", [False, True])
def test_resuming_a_finished_run_writes_nothing(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, leftovers: bool
) -> None:
    if leftovers:
        (tmp_path / "out/o_text_document.partial.tokens").write_bytes(b"x")
    opened = builtins.open

    def open_read_only(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        return opened(path, mode, *given, **named) if mode in ("r", "rb") else refused(code)(path)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_read_only)
        for name in ("unlink", "replace", "mkdir"):
            patch.setattr(os, name, refused(code))
        assert preprocess(**finished, resume=True).notes == (FINISHED,)
        with pytest.raises(CannotWriteError, match=rf"cannot write .*/out/o_text_document.lock: {os.strerror(code)}"):
            preprocess(**finished)
        with pytest.raises(CannotWriteError):
            preprocess(**finished | {"append_eod": True}, resume=True)


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json", ".origins"])
def test_an_impossible_final_rename_is_reported_before_any_work(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    (tmp_path / f"o_text_document{ending}").mkdir()
    monkeypatch.setattr(job_module, "read_units", None)
    with pytest.raises(CannotWriteError, match=rf"cannot write .*o_text_document\{ending}: Is a folder"):
        preprocess([corpus], str(tmp_path / "o"), str(tokenizer_folder))
    assert sorted(path.name for path in tmp_path.glob("o_*")) == [f"o_text_document{ending}"]


def test_a_folder_in_which_nothing_can_be_renamed_is_reported_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", refused(errno.EPERM))
    with pytest.raises(CannotWriteError, match=r"Operation not permitted\n  .*choose another location"):
        lock_pair(str(tmp_path / "o"))
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_for_what_will_be_written_is_reported_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(CannotWriteError, match="File name too long\n  choose a shorter name"):
        lock_pair(str(tmp_path / ("x" * 240)))
    assert not list(tmp_path.iterdir())


def test_an_immutable_file_under_a_final_name_is_reported_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o.bin").write_bytes(b"")
    opened = os.open
    immutable = refused(errno.EPERM)  # as after chattr +i
    monkeypatch.setattr(
        os, "open", lambda path, *given: (immutable if str(path)[-4:] == ".bin" else opened)(path, *given)
    )
    with pytest.raises(CannotWriteError, match=r"cannot write .*o\.bin: Operation not permitted"):
        lock_pair(str(tmp_path / "o"))


def test_another_users_file_in_a_sticky_folder_is_reported_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o.bin").write_bytes(b"")
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(CannotWriteError, match=r"o\.bin: Belongs to another user"):
        lock_pair(str(tmp_path / "o"))


def run_limited(tool: str, *arguments: object, **limits: int) -> subprocess.CompletedProcess[str]:
    """A tool run with a limit on the size of files, or on the number of open ones."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    command = [python(), str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, preexec_fn=limit)


@pytest.mark.parametrize(
    ("bytes_allowed", "second_pass"),
    [(0, ()), (3000, ()), (13_000, ()), *((n, ("--dedup", "exact", "--shuffle-documents", 1)) for n in (300, 6000))],
)
def test_a_full_disk_at_any_stage_ends_in_a_message_and_leaves_no_final_name(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, bytes_allowed: int, second_pass: tuple[object, ...]
) -> None:
    """A limit on file size looks like a full disk: for the lock, the journal, tokens, checksums and buckets."""
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "o", "--tokenizer", tokenizer_folder, *second_pass]
    arguments += ["--workers", 1, "--resume", "--append-eod"]
    full = run_limited("preprocess_data.py", *arguments, RLIMIT_FSIZE=bytes_allowed)
    assert full.returncode == 2 and "data error: cannot write" in full.stderr and "Traceback" not in full.stderr
    assert not [path for path in tmp_path.glob("o_*") if path.suffix in (".bin", ".idx", ".json", ".lock")]
    done = run_limited("preprocess_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    IndexedDataset(tmp_path / "o_text_document").verify()


@pytest.mark.parametrize("tool", ["preprocess_data.py", "inspect_data.py", "merge_datasets.py"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_standard_output_that_cannot_be_written_is_reported(
    finished: dict[str, Any], tmp_path: Path, tool: str
) -> None:
    pair = f"{finished['output_prefix']}_text_document"
    arguments = {
        "preprocess_data.py": ["--input", *finished["inputs"], "--output-prefix", tmp_path / "new/o"],
        "inspect_data.py": [pair],
        "merge_datasets.py": ["--input", pair, "--output-prefix", tmp_path / "merged"],
    }[tool]
    arguments += ["--tokenizer", finished["tokenizer"]] if tool == "preprocess_data.py" else []
    with open("/dev/full", "w") as full:
        command = [python(), str(TOOLS / tool), *map(str, arguments)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=SECONDS)
    assert done.returncode == 2 and "cannot write to standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    prefixes = [str(tmp_path / f"shard-{i:03}") for i in range(50)]
    for i, prefix in enumerate(prefixes):
        with IndexedDatasetWriter(prefix, "uint16") as writer:
            writer.add_document([i] * 10)
    return prefixes


def test_merging_opens_one_pair_at_a_time(shards: list[str], tmp_path: Path) -> None:
    options = ("--output-prefix", tmp_path / "merged", "--shuffle-documents", 1, "--dedup", "exact")
    done = run_limited("merge_datasets.py", "--input", *shards, *options, RLIMIT_NOFILE=24)
    assert done.returncode == 0, done.stderr
    assert IndexedDataset(tmp_path / "merged").document_count == 50


def test_shuffling_opens_no_more_buckets_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        for i in range(500):
            writer.add_document([i] * 5)
    monkeypatch.setattr(arrange, "BUCKET_BYTES", 10)
    many = merge_datasets([str(tmp_path / "a")], str(tmp_path / "many"), shuffle_documents=1)
    monkeypatch.setattr(arrange, "_openable", lambda: 7)
    few = merge_datasets([str(tmp_path / "a")], str(tmp_path / "few"), shuffle_documents=1)
    assert Path(many.tokens_path).read_bytes() == Path(few.tokens_path).read_bytes()


PROGRAM = """
import resource, sys
from megagap.data.sources import TokenSource
from megagap.timeline import Source
from megagap.errors import run_tool
resource.setrlimit(resource.RLIMIT_NOFILE, (24, int(sys.argv[1])))
run_tool(lambda: print(TokenSource(Source("x", tuple(sys.argv[2:])), "100,0,0", 0).token_count))
"""


def test_shards_are_opened_beyond_the_soft_limit_and_the_hard_one_is_reported(shards: list[str]) -> None:
    def run(hard: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(hard), *shards]
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)

    assert run(500).stdout == "500\n"
    done = run(24)
    assert (
        done.returncode == 2
        and "Too many open files\n  this process has reached its limit of open files: raise it with ulimit -n"
        in done.stderr
    )


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_input_that_the_system_cannot_read_is_named_not_the_output(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: int
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "word " * 200_000 + '"}\n')
    left = [calls]
    readinto = inputs_module._Summing.readinto

    def fail(self: Any, buffer: Any) -> int:
        left[0] -= 1
        return readinto(self, buffer) if left[0] >= 0 else refused(code)(None)

    monkeypatch.setattr(inputs_module._Summing, "readinto", fail)
    with pytest.raises(DataError, match=rf"cannot read .*a\.jsonl: {os.strerror(code)}"):
        preprocess([tmp_path / "a.jsonl"], str(tmp_path / "o"), str(tokenizer_folder))


def test_an_input_that_vanishes_is_named(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    for i in ("a", "b"):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "one"}\n')
    load = job_module.choose_encoder
    monkeypatch.setattr(job_module, "choose_encoder", lambda *given: (path.unlink(), load(*given))[1])
    with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: No such file"):
        preprocess([tmp_path], str(tmp_path / "o"), str(tokenizer_folder))


def test_a_source_cannot_have_a_shard_twice_under_two_names(shards: list[str], tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"link{ending}").symlink_to(shards[0] + ending)
    for other in (shards[0] + ".bin", str(tmp_path / "link"), f"{tmp_path}/./shard-000"):
        with pytest.raises(DataError, match=r"source x lists .* 2 times"):
            TokenSource(Source("x", (shards[0], other)), "100,0,0", 0)


def test_leftovers_of_another_user_are_reported_at_the_start(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o_text_document.partial.tokens").write_bytes(b"x")
    unlink = os.unlink

    def refuse(path: Any, **named: Any) -> None:
        (refused(errno.EPERM) if str(path).endswith("partial.tokens") else unlink)(path, **named)

    monkeypatch.setattr(os, "unlink", refuse)
    for use in (
        lambda: preprocess([corpus], str(tmp_path / "o"), str(tokenizer_folder)),
        lambda: IndexedDatasetWriter(tmp_path / "o_text_document", "uint16"),
    ):
        with pytest.raises(CannotWriteError, match=r"partial\.tokens: Operation not permitted\n.*another location"):
            use()
        assert not (tmp_path / "o_text_document.lock").exists()


def test_a_folder_that_turns_read_only_at_the_end_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = lock_pair(str(tmp_path / "o"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused(errno.EROFS))
        lock.release()
    lock_pair(str(tmp_path / "o")).release()


def test_a_file_system_that_cannot_sync_folders_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def sync_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    with IndexedDatasetWriter(tmp_path / "a", "uint16") as writer:
        writer.add_document([1])
    assert IndexedDataset(tmp_path / "a").token_count == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_input_that_is_written_while_it_is_read_is_refused_even_if_its_size_stays(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 1000)
    choose = job_module.choose_encoder

    def touch(*given: Any) -> Any:
        os.utime(path, ns=(1, 1))
        return choose(*given)

    def write(*given: Any) -> Any:
        monkeypatch.setattr(job_module, "read_units", written_between)
        return choose(*given)

    read_units = job_module.read_units

    def written_between(*given: Any) -> Any:
        units = read_units(*given, unit_bytes=1000)
        yield next(units)
        path.write_text('{"text": "two"}\n' * 1000)
        os.utime(path, ns=(2, 2))
        yield from units

    arguments = ([path], str(tmp_path / "o"), str(tokenizer_folder))
    monkeypatch.setattr(job_module, "choose_encoder", touch)
    assert preprocess(*arguments).pairs[0].documents == 1000
    monkeypatch.setattr(job_module, "choose_encoder", write)
    with pytest.raises(DataError, match=r"a\.jsonl was written while it was read"):
        preprocess(*arguments, workers=workers)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: preprocess(["-"], "o", "t"), "give /dev/stdin"),
        (lambda: preprocess([""], "o", "t"), "cannot read '': No such file"),
        (lambda: IndexedDatasetWriter("", "uint16"), "the prefix '' does not end in a file name"),
        (lambda: IndexedDatasetWriter("folder/", "uint16"), "the prefix 'folder/' does not end in a file name"),
    ],
)
def test_names_without_a_file_are_reported(use: Callable[[], Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        use()
