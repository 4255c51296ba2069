"""A disk that is full, in whatever phase of a save, costs that checkpoint and no other."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import Index, find_latest, load_tensor, save, save_checkpoint
from megagap.errors import NotWrittenError
from megagap.parallel.shard import Slice, whole

from .conftest import RunRanks

RENAMING = ("partial_step_00000002", "step_00000002")
SHARD = whole("w", (8, 4096))


def write(folder: Path, run_ranks: RunRanks, value: float) -> list[Exception | None]:
    """A checkpoint of 128 KiB that two ranks write half of each."""
    half = SHARD.numel // 2
    return run_ranks(
        2,
        lambda c: save_checkpoint(
            folder, [Slice("weight", SHARD, c.rank * half, (c.rank + 1) * half, torch.full((half,), value))], {}, c
        ),
    )


def require_whole(folder: Path, value: float) -> None:
    assert load_tensor(folder, Index.read(folder), "weight", "w").unique().tolist() == [value]


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """Let the system refuse what belongs to a phase, for the checkpoint of step 2."""
    sync, rename, mkdir = os.fsync, os.replace, Path.mkdir

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if phase in ("rank_00001", "index.json", "latest") and phase in os.path.basename(path):
            raise full()
        if phase == "the folder's sync" and os.path.isdir(path) and (Path(path) / "step_00000002").exists():
            raise full()
        sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        if phase == "renaming" and (Path(source).name, Path(target).name) == RENAMING:
            raise full()
        rename(source, target)

    def make(path: Path, *arguments: object, **named: object) -> None:
        if phase == "the folder" and path.name == "partial_step_00000002":
            raise full()
        mkdir(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "mkdir", make)
    if phase == "space":
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 99, 9, 31, 0, 0, 0, 0, 255)))


PHASES = ["the folder", "space", "rank_00001", "index.json", "renaming", "latest"]


@pytest.mark.parametrize(
    ("phase", "again"), [*((phase, again) for phase in PHASES for again in (False, True)), ("the folder's sync", False)]
)
def test_earlier_checkpoints_are_intact_and_the_next_save_succeeds(tmp_path, run_ranks, phase, again):
    """``again``: the one of this step, too, which was to be replaced."""
    steps = [tmp_path / f"step_{step:08}" for step in (1, 2, 3)]
    kept = steps[: 1 + again]
    for folder in kept:
        assert write(folder, run_ranks, 1.0) == [None, None]
    with pytest.MonkeyPatch.context() as patch:
        refuse(patch, phase)
        errors = write(steps[1], run_ranks, 2.0)
    assert all(isinstance(error, NotWrittenError) for error in errors)
    assert all("step_00000002 was not written" in str(error) and "free some space" in str(error) for error in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(folder.name for folder in kept)]
    assert find_latest(tmp_path) == kept[-1]
    for folder in kept:
        require_whole(folder, 1.0)
    assert write(steps[2], run_ranks, 3.0) == [None, None]
    require_whole(steps[2], 3.0)
    assert find_latest(tmp_path) == steps[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True, text=True)
    if mounting.returncode:
        pytest.skip(f"needs the right to mount a tmpfs, which this machine does not give: {mounting.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("looked", [True, False], ids=["beforehand", "while writing"])
def test_a_small_disk_fills_up(small_disk, run_ranks, monkeypatch, looked):
    """Whether the free space is known beforehand or, as with a quota, is not."""
    if not looked:
        monkeypatch.setattr(save, "_require_space", lambda folder, needed: None)
    first, second, third = (small_disk / f"step_{step:08}" for step in (1, 2, 3))
    assert write(first, run_ranks, 1.0) == write(second, run_ranks, 2.0) == [None, None]
    before = os.statvfs(small_disk).f_bavail
    errors = write(third, run_ranks, 3.0)
    assert all(isinstance(error, NotWrittenError) for error in errors)
    assert all(("bytes, " in str(error)) == looked and "disk is full" in str(error) for error in errors)
    assert os.statvfs(small_disk).f_bavail == before, "what was begun is removed"
    require_whole(first, 1.0)
    require_whole(second, 2.0)
    assert find_latest(small_disk) == second
