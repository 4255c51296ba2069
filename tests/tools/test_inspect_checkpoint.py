"""The command line of inspecting checkpoints; what it finds is tested in tests/checkpoint/test_damage.py."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import inspect as of_folder
from megagap.checkpoint import save_checkpoint
from megagap.parallel.shard import Slice, whole
from tests.launching import SECONDS
from tests.warm_start import python

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"
STATE = {"train": {"precision": "bf16-mixed"}, "parallel": {"tp": 2}, "validation_loss": 3.25, "note": "\x1b[31m"}


def inspect(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, an incomplete one, and one that is being written."""
    checkpoints = tmp_path / "run/checkpoints"
    shard = whole("w", (40, 3))
    for step in (2, 4):
        parts = [Slice(kind, shard, 0, 120, torch.rand(120)) for kind in ("weight", "exp_avg")]
        save_checkpoint(checkpoints / f"step_{step:08}", parts, STATE | {"step": step})
    for name in ("step_00000003", "partial_step_00000005"):
        (checkpoints / name).mkdir()
    return tmp_path / "run"


def damage(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_described_for_people_and_as_json(run: Path) -> None:
    folder = run / "checkpoints/step_00000004"
    done = inspect(folder, "--verify")
    assert done.returncode == 0, done.stderr
    for text in ("bf16-mixed", "tp = 2", "3.25", "exp_avg", "rank_00000.safetensors", "verified: all"):
        assert text in done.stdout, text
    assert "\x1b" not in done.stdout and 'note = "\\u001b[31m"' in done.stdout
    about = json.loads(inspect(folder, "--verify", "--json").stdout)
    assert about["step"] == 4 and about["parameters"] == 120 and about["precision"] == "bf16-mixed"
    assert about["tensors"]["weight"] == {"tensors": 1, "elements": 120, "bytes": 480, "chunks": 1, "dtypes": ["F32"]}
    assert about["settings"]["parallel"] == {"tp": 2} and about["verified"] and not about["damage"]


def test_a_runs_checkpoints_are_listed_with_their_state(run: Path) -> None:
    damage(run / "checkpoints/step_00000002")
    states = {"step_00000002": "whole", "step_00000003": "incomplete", "step_00000004": "whole"}
    states["partial_step_00000005"] = "incomplete"
    for path in (run, run / "checkpoints"):
        done = inspect(path, "--json")
        assert done.returncode == 0, done.stderr
        assert {each["checkpoint"]: each["state"] for each in json.loads(done.stdout)["checkpoints"]} == states
    done = inspect(run, "--verify")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "1 checkpoint of 4" in done.stderr and "rank_00000.safetensors, bytes " in done.stderr
    (latest,) = [line for line in done.stdout.splitlines() if "latest" in line]
    assert "step_00000004" in latest and "whole, verified" in latest


def test_what_a_run_removes_meanwhile_is_not_called_damaged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = run / "checkpoints"
    read = of_folder.Index.read

    def removed_after_its_index(folder: Path) -> of_folder.Index:
        index = read(folder)
        if folder.name == "step_00000002":
            folder.rename(checkpoints / "partial_removed_step_00000002")
        return index

    monkeypatch.setattr(of_folder.Index, "read", removed_after_its_index)
    listed = of_folder.list_checkpoints(checkpoints, verify=False)
    assert [(each.checkpoint, each.state) for each in listed[:2]] == [
        ("step_00000003", "incomplete"),
        ("step_00000004", "whole"),
    ]


def test_a_nodes_part_of_a_checkpoint_is_not_called_damaged(run: Path) -> None:
    folder = run / "checkpoints/step_00000004"
    (run / "checkpoints/in_use").touch()
    assert inspect(folder).returncode == 0
    (folder / "rank_00000.safetensors").unlink()
    listed = {each.checkpoint: each for each in of_folder.list_checkpoints(run / "checkpoints", verify=True)}
    assert listed["step_00000004"].state == "incomplete" and "other nodes" in listed["step_00000004"].reason
    done = inspect(folder)
    assert done.returncode == 2 and "is one node's part" in done.stderr and "damaged" not in done.stderr


def test_what_is_damaged_is_named_and_the_exit_code_is_2(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints/step_00000002"
    damage(folder)
    done = inspect(folder, "--verify", "--json")
    assert done.returncode == 2
    (found,) = json.loads(done.stdout)["damage"]
    assert found["tensor"] == "exp_avg of w" and found["end"] - found["begin"] == 480
    (folder / "rank_00000.safetensors").unlink()
    for path, message in ((folder, "is damaged"), (tmp_path / "nowhere", "does not exist")):
        done = inspect(path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
