"""Whatever happens to a checkpoint's bytes is found, and whatever its index says is refused quickly."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import Index, load_slices, save_checkpoint
from megagap.checkpoint.verify import find_damage, read_verified
from megagap.errors import CheckpointError
from megagap.parallel.shard import Slice, whole
from tests.launching import SECONDS

from .conftest import run_ranks


def checkpoint(folder: Path, ranks: int = 3) -> list[Slice]:
    """Six tensors, in two chunks each, by several ranks."""
    parts = [
        Slice(kind, shard, start, stop, torch.rand(stop - start))
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for shard in (whole("a", (40, 30)), whole("b", (500,)))
        for start, stop in ((0, 71), (71, shard.numel))
    ]
    run_ranks(ranks, lambda c: save_checkpoint(folder, parts[c.rank :: ranks], {"step": 1, "text": "état"}, c))
    return parts


def open_files(folder: Path) -> list[Path]:
    """What this process has open in `folder`. Whatever else it has may be collected at any time."""
    opened = [descriptor.resolve() for descriptor in Path("/proc/self/fd").iterdir()]
    return [path for path in opened if path.is_relative_to(folder.resolve())]


def is_found(folder: Path) -> bool:
    """By the verifier. Anything but a CheckpointError goes through."""
    try:
        return bool(find_damage(folder, Index.read(folder)))
    except CheckpointError:
        return True


def test_500_flipped_bits_and_truncations_at_random_places_are_all_found(tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    checkpoint(folder)
    files = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    assert not is_found(folder)
    chance = random.Random(0)
    for _ in range(500):
        file = chance.choice(list(files))
        content = bytearray(files[file])
        if chance.random() < 0.2:
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        assert is_found(folder), file
        file.write_bytes(files[file])
    assert not is_found(folder)


def test_damage_is_told_by_file_tensor_and_bytes_and_all_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    checkpoint(folder)
    index = Index.read(folder)
    chunks = [
        (t, c) for t in index.tensors for c in t.chunks if (t.kind, t.name) in {("weight", "a"), ("exp_avg", "b")}
    ]
    for _, chunk in chunks:
        content = bytearray((folder / chunk.file).read_bytes())
        content[chunk.end - 1] ^= 1
        (folder / chunk.file).write_bytes(content)
    found = {(each.file, each.begin, each.end, each.tensor) for each in find_damage(folder, index)}
    assert found == {(c.file, c.begin, c.end, f"{t.kind} of {t.name}") for t, c in chunks}


def test_a_disk_that_fails_while_it_is_read_is_damage_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step_1"
    wanted = checkpoint(folder)
    index, preadv = Index.read(folder), os.preadv

    def fails(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset > 2000:
            raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(CheckpointError, match=r"rank_0000\d\.safetensors, bytes .*: Input/output error"):
        load_slices(folder, index, wanted)
    assert find_damage(folder, index)


def test_a_load_reads_the_chunks_that_it_needs_once_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step_1"
    wanted = [part for part in checkpoint(folder) if part.kind == "weight"]
    index, preadv, read = Index.read(folder), os.preadv, 0

    def counts(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counts)
    load_slices(folder, index, [*wanted, *wanted])
    headers = sum(file.header_size for file in index.files)
    assert read == headers + sum(part.tensor.nbytes for part in wanted)


def test_files_are_closed_when_a_load_fails_and_when_it_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "step_1"
    checkpoint(folder)
    index = Index.read(folder)
    chunks = sorted(((c, "w") for t in index.tensors for c in t.chunks), key=lambda each: (each[0].file, each[0].begin))
    assert not open_files(folder)
    reading = read_verified(folder, {file.name: file for file in index.files}, chunks)
    next(reading)
    assert open_files(folder)
    reading.close()
    assert not open_files(folder)
    broken = [(chunk.model_copy(update={"checksum": "0" * 16}), name) for chunk, name in chunks]
    with pytest.raises(CheckpointError):
        list(read_verified(folder, {file.name: file for file in index.files}, broken))
    assert not open_files(folder)


@pytest.mark.parametrize("many", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_hostile_indexes_are_refused_in_seconds_and_within_a_gigabyte(tmp_path: Path, many: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.hostile", str(tmp_path), str(many)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) > 12
    for name, seconds, answer in answers:
        assert answer is not None and str(tmp_path) in answer, name
        assert seconds < 5, name
