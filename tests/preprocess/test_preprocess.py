import gzip
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import zstandard

from megagap.data.indexed import IndexedDataset
from megagap.errors import DataError
from megagap.preprocess import Pair, preprocess
from megagap.preprocess import job as module
from megagap.preprocess.units import read_units
from tests.launching import SECONDS


def documents_of(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [text for line in lines if (text := json.loads(line)["text"])]


def cut_into_units_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_units", partial(read_units, unit_bytes=size))


def backend(folder: Path):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_documents_are_tokens_in_input_order(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    summary = preprocess([corpus, corpus], str(tmp_path / "out"), str(tokenizer_folder), append_eod=True)
    dataset = IndexedDataset(tmp_path / "out_text_document")
    expected = [[*backend(tokenizer_folder).encode(text).ids, 1] for text in documents_of(corpus)] * 2
    assert [document.tolist() for document in dataset] == expected
    assert dataset.dtype.name == "uint16"
    assert summary.pairs == (Pair(str(tmp_path / "out_text_document"), 400, 2, sum(map(len, expected))),)
    assert summary.input_bytes == 2 * corpus.stat().st_size


def test_files_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small that many are in flight at once.
    cut_into_units_of(500, monkeypatch)
    for workers in (1, 2, 5):
        preprocess([corpus], str(tmp_path / str(workers)), str(tokenizer_folder), workers=workers)
    for ending in ("bin", "idx", "json"):
        one, two, five = ((tmp_path / f"{n}_text_document.{ending}").read_bytes() for n in (1, 2, 5))
        assert one == two == five


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "a"}', "nested too deeply"),
        (b'{"body": "x"}', "no key 'text'; it has 'body'"),
        (b'["text"]', "not a JSON object"),
        (b'{"text": 3}', "is int, not text"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b'{"text": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_bad_document_names_file_and_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: .*{message}"):
        preprocess([path], str(tmp_path / "out"), str(tokenizer_folder))
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_fault_in_a_worker_ends_the_run_with_its_message(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    with open(corpus, "a") as file:
        file.write('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 203: the document has no key 'text'"):
        preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder), workers=2)
    assert list(tmp_path.glob("out*")) == []


def test_missing_file_is_named_before_any_work(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: No such file"):
        preprocess([corpus, tmp_path / "absent.jsonl"], str(tmp_path / "out"), str(tokenizer_folder))


def test_tokenizer_without_end_of_text_cannot_append_it(tmp_path: Path, corpus: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        preprocess([corpus], str(tmp_path / "out"), str(tmp_path), append_eod=True)


def test_key_names_the_output(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "hello"}\n')
    preprocess([tmp_path / "a.jsonl"], str(tmp_path / "out"), str(tokenizer_folder), ["body"])
    assert IndexedDataset(tmp_path / "out_body_document").document_count == 1


def test_pairs_of_several_keys_equal_the_pair_of_each_key_alone(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [{"text": f"texte {i}. " * (i % 3), "title": f"titre {i}" * (i % 2)} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    cut_into_units_of(500, monkeypatch)
    for out, keys, workers in (("both", ["title", "text"], 2), ("one", ["text"], 1), ("other", ["title"], 1)):
        summary = preprocess([tmp_path / "a.jsonl"], str(tmp_path / out), str(tokenizer_folder), keys, workers=workers)
        assert [pair.prefix for pair in summary.pairs] == [str(tmp_path / f"{out}_{key}_document") for key in keys]
        expected = {"title": (50, 50), "text": (66, 34)}
        assert [(pair.documents, pair.empty) for pair in summary.pairs] == [expected[key] for key in keys]
    for ending in ("bin", "idx"):
        for alone, key in (("one", "text"), ("other", "title")):
            both, single = (tmp_path / f"{out}_{key}_document.{ending}" for out in ("both", alone))
            assert both.read_bytes() == single.read_bytes()


def test_fault_with_several_keys_in_workers_names_key_and_line_and_leaves_nothing(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 1: the document has no key 'title'; it has 'id', 'text'"):
        preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder), ["text", "title"], workers=2)
    assert list(tmp_path.glob("out*")) == []


def test_one_key_twice_is_refused(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="text, text are not distinct"):
        preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder), ["text", "text"])


def test_compressed_input_gives_the_same_files(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    contents = {"plain": corpus.read_bytes()}
    contents |= {"gz": gzip.compress(contents["plain"]), "zst": zstandard.compress(contents["plain"])}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        summary = preprocess([tmp_path / name], str(tmp_path / f"out_{name}"), str(tokenizer_folder))
        assert (summary.input_bytes, summary.file_bytes) == (len(contents["plain"]), len(content))
        for ending in ("bin", "idx"):
            expected = (tmp_path / f"out_plain_text_document.{ending}").read_bytes()
            assert (tmp_path / f"out_{name}_text_document.{ending}").read_bytes() == expected


BAD_LINES = [b'{"text": "cut', b'{"body": "x"}', b"[]", b'{"text": 3}', b'{"text": "\xff"}', b'{"text": "\\ud800"}']


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_leaves_bad_documents_out_and_says_where(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    lines = corpus.read_bytes().splitlines()
    assert len(lines) == 202
    for bad in BAD_LINES:
        lines.insert(100, bad)
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    cut_into_units_of(100, monkeypatch)
    summary = preprocess(
        [tmp_path / "bad.jsonl"], str(tmp_path / "skip"), str(tokenizer_folder), workers=workers, on_error="skip"
    )
    preprocess([corpus], str(tmp_path / "good"), str(tokenizer_folder))
    for ending in ("bin", "idx"):
        skip, good = (tmp_path / f"{name}_text_document.{ending}" for name in ("skip", "good"))
        assert skip.read_bytes() == good.read_bytes()
    assert summary.skipped == 6
    places = [fault.split(":")[0] for fault in summary.first_skipped]
    assert places == [f"{tmp_path / 'bad.jsonl'}, line {n}" for n in (101, 102, 103, 104, 105)]


def test_skipping_every_document_is_a_fault(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 201 documents can be used(.|\n)*line 1: .* no key 'txt'"):
        preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder), ["txt"], on_error="skip")
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_cut_short_is_never_skipped(tmp_path: Path, corpus: Path, tokenizer_folder: Path, workers: int) -> None:
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(corpus.read_bytes())[:-20])
    with pytest.raises(DataError, match=r"cut\.jsonl\.zst cannot be read beyond line"):
        preprocess(
            [tmp_path / "cut.jsonl.zst"], str(tmp_path / "out"), str(tokenizer_folder), workers=workers, on_error="skip"
        )
    assert list(tmp_path.glob("out*")) == []


def test_inputs_without_documents_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="the inputs hold no documents"):
        preprocess([tmp_path / "a.jsonl"], str(tmp_path / "new/out"), str(tokenizer_folder))
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"only documents that are empty or too short \(1\)"):
        preprocess([tmp_path / "a.jsonl"], str(tmp_path / "new/out"), str(tokenizer_folder))
    assert not any((tmp_path / "new").iterdir())


PROGRAM = """
import sys
from megagap.preprocess import job, preprocess
from megagap.preprocess.units import read_units
from megagap.errors import run_tool

def endless(*arguments):
    while True:
        yield from read_units(*arguments, unit_bytes=2000)

job.read_units = endless
job.JOURNAL_SECONDS = 0
if __name__ == "__main__":
    run_tool(lambda: preprocess(sys.argv[1:2], sys.argv[2], sys.argv[3], workers=8))  # two processes of four threads
"""


@pytest.fixture
def endless_run(tmp_path: Path, corpus: Path, tokenizer_folder: Path):  # type: ignore[no-untyped-def]
    """A run that never ends, and its worker processes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command: list[str | Path] = [sys.executable, tmp_path / "program.py", corpus, tmp_path / "out", tokenizer_folder]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        workers = wait_for(lambda: found if len(found := worker_processes(run.pid)) == 2 else None)
        wait_for(lambda: [path for path in tmp_path.glob("*.partial.tokens") if path.stat().st_size])
        yield run, workers
    finally:
        run.kill()
        run.wait()


def wait_for(condition):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 300
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def worker_processes(parent: int) -> list[int]:
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    return [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds worker processes in /proc")


@needs_proc
def test_killed_worker_ends_the_run_with_a_message(endless_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    run, workers = endless_run
    os.kill(workers[0], signal.SIGKILL)
    _, errors = run.communicate(timeout=SECONDS)
    assert run.returncode == 2
    assert errors.startswith("data error: a worker process died")
    assert "--resume continues it" in errors
    assert (tmp_path / "out_text_document.partial.journal").exists()
    assert not list(tmp_path.glob("out*.bin")) and not list(tmp_path.glob("out*.lock"))


@needs_proc
def test_workers_end_when_their_parent_is_killed(endless_run) -> None:  # type: ignore[no-untyped-def]
    run, workers = endless_run
    run.kill()
    wait_for(lambda: not any(map(is_running, workers)))


def test_an_id_outside_the_vocabulary_is_refused(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megagap.tokenizer.huggingface import HuggingFaceTokenizer

    monkeypatch.setattr(HuggingFaceTokenizer, "encode_batch", lambda self, texts: [[70_000] for _ in texts])
    with pytest.raises(
        DataError, match=r"corpus\.jsonl, from line 1 on: .* returned the id 70000, .* vocabulary of 300"
    ):
        preprocess([corpus], str(tmp_path / "out"), str(tokenizer_folder))
    assert not list(tmp_path.glob("out*"))


def test_special_ids_surround_documents_and_short_ones_are_left_out(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    summary = preprocess(
        [corpus], str(tmp_path / "out"), str(tokenizer_folder), append_eod=True, prepend_bos=True, min_tokens=30
    )
    encoded = [backend(tokenizer_folder).encode(text).ids for text in documents_of(corpus)]
    expected = [[0, *ids, 1] for ids in encoded if len(ids) >= 30]
    assert [document.tolist() for document in IndexedDataset(tmp_path / "out_text_document")] == expected
    assert 0 < len(expected) < 200
    assert summary.pairs[0].short == 200 - len(expected)
    assert f"1 empty, {summary.pairs[0].short} too short left out" in str(summary)
