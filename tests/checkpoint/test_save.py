import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megagap.checkpoint import Index, find_latest, load_tensor, save_checkpoint
from megagap.errors import CheckpointError
from megagap.parallel.shard import Slice, whole

from .conftest import RunRanks, ThreadCommunicator

SHARD = whole("w", (4, 3))


def halves(rank: int) -> list[Slice]:
    """Two ranks own half of a 4 x 3 matrix each."""
    values = torch.arange(12.0)[rank * 6 : rank * 6 + 6]
    return [Slice("weight", SHARD, rank * 6, rank * 6 + 6, values)]


def save_step(checkpoints: Path, step: int, value: float = 0.0) -> Path:
    folder = checkpoints / f"step_{step:08}"
    save_checkpoint(folder, [Slice("weight", SHARD, 0, 12, torch.full((12,), value))], {"step": step})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_folder_has_one_file_per_rank_and_is_the_latest(tmp_path: Path, run_ranks: RunRanks) -> None:
    folder = tmp_path / "step_00000007"
    assert run_ranks(2, lambda c: save_checkpoint(folder, halves(c.rank), {"step": 7}, c)) == [None, None]
    assert names(tmp_path) == ["latest", "step_00000007"]
    assert names(folder) == ["index.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    assert find_latest(tmp_path) == folder
    index = Index.read(folder)
    assert index.state == {"step": 7}
    assert torch.equal(load_tensor(folder, index, "weight", "w"), torch.arange(12.0).view(4, 3))


def test_the_safetensors_library_reads_every_rectangle(tmp_path: Path) -> None:
    parts = [
        Slice("weight", whole("odd", (3,)), 0, 3, torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)),
        Slice("exp_avg", SHARD, 0, 5, torch.arange(5.0)),
        Slice("exp_avg", SHARD, 5, 12, torch.arange(5.0, 12.0)),
    ]
    save_checkpoint(tmp_path / "c", parts, {})
    stored = load_file(tmp_path / "c" / "rank_00000.safetensors")
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "weight/odd/0": [1.0, 2.0, 3.0],
        "exp_avg/w/0_0": [[0.0, 1.0, 2.0]],
        "exp_avg/w/1_0": [[3.0, 4.0]],
        "exp_avg/w/1_2": [[5.0]],
        "exp_avg/w/2_0": [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]],
    }


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_with_a_full_disk_fails_all_ranks_and_commits_nothing(
    tmp_path: Path, run_ranks: RunRanks, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = save_step(tmp_path, 1)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if f"rank_{failing:05}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    raised = run_ranks(2, lambda c: save_checkpoint(tmp_path / "step_00000002", halves(c.rank), {}, c))
    assert all(isinstance(error, CheckpointError) for error in raised)
    assert all(f"rank {failing}: No space left on device" in str(error) for error in raised)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert find_latest(tmp_path) == earlier


def test_a_bug_on_one_rank_is_raised_on_the_others_instead_of_hanging_them(tmp_path: Path, run_ranks: RunRanks) -> None:
    def work(communicator: ThreadCommunicator) -> None:
        parts = iter([]) if communicator.rank == 0 else (1 / 0 for _ in range(1))
        save_checkpoint(tmp_path / "step_1", parts, {}, communicator)  # type: ignore[arg-type]

    raised = run_ranks(2, work)
    assert all("rank 1: ZeroDivisionError" in str(error) for error in raised)
    assert isinstance(raised[1], CheckpointError)
    assert isinstance(raised[1].__cause__, ZeroDivisionError)
    assert names(tmp_path) == []


@pytest.mark.parametrize("start", [0, 5, 7])
def test_elements_that_two_ranks_or_none_save_are_refused(tmp_path: Path, run_ranks: RunRanks, start: int) -> None:
    def work(communicator: ThreadCommunicator) -> None:
        parts = halves(0) if communicator.rank == 0 else [Slice("weight", SHARD, start, 12, torch.zeros(12 - start))]
        save_checkpoint(tmp_path / "step_1", parts, {}, communicator)

    assert all(isinstance(error, CheckpointError) for error in run_ranks(2, work))
    assert names(tmp_path) == []


def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path: Path, run_ranks: RunRanks) -> None:
    def work(communicator: ThreadCommunicator) -> None:
        (part,) = halves(communicator.rank)
        tensor = part.tensor if communicator.rank == 0 else part.tensor.bfloat16()
        parts = [Slice(part.kind, part.shard, part.start, part.stop, tensor)]
        save_checkpoint(tmp_path / "step_1", parts, {}, communicator)

    assert all("on one rank" in str(error) for error in run_ranks(2, work))
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), Path("x"), {1, 2}])
def test_state_that_json_cannot_hold_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="was not written"):
        save_checkpoint(tmp_path / "step_1", halves(0) + halves(1), {"value": value})
    assert names(tmp_path) == []


def test_a_run_killed_while_writing_leaves_nothing_that_looks_like_a_checkpoint_and_is_cleaned_up(
    tmp_path: Path,
) -> None:
    stale = tmp_path / "partial_step_00000005"
    stale.mkdir()
    (stale / "rank_00000.safetensors").write_bytes(b"half")
    assert find_latest(tmp_path) is None
    save_step(tmp_path, 6)
    assert names(tmp_path) == ["latest", "step_00000006"]


def test_a_checkpoint_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_step(tmp_path, 3, value=1.0)
    folder = save_step(tmp_path, 3, value=2.0)
    assert names(tmp_path) == ["latest", "step_00000003"]
    assert load_tensor(folder, Index.read(folder), "weight", "w").unique().tolist() == [2.0]


def test_latest_wins_over_a_newer_checkpoint(tmp_path: Path) -> None:
    first = save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    (tmp_path / "latest").write_text("step_00000001\n")
    assert find_latest(tmp_path) == first


@pytest.mark.parametrize("text", ["step_00000009", "../elsewhere", "", "\x00", "step_00000001"])
def test_without_a_valid_latest_the_newest_complete_checkpoint_is_found(tmp_path: Path, text: str) -> None:
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    (first / "index.json").unlink()
    (tmp_path / "latest").write_text(text)
    assert find_latest(tmp_path) == second


def test_only_incomplete_checkpoints_are_an_error(tmp_path: Path) -> None:
    (save_step(tmp_path, 1) / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no index\.json"):
        find_latest(tmp_path)


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    assert find_latest(tmp_path / "nowhere") is None


def test_an_unwritable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="checkpoints"):
        save_step(tmp_path / "checkpoints", 1)
    shutil.rmtree(tmp_path)
