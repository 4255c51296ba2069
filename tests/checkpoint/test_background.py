"""A save in the background writes what there was when it began, and says so only when it is durable."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import Index, background, find_latest, load_tensor, save_checkpoint
from megagap.checkpoint.background import BackgroundSaver, available_memory
from megagap.errors import CheckpointError, NotWrittenError
from megagap.ops.remainder import join, split_
from megagap.parallel.communicator import SingleProcess
from megagap.parallel.shard import Slice, whole
from tests.launching import SECONDS

from .conftest import RunRanks, ThreadCommunicator

CPU = torch.device("cpu")


def split_slices() -> list[Slice]:
    """A master that is kept as bf16 and its remainder, and moments."""
    numbers = torch.randn(15, generator=torch.Generator().manual_seed(1))
    values, remainder = torch.empty(15, dtype=torch.bfloat16), torch.empty(15, dtype=torch.int16)
    split_(numbers, values, remainder)
    shard = whole("w", (5, 3))
    moment = torch.arange(15.0).bfloat16()
    return [Slice("weight", shard, 0, 15, values, remainder), Slice("exp_avg", shard, 0, 15, moment)]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saver_of(slices: list[Slice]) -> BackgroundSaver:
    return BackgroundSaver(slices, SingleProcess(), CPU)


def test_it_writes_the_bytes_of_a_save_that_is_waited_for_although_the_weights_change(tmp_path, monkeypatch):
    slices, changed = split_slices(), threading.Event()
    save_checkpoint(tmp_path / "waited" / "step_00000001", slices, {"step": 1})

    def save_once_changed(*arguments, **options):
        assert changed.wait(SECONDS)
        save_checkpoint(*arguments, **options)

    monkeypatch.setattr(background, "save_checkpoint", save_once_changed)
    saver = saver_of(slices)
    saver.start(tmp_path / "step_00000001", slices, {"step": 1}, lambda seconds: None)
    for part in slices:
        part.write(torch.zeros(15))
    assert not saver.is_idle and find_latest(tmp_path) is None
    changed.set()
    saver.wait()
    assert files(tmp_path / "step_00000001") == files(tmp_path / "waited/step_00000001")


def test_the_next_save_uses_the_same_memory(tmp_path):
    slices = split_slices()
    saver = saver_of(slices)
    (first, _), (second, _) = saver._copies.take(slices), saver._copies.take(slices)
    assert [part.tensor.data_ptr() for part in first] == [part.tensor.data_ptr() for part in second]
    assert torch.equal(first[0].read(), join(slices[0].tensor, slices[0].remainder))


def test_all_is_synced_before_it_is_renamed_and_announced(tmp_path, monkeypatch):
    """Files, then the index, then the folder with their names, then the folder's own name, then ``latest``."""
    calls: list[str] = []
    sync, rename = os.fsync, os.replace

    def name_of(path: object) -> str:
        return os.path.basename(str(path)).partition(".partial-")[0]

    def fsync(descriptor: int) -> None:
        calls.append("sync " + name_of(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def replace(source: object, target: object) -> None:
        calls.append("name " + name_of(target))
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    slices, checkpoints = split_slices(), tmp_path / "checkpoints"
    saver = saver_of(slices)
    saver.start(checkpoints / "step_00000001", slices, {}, lambda seconds: calls.append("saved"))
    saver.wait()
    assert calls == [
        "sync rank_00000.safetensors",
        *("sync index.json", "name index.json", "sync partial_step_00000001"),
        *("name step_00000001", "sync checkpoints"),
        *("sync latest", "name latest", "sync checkpoints"),
        "saved",
    ]


def test_a_failure_is_raised_on_every_rank_that_waits_and_the_next_save_is_made(tmp_path, run_ranks: RunRanks):
    first, second = tmp_path / "step_00000001", tmp_path / "step_00000002"
    shard = whole("w", (4,))

    def work(communicator: ThreadCommunicator) -> None:
        rank = communicator.rank
        slices = [Slice("weight", shard, 2 * rank, 2 * rank + 2, torch.full((2,), float(rank)))]
        saver = BackgroundSaver(slices, communicator, CPU)
        saved: list[float] = []
        saver.start(first, slices, {}, saved.append)
        while not saver.has_failed:
            assert not saver.is_idle
            time.sleep(0.01)
        assert not saved
        with pytest.raises(NotWrittenError, match=r"step_00000001 was not written\n  .* 0 are free"):
            saver.wait()
        saver.wait()
        saver.start(second, slices, {}, saved.append)
        saver.wait()
        assert len(saved) == 1
        saver.close()

    real = os.statvfs
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 0, 0, 0, 0, 255))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: full if "00000001" in str(path) else real(path))
        assert run_ranks(2, work) == [None, None]
    index = Index.read(second)
    assert load_tensor(second, index, "weight", "w").tolist() == [0, 0, 1, 1] and find_latest(tmp_path) == second


def test_a_machine_without_the_memory_for_the_copies_is_named_on_every_rank(run_ranks: RunRanks, monkeypatch):
    monkeypatch.setattr(background, "available_memory", lambda: 320)  # of which each rank alone needs less
    slices = split_slices()

    def work(communicator: ThreadCommunicator) -> None:
        BackgroundSaver(slices, communicator, CPU)

    assert run_ranks(1, work) == [None]
    errors = run_ranks(2, work)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert all(
        "no memory for the copies" in str(error) and "checkpoint.async = false" in str(error) for error in errors
    )


def test_memory_that_cannot_be_allocated_is_no_traceback(run_ranks: RunRanks, monkeypatch):
    class NoMemory:
        def __init__(self, *arguments: object) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(background, "HostCopies", NoMemory)
    errors = run_ranks(2, lambda communicator: BackgroundSaver([], communicator, CPU) and None)
    assert all(isinstance(error, CheckpointError) and "rank 0: DefaultCPUAllocator" in str(error) for error in errors)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 7_000_000 * 1024), ("5000", 5000 - 4000 + 300), ("100", 0), (None, 7_000_000 * 1024)],
)
def test_available_memory_is_the_machines_or_what_its_control_group_leaves(tmp_path, limit, expected):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    7000000 kB\n")
    assert available_memory(tmp_path) == 7_000_000 * 1024
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    group = tmp_path / "sys/fs/cgroup/job"
    group.mkdir(parents=True)
    if limit is not None:
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text("4000\n")
        (group / "memory.stat").write_text("anon 3700\ninactive_file 300\n")
    assert available_memory(tmp_path) == expected
    assert available_memory(tmp_path / "nowhere") is None
