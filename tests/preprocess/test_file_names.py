"""File names are bytes: they need not be valid UTF-8, and may contain anything but a slash and a NUL."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megagap.data.identity import identify
from megagap.data.indexed import IndexedDataset, IndexedDatasetWriter
from megagap.data.manifest import read_manifest
from megagap.data.sources import TokenSource
from megagap.errors import DataError, MegagapError, printable
from megagap.preprocess import job, preprocess
from megagap.preprocess.documents import read_texts
from megagap.preprocess.listing import list_inputs
from megagap.preprocess.merge import merge_datasets
from megagap.timeline import Source
from tests.launching import SECONDS
from tests.warm_start import python

TOOLS = Path(__file__).parents[2] / "tools"

NAMES = [
    os.fsdecode(b"caf\xe9"),
    os.fsdecode(b"\xff\xfe"),
    "new\nline",
    "-x --input",
    " blank ",
    "quo'te\"[1]*",
    "\x1b[31m",
    "é\u0301\u202e",
]


@pytest.fixture(params=NAMES, ids=[f"{name!r}" for name in NAMES])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with such a name, with inputs of such names, one of whose documents is malformed."""
    name = request.param
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    with open(folder / f"{name}.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["two"]}), file)
    (folder / f"{name}.md").write_text("no text for training")
    return folder


def run_tool(tool: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [python(), str(TOOLS / tool), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS)
    assert b"Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("folder", [NAMES[0], NAMES[3]], indirect=True)
def test_all_data_tools_accept_them(folder: Path, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, folder / "tokenizer")
    arguments = ["--input", folder, "--output-prefix", folder / "o", "--tokenizer", folder / "tokenizer"]
    arguments += ["--on-error", "skip", "--workers", 1]
    done = run_tool("preprocess_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert printable(folder.name).encode() + b".md" in done.stderr and b"line 2: the value" in done.stderr
    again = run_tool("preprocess_data.py", *arguments, "--resume")
    assert again.returncode == 0 and b"finished already" in again.stderr
    assert run_tool("preprocess_data.py", *arguments[:-4], "--workers", 1).returncode == 2
    pair = folder / "o_text_document"
    merged = run_tool("merge_datasets.py", "--input", pair, pair, "--output-prefix", folder / "merged")
    assert merged.returncode == 0 and b"4 documents" in merged.stdout, merged.stderr
    shown = run_tool("inspect_data.py", folder / "merged", "--verify", "--tokenizer", folder / "tokenizer")
    assert shown.returncode == 0, shown.stderr


def test_the_manifest_stores_them_in_utf8_and_is_read_back(folder: Path, tokenizer_folder: Path) -> None:
    summary = preprocess([folder], str(folder / "o"), str(tokenizer_folder), on_error="skip")
    manifest = read_manifest(summary.pairs[0].prefix)
    assert manifest is not None
    content = json.loads(Path(f"{summary.pairs[0].prefix}.json").read_text(encoding="utf-8"))
    assert [record["path"] for record in content["inputs"]] == [record.path for record in manifest.inputs]
    found = sorted(str(path) for path in folder.iterdir() if path.suffix in (".jsonl", ".parquet"))
    assert [record.path for record in manifest.inputs] == [printable(path) for path in found]
    assert manifest.unread[0].path == printable(f"{folder / folder.name}.md")


def test_an_interrupted_run_resumes(folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = dict(inputs=[folder], output_prefix=str(folder / "o"), on_error="skip")
    arguments["tokenizer"] = str(tokenizer_folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "JOURNAL_SECONDS", 0)
        patch.setattr(job, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        preprocess(**arguments)
    assert preprocess(**arguments, resume=True).pairs[0].documents == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda name, _: list_inputs([name]),
        lambda name, _: list_inputs([f"{name}*"]),
        lambda name, _: list(read_texts([name], "text")),
        lambda name, good: preprocess([good], name, "tokenizer"),
        lambda name, good: preprocess([good], f"{name}/o", "tokenizer"),
        lambda name, _: IndexedDataset(name),
        lambda name, _: IndexedDatasetWriter(name, "uint16"),
        lambda name, _: merge_datasets([name], "out"),
        lambda name, good: merge_datasets([good], name),
        lambda name, _: TokenSource(Source("x", (name,)), "100,0,0", 0),
        lambda name, _: read_manifest(name),
        lambda name, _: identify(name),
    ],
)
def test_a_nul_in_a_name_is_reported(tmp_path: Path, use: Any) -> None:
    (tmp_path / "good").write_text('{"text": "one"}\n')
    with pytest.raises(MegagapError, match=r"x\\x00y|x\x00y"):
        use(f"{tmp_path}/x\0y", str(tmp_path / "good"))


def test_messages_can_be_printed_and_stored() -> None:
    error = DataError(f"cannot read {os.fsdecode(bytes([0x63, 0xE9]))} \ud800")
    assert str(error) == "data error: cannot read c\\xe9 \\ud800"
    str(error).encode()
