"""A run that was killed is resumed to the same bytes, or refused with a reason."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megagap.data.manifest import read_manifest
from megagap.data.origins import Origins, UnknownOriginsError
from megagap.data.partial import lock_pair
from megagap.errors import DataError
from megagap.preprocess import job, preprocess
from megagap.preprocess.listing import find_inputs
from megagap.preprocess.units import Unit, read_units
from tests.launching import SECONDS
from tests.warm_start import python

# Writes a journal entry after each unit, cuts inputs into small ones, and kills itself at the n-th call of those that
# make something durable or visible, so also between two of them.
PROGRAM = """
import json, os, signal, sys
from functools import partial
from megagap.data import partial as pairs
from megagap.preprocess import arrange, job, preprocess, units
from megagap.errors import run_tool

left = int(sys.argv[1])

def or_die(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

if __name__ == "__main__":
    job.JOURNAL_SECONDS = 0
    job.read_units = partial(units.read_units, unit_bytes=400)
    arrange.BUCKET_BYTES = 2000
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, or_die(getattr(os, name)))
    pairs.PartialPair.add_tokens = or_die(pairs.PartialPair.add_tokens)
    pairs.PartialPair.add_documents = or_die(pairs.PartialPair.add_documents)
    arguments = json.loads(sys.argv[2])
    run_tool(lambda: print(preprocess(**arguments)))
    print("calls:", -left)
"""
ENDINGS = (".bin", ".idx", ".json", ".origins")


def start(folder: Path, calls: int, arguments: dict[str, Any], **options: Any) -> subprocess.CompletedProcess[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = [python(), program, str(calls), json.dumps(arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, **options)


@pytest.fixture
def inputs(tmp_path: Path, corpus: Path, texts: list[str]) -> list[str]:
    """JSON lines, compressed, and a plain text that is cut into pieces."""
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()[:4000].rpartition(b"\n")[0]))
    (tmp_path / "prose.txt").write_text(" ".join(texts[:2] * 20))
    return [str(corpus), str(tmp_path / "more.jsonl.gz"), str(tmp_path / "prose.txt")]


def files_of(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}_text_document{ending}").read_bytes() for ending in ENDINGS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "second_pass", [pytest.param({}, marks=pytest.mark.long), {"dedup": True, "shuffle_documents": 3}]
)
def test_ten_kills_anywhere_and_resuming_give_the_same_bytes(
    tmp_path: Path, inputs: list[str], tokenizer_folder: Path, second_pass: dict[str, Any]
) -> None:
    arguments = dict(inputs=inputs, tokenizer=str(tokenizer_folder), append_eod=True, resume=True) | second_pass
    whole = start(tmp_path, 0, arguments | {"output_prefix": str(tmp_path / "whole")})
    calls = int(whole.stdout.rpartition("calls: ")[2])
    assert calls > 200, whole.stderr
    points = [*sorted(random.Random(0).sample(range(2, calls), 8)), calls - 3, calls - 1]
    for point in points:  # each kill starts from nothing, and a second one from what the first left
        prefix = tmp_path / f"killed-{point}"
        first = start(tmp_path, point, arguments | {"output_prefix": str(prefix)})
        assert first.returncode == -signal.SIGKILL
        start(tmp_path, 25, arguments | {"output_prefix": str(prefix)})
        last = start(tmp_path, 0, arguments | {"output_prefix": str(prefix)})
        assert last.returncode == 0, last.stderr
        assert files_of(prefix) == files_of(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.glob(f"killed-{point}_*")) == [
            f"killed-{point}_text_document{ending}" for ending in ENDINGS
        ]


@pytest.fixture
def interrupted(tmp_path: Path, inputs: list[str], tokenizer_folder: Path) -> dict[str, Any]:
    """The arguments of a run that was killed somewhere in the second file."""
    arguments = dict(inputs=inputs, tokenizer=str(tokenizer_folder), output_prefix=str(tmp_path / "out"))
    assert start(tmp_path, 258, arguments).returncode == -signal.SIGKILL
    journal = (tmp_path / "out_text_document.partial.journal").read_text().splitlines()
    assert json.loads(journal[-1])["mark"]["input"] == 1
    return arguments | {"resume": True}


def test_changed_inputs_are_refused(interrupted: dict[str, Any], inputs: list[str]) -> None:
    for path in inputs:
        before = Path(path).read_bytes()
        status = os.stat(path)
        for after in (before + b"\n", b"x" + before[1:]):
            Path(path).write_bytes(after)
            if path == inputs[2] and len(after) == len(before):
                continue  # not read yet: what counts is what will be read
            with pytest.raises(DataError, match=r"has changed since|cannot be read|not what its name says"):
                preprocess(**interrupted)
        Path(path).write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="had 3 input files, now there are 2"):
        preprocess(**interrupted | {"inputs": inputs[:2]})
    with pytest.raises(DataError, match="was to read"):
        preprocess(**interrupted | {"inputs": inputs[::-1]})
    assert preprocess(**interrupted).pairs[0].documents > 200


def test_a_run_that_an_earlier_version_began_is_continued_without_a_map_of_origins(
    interrupted: dict[str, Any], tmp_path: Path
) -> None:
    whole = preprocess(**interrupted | {"output_prefix": str(tmp_path / "whole"), "resume": False}).pairs[0].prefix
    journal = tmp_path / "out_text_document.partial.journal"
    plan, *entries = journal.read_text().splitlines()
    for i, entry in enumerate(map(json.loads, entries)):
        for name in ("records", "kinds", "record_count"):
            del entry[name]
        for pair in entry["pairs"]:
            del pair["bytes"], pair["position"]["origins"]
        entries[i] = json.dumps(entry)
    journal.write_text("\n".join([plan, *entries, ""]))
    (tmp_path / "out_text_document.partial.origins").unlink()
    prefix = preprocess(**interrupted).pairs[0].prefix
    for ending in (".bin", ".idx"):
        assert Path(prefix + ending).read_bytes() == Path(whole + ending).read_bytes()
    manifest = read_manifest(prefix)
    assert manifest and manifest.text_bytes is None and not Path(f"{prefix}.origins").exists()
    assert [record.records is None for record in manifest.inputs] == [True, False, False]
    with pytest.raises(UnknownOriginsError, match="has no map of origins"):
        Origins(prefix)


def test_touched_inputs_are_compared_by_content(interrupted: dict[str, Any], inputs: list[str]) -> None:
    for path in inputs:
        os.utime(path)
    assert preprocess(**interrupted).pairs[0].documents > 200


def test_other_arguments_are_refused(interrupted: dict[str, Any], bpe_of_lines: Path) -> None:
    with pytest.raises(DataError, match="had append eod = False, this one has True"):
        preprocess(**interrupted | {"append_eod": True})
    with pytest.raises(DataError, match="had fingerprint = "):
        preprocess(**interrupted | {"tokenizer": str(bpe_of_lines)})


def test_damaged_partial_files_are_refused(interrupted: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "out_text_document.partial.tokens"
    path.write_bytes(b"xx" + path.read_bytes()[2:])
    with pytest.raises(DataError, match="does not contain what was written to it"):
        preprocess(**interrupted)


@pytest.mark.parametrize("part", ["tokens", "lengths", "origins"])
@pytest.mark.parametrize("dedup", [False, True])
def test_files_damaged_after_all_was_read_are_refused(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, part: str, dedup: bool
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = dict(inputs=[corpus], tokenizer=str(tokenizer_folder), dedup=dedup)
    arguments["output_prefix"] = str(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "arrange" if dedup else "write_index", interrupt)
        preprocess(**arguments)
    path = tmp_path / f"out_text_document.partial.{part}"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DataError, match=rf"partial\.{part} does not contain what was written to it"):
        preprocess(**arguments, resume=True)


def test_the_lock_ends_with_its_process_even_if_forked_ones_live_on(tmp_path: Path) -> None:
    program = """
import os, sys, time
from megagap.data.manifest import read_manifest
from megagap.data.origins import Origins, UnknownOriginsError
from megagap.data.partial import lock_pair
lock = lock_pair(sys.argv[1])
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)
"""
    killed = subprocess.Popen([sys.executable, "-c", program, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    child = int(killed.stdout.readline())
    try:
        killed.kill()
        killed.wait()
        lock_pair(str(tmp_path / "out")).release()
    finally:
        os.kill(child, signal.SIGKILL)
        killed.stdout.close()


def test_starting_again_without_resume_removes_what_was_left(interrupted: dict[str, Any], tmp_path: Path) -> None:
    summary = preprocess(**interrupted | {"resume": False})
    assert "removed what an unfinished run left" in summary.notes[0]
    assert not list(tmp_path.glob("*.partial*"))


def test_resuming_a_finished_run_does_nothing_unless_inputs_changed(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    arguments: dict[str, Any] = dict(inputs=[corpus], tokenizer=str(tokenizer_folder), resume=True)
    arguments["output_prefix"] = str(tmp_path / "out")
    first = preprocess(**arguments)
    written = os.stat(tmp_path / "out_text_document.bin").st_ino
    again = preprocess(**arguments)
    assert again.pairs == first.pairs and "finished already" in again.notes[0]
    assert os.stat(tmp_path / "out_text_document.bin").st_ino == written
    corpus.write_bytes(corpus.read_bytes().replace(b"quick", b"quack"))
    preprocess(**arguments)
    assert os.stat(tmp_path / "out_text_document.bin").st_ino != written


def test_a_rate_counts_only_what_this_run_read(
    interrupted: dict[str, Any], inputs: list[str], tmp_path: Path, corpus: Path
) -> None:
    contents = [Path(path).read_bytes() for path in inputs]
    content = sum(len(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data) for data in contents)
    summary = preprocess(**interrupted)
    assert summary.input_bytes == content and content - corpus.stat().st_size - 4000 < summary.read_bytes < content
    assert f"; this run read {summary.read_bytes / 1e3:.1f} kB of it, uncompressed, in " in str(summary)
    assert str(summary).count("B/s)") == 1
    again = preprocess(**interrupted)
    assert (again.was_finished, again.read_bytes, again.input_bytes) == (True, 0, content)
    assert str(again).endswith(", by an earlier run") and "B/s" not in str(again)
    whole = preprocess(**interrupted | {"resume": False, "output_prefix": str(tmp_path / "whole")})
    assert whole.read_bytes == whole.input_bytes == content
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "out")


def test_a_run_that_was_interrupted_after_reading_has_no_rate(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = dict(inputs=[corpus], tokenizer=str(tokenizer_folder))
    arguments["output_prefix"] = str(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "write_index", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        preprocess(**arguments)
    summary = preprocess(**arguments, resume=True)
    assert (summary.read_bytes, summary.input_bytes) == (0, corpus.stat().st_size)
    assert "of uncompressed input, which an earlier run read in " in str(summary) and "B/s" not in str(summary)


def test_the_bar_shows_the_files_bytes_and_the_rate_of_uncompressed_ones(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    preprocess([tmp_path / "a.jsonl.gz"], str(tmp_path / "out"), str(tokenizer_folder), show_progress=True)
    bar = capfd.readouterr().err
    assert "B of files [" in bar and "B/s uncompressed]" in bar


def test_a_fault_far_into_the_input_keeps_what_was_done(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(corpus.read_bytes() + b"{\n")
    monkeypatch.setattr(job, "JOURNAL_SECONDS", 0)
    monkeypatch.setattr(job, "read_units", partial(read_units, unit_bytes=500))
    arguments: dict[str, Any] = dict(inputs=[tmp_path / "bad.jsonl"], tokenizer=str(tokenizer_folder))
    arguments["output_prefix"] = str(tmp_path / "out")
    with pytest.raises(DataError, match=r"line 203: not valid JSON(.|\n)*--resume continues it"):
        preprocess(**arguments)
    summary = preprocess(**arguments, resume=True, on_error="skip")
    assert summary.skipped == 1 and summary.pairs[0].documents == 200


def test_an_interrupted_run_says_that_it_can_be_resumed(
    tmp_path: Path, inputs: list[str], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(job, "JOURNAL_SECONDS", 0)
    for count, said in ((0, []), (5, ["The work done so far is kept: the same command with --resume continues it."])):
        monkeypatch.setattr(job, "read_units", lambda *given, n=count: interrupted_after(n, *given))
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, str(tmp_path / "out"), str(tokenizer_folder))
        assert caplog.messages == said


def test_a_full_disk_is_named_as_the_cause_and_resuming_continues(
    tmp_path: Path, inputs: list[str], tokenizer_folder: Path
) -> None:
    arguments = dict(inputs=inputs, tokenizer=str(tokenizer_folder), output_prefix=str(tmp_path / "out"))

    def limit() -> None:  # on file size, which to a program looks like a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    full = start(tmp_path, 0, arguments, preexec_fn=limit)
    assert full.returncode == 2
    assert "File too large" in full.stderr and "--resume continues it" in full.stderr and "Traceback" not in full.stderr
    done = start(tmp_path, 0, arguments | {"resume": True})
    assert done.returncode == 0, done.stderr
    assert start(tmp_path, 0, arguments | {"output_prefix": str(tmp_path / "whole")}).returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_second_writer_is_refused_naming_the_first(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    from megagap.data.indexed import IndexedDatasetWriter

    with (
        IndexedDatasetWriter(tmp_path / "out_text_document", "uint16"),
        pytest.raises(DataError, match=rf"out_text_document is being written by process {os.getpid()} on "),
    ):
        preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder))


@pytest.mark.parametrize("min_tokens", [0, 300])
def test_interrupted_after_any_unit_the_bytes_are_the_same(
    tmp_path: Path, inputs: list[str], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, min_tokens: int
) -> None:
    """Also in the middle of a plain text, whether too short so far or not."""
    monkeypatch.setattr(job, "JOURNAL_SECONDS", 0)
    arguments: dict[str, Any] = dict(tokenizer=str(tokenizer_folder), min_tokens=min_tokens, append_eod=True)
    arguments["inputs"] = [inputs[2], inputs[1], inputs[2]]
    monkeypatch.setattr(job, "read_units", partial(read_units, unit_bytes=400))
    preprocess(**arguments, output_prefix=str(tmp_path / "whole"))
    units = len(list(read_units(find_inputs(arguments["inputs"]), ["text"], True, unit_bytes=400)))
    assert units > 20
    for count in range(1, units):
        monkeypatch.setattr(job, "read_units", lambda *given, n=count: interrupted_after(n, *given))
        with pytest.raises(KeyboardInterrupt):
            preprocess(**arguments, output_prefix=str(tmp_path / "out"))
        monkeypatch.setattr(job, "read_units", partial(read_units, unit_bytes=400))
        preprocess(**arguments, output_prefix=str(tmp_path / "out"), resume=True)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def interrupted_after(count: int, *given: Any) -> Iterator[Unit]:
    yield from islice(read_units(*given, unit_bytes=400), count)
    raise KeyboardInterrupt
