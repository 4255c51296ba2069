"""Named pipes, devices and broken links in place of files: refused by name, without waiting."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megagap.data.identity import identify
from megagap.data.indexed import IndexedDataset
from megagap.data.manifest import read_manifest
from megagap.errors import DataError
from megagap.preprocess.merge import merge_datasets
from megagap.tokenizer import load_tokenizer
from tests.few import WriteTokens


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("gone")


def a_folder(path: Path) -> None:
    path.mkdir()


SAYS = {
    a_pipe: "is a named pipe or a device",
    a_device: "is a named pipe or a device",
    a_link_to_nowhere: "is a link to gone, which does not exist",
    a_folder: "there is a folder where a file is needed",
}
odd_files = pytest.mark.parametrize("make", SAYS, ids=lambda make: make.__name__)


@pytest.fixture(autouse=True)
def _does_not_wait() -> Iterator[None]:
    """Reading a pipe would wait forever."""
    import signal

    signal.alarm(60)
    yield
    signal.alarm(0)


@odd_files
@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_a_pairs_files(write_tokens: WriteTokens, tmp_path: Path, make: Callable[[Path], None], ending: str) -> None:
    prefix = write_tokens("a", [[1, 2]])
    Path(prefix + ending).unlink(missing_ok=True)
    make(Path(prefix + ending))
    read = read_manifest if ending == ".json" else IndexedDataset
    for refused in (lambda: read(prefix), lambda: merge_datasets([prefix], str(tmp_path / "merged"))):
        with pytest.raises(DataError, match=SAYS[make]) as error:
            refused()
        assert prefix + ending in str(error.value)
    if ending == ".json":
        assert identify(prefix)["manifest"] is None


@odd_files
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
)
def test_a_tokenizers_folder(tokenizer_folder: Path, tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(DataError, match=f"{name}(.|\n)*{SAYS[make]}|contains (no|several)"):
        load_tokenizer(folder)


@odd_files
@pytest.mark.parametrize("kind", ["", "hf:", "sentencepiece:", "tiktoken:"])
def test_a_tokenizers_file(tmp_path: Path, make: Callable[[Path], None], kind: str) -> None:
    make(tmp_path / "x.model")
    with pytest.raises(DataError, match=f"{SAYS[make]}|contains no"):
        load_tokenizer(f"{kind}{tmp_path / 'x.model'}")


def test_a_broken_link_does_not_change_the_tokenizer_of_its_folder(
    tokenizer_folder: Path, rank_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").symlink_to("gone")
    shutil.copy(rank_file, tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="it is a link to gone, which does not exist"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("arguments", "shard"), "1", "arguments.shard: .*should be I/N"),
        (("arguments", "shard"), "2/2", "arguments.shard: .*should be I/N"),
        (("arguments", "shard"), "a/b", "arguments.shard: .*should be I/N"),
        (("dtype",), "words", "dtype: .*is not a token dtype"),
        (("documents",), -1, "documents"),
        (("tokenizer", "eod"), "2", "tokenizer.eod"),
        (("files",), {}, r"should list a \.bin and an \.idx"),
    ],
)
def test_a_manifest_with_impossible_values_is_refused(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, place: tuple[str, ...], value: object, says: str
) -> None:
    from megagap.preprocess import preprocess

    prefix = preprocess([corpus], str(tmp_path / "a"), str(tokenizer_folder)).pairs[0].prefix
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    part = manifest
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    Path(f"{prefix}.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=says):
        merge_datasets([prefix], str(tmp_path / "merged"))
