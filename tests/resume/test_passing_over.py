"""A damaged checkpoint is passed over for the one before it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megagap.checkpoint import Index, find_latest
from megagap.checkpoint.verify import find_damage
from megagap.errors import CheckpointError
from tests.recipes import write_recipe
from tests.training_run import train_recipe

STEPS = 6
OVERRIDES = ["parallel.tp=1", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def undisturbed(workers, tmp_path_factory):
    """A run of 6 steps on 2 data ranks with checkpoints after 2, 4 and 6, and its metrics."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder, train=dict(steps=STEPS))
    return folder, recipe, workers.run(2, train_recipe, recipe, OVERRIDES)[0]


def copy_of(undisturbed, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the run as if it had ended after step 4, and what to call to go on."""
    folder, recipe, _ = undisturbed
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    shutil.rmtree(run / "checkpoints/step_00000006")
    (run / "checkpoints/latest").write_text("step_00000004\n")
    return recipe, [*OVERRIDES, f"run.dir={run}"]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit of the index": lambda folder: flip(folder / "index.json", 300),
    "bit of a header": lambda folder: flip(folder / "rank_00001.safetensors", 100),
    "short file": lambda folder: truncate(folder / "rank_00001.safetensors"),
    "missing file": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    # Read by the second rank alone.
    "bit of a tensor": lambda folder: flip(folder / "rank_00001.safetensors", -2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_run_goes_on_from_the_checkpoint_before_and_replaces_the_damaged_one(
    workers, undisturbed, tmp_path, damage
):
    recipe, overrides = copy_of(undisturbed, tmp_path)
    checkpoints = tmp_path / "run/checkpoints"
    DAMAGES[damage](checkpoints / "step_00000004")
    metrics = workers.run(2, train_recipe, recipe, overrides)[0]
    for key in ("step", "loss", "grad_norm"):
        assert [record[key] for record in metrics] == [record[key] for record in undisturbed[2]]
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (passed,) = [event for event in events if event["event"] == "checkpoint_passed_over"]
    assert passed["folder"] == str(checkpoints / "step_00000004") and passed["reason"]
    resumed = [event for event in events if event["event"] == "resume"][-1]
    assert resumed["folder"] == str(checkpoints / "step_00000002") and resumed["lost_steps"] == 4
    (line,) = [
        line for line in (tmp_path / "run/logs/rank_00000.log").read_text().splitlines() if "passed over" in line
    ]
    assert "WARNING" in line and "step_00000004" in line
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest", "step_00000002", "step_00000004", "step_00000006"
    ]  # fmt: skip
    assert find_latest(checkpoints) == checkpoints / "step_00000006"
    for folder in checkpoints.glob("step_*"):
        assert not find_damage(folder, Index.read(folder))


def test_latest_names_what_was_loaded_even_if_the_run_is_stopped_before_it_saves(workers, undisturbed, tmp_path):
    recipe, overrides = copy_of(undisturbed, tmp_path)
    checkpoints = tmp_path / "run/checkpoints"
    DAMAGES["bit of a tensor"](checkpoints / "step_00000004")
    workers.run(2, train_recipe, recipe, [*overrides, "run.stop_after=1"])
    assert find_latest(checkpoints) == checkpoints / "step_00000003"
    shutil.rmtree(checkpoints / "step_00000003")
    (checkpoints / "latest").write_text("step_00000004\n")
    workers.run(2, train_recipe, recipe, [*overrides, "train.steps=2"])  # finished: nothing is saved
    assert find_latest(checkpoints) == checkpoints / "step_00000002"


def fault_of(rank: int, ranks: int, recipe: Path, overrides: list[str]) -> str:
    with pytest.raises(CheckpointError) as raised:
        train_recipe(rank, ranks, recipe, overrides)
    return str(raised.value)


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_an_error_naming_the_file_on_every_rank(
    workers, undisturbed, tmp_path
):
    recipe, overrides = copy_of(undisturbed, tmp_path)
    run = tmp_path / "run"
    newest = run / "checkpoints/step_00000004"
    DAMAGES["bit of a tensor"](newest)
    other = [*OVERRIDES, f"checkpoint.load={newest}", f"run.dir={tmp_path / 'other'}"]
    for asked in (other, [*overrides, f"checkpoint.load={newest}"]):
        messages = workers.run(2, fault_of, recipe, asked)
        assert len(set(messages)) == 1
        assert f"{newest} is damaged: rank_00001.safetensors, bytes " in messages[0]
    assert not (tmp_path / "other/checkpoints").exists() or not any((tmp_path / "other/checkpoints").iterdir())


def test_a_run_whose_checkpoints_are_all_damaged_ends_naming_each_and_does_not_begin_anew(
    workers, undisturbed, tmp_path
):
    recipe, overrides = copy_of(undisturbed, tmp_path)
    checkpoints = tmp_path / "run/checkpoints"
    DAMAGES["bit of a tensor"](checkpoints / "step_00000004")
    DAMAGES["short file"](checkpoints / "step_00000002")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    messages = workers.run(2, fault_of, recipe, overrides)
    for name, what in (("step_00000004", r"checksum"), ("step_00000002", "bytes, the index promises")):
        assert all(name in message and what in message for message in messages)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_latest_names_a_whole_checkpoint_where_the_nodes_disks_have_a_newer_one(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=5))
    overrides = ["parallel.tp=1", "checkpoint.every=2", "checkpoint.local_every=1"]
    overrides.append(f"checkpoint.local_dir={tmp_path / 'disk'}")
    workers.run(2, train_recipe, recipe, overrides)
    checkpoints = tmp_path / "run/checkpoints"
    shutil.rmtree(checkpoints / "step_00000005")
    (checkpoints / "latest").write_text("step_00000004\n")
    DAMAGES["bit of the index"](checkpoints / "step_00000004")
    # What the disks have is that of step 3: newer than step 2, and the end of a run that is to have 3 steps.
    workers.run(2, train_recipe, recipe, [*overrides, "train.steps=3"])
    assert "step 3 of 3" in (tmp_path / "run/logs/rank_00000.log").read_text()
    assert find_latest(checkpoints) == checkpoints / "step_00000002"
