"""Checkpoints on the nodes' own disks: a lost node, a damaged file or another run's leftovers do no harm."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from megagap.checkpoint import file_exchange, node_folders
from megagap.checkpoint.local import LocalTier, Nodes
from megagap.observe.run_directory import RunDirectory
from megagap.resume.next_start import next_start
from tests.recipes import write_recipe
from tests.training_run import train_recipe

LOCAL = ["checkpoint.local_every=1", "checkpoint.local_dir=$TEST_DISK"]


def train_on_nodes(rank, ranks, recipe, overrides, disks):
    """As on several machines: the ranks are divided over these disks, in order."""
    node = rank * len(disks) // ranks
    os.environ |= {"GROUP_RANK": str(node), "TEST_DISK": str(disks[node])}
    return train_recipe(rank, ranks, recipe, overrides)


def numbers(metrics):
    return [(m["step"], m["loss"], m["grad_norm"], m["consumed_samples"]) for m in metrics]


def events(run, name):
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def steps_on(disk):
    return sorted(path.name for path in disk.glob("*/node_*/step_*"))


@pytest.fixture(scope="module")
def stopped(workers, tmp_path_factory):
    """A run over two nodes of two ranks each, as it is if both are killed after step 3; the undisturbed run's numbers
    of four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = write_recipe(folder, model=dict(num_hidden_layers=2), train=dict(steps=4), parallel=dict(tp=2))
    disks = [folder / "disk0", folder / "disk1"]
    alone = workers.run(4, train_recipe, recipe, [f"run.dir={folder / 'alone'}"])[0]
    workers.run(4, train_on_nodes, recipe, [*LOCAL, "run.stop_after=3"], disks)
    shutil.rmtree(folder / "run/checkpoints")  # the stop has written one
    return folder, numbers(alone)


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it, in which a test may break things, in the place of the first."""
    folder, _ = stopped
    saved = tmp_path / "saved"
    names = ("run", "disk0", "disk1")
    for name in names:
        shutil.copytree(folder / name, saved / name)
    yield folder
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(saved / name, folder / name)


def go_on(workers, folder, ranks=4, disks=("disk0", "disk1"), overrides=()):
    recipe = folder / "recipe.toml"
    return numbers(workers.run(ranks, train_on_nodes, recipe, [*LOCAL, *overrides], [folder / d for d in disks])[0])


def test_a_run_goes_on_bit_for_bit_from_its_nodes_disks(workers, stopped, run):
    assert steps_on(run / "disk0") == steps_on(run / "disk1") == ["step_00000001", "step_00000002"]
    assert go_on(workers, run) == stopped[1]
    (event,) = events(run / "run", "resume")
    assert event["step"] == 2 and event["lost_steps"] == 1 and str(run / "disk0") in event["folder"]


def test_a_lost_node_comes_back_with_an_empty_disk_and_gets_what_it_needs(workers, stopped, run):
    shutil.rmtree(run / "disk1")
    assert go_on(workers, run) == stopped[1]
    assert events(run / "run", "resume")[0]["step"] == 2


@pytest.mark.parametrize("lost", ["disk0", "disk1"])
def test_the_node_that_is_left_goes_on_alone_in_another_layout(workers, stopped, run, lost):
    shutil.rmtree(run / lost)
    left = "disk1" if lost == "disk0" else "disk0"
    metrics = go_on(workers, run, ranks=2, disks=[left], overrides=["parallel.tp=1", "parallel.pp=2"])
    for found, expected in zip(metrics, stopped[1], strict=True):
        assert found == pytest.approx(expected, rel=2e-6)
    assert events(run / "run", "resume")[0]["step"] == 2
    assert "there is one node" in (run / "run/logs/rank_00000.log").read_text()


def test_a_damaged_file_is_taken_from_the_other_node(workers, stopped, run):
    damage(next((run / "disk0").glob("*/node_*/step_00000002/rank_00000.safetensors")))
    assert go_on(workers, run) == stopped[1]
    assert events(run / "run", "resume")[0]["step"] == 2
    assert "rank_00000.safetensors, bytes" in (run / "run/logs/rank_00000.log").read_text()


def test_where_both_copies_of_a_file_are_damaged_the_checkpoint_before_is_used(workers, stopped, run):
    for file in run.glob("disk?/*/node_*/step_00000002/rank_00003.safetensors"):
        damage(file)
    assert go_on(workers, run) == stopped[1]
    assert events(run / "run", "resume")[0]["step"] == 1
    assert "rank_00003.safetensors is damaged" in (run / "run/logs/rank_00000.log").read_text()


def train_while_an_index_vanishes(rank, ranks, recipe, overrides, disks):
    """Step 2's, after the disks were looked through."""
    find = node_folders.folders_of

    def found_once(root, key):
        folders = find(root, key)
        for folder in folders if key.step == 2 else ():
            (folder / "index.json").unlink(missing_ok=True)
        return folders

    with mock.patch.object(node_folders, "folders_of", found_once):
        return train_on_nodes(rank, ranks, recipe, overrides, disks)


def test_where_an_index_cannot_be_read_any_more_the_checkpoint_before_is_used(workers, stopped, run):
    disks = [run / "disk0", run / "disk1"]
    metrics = workers.run(4, train_while_an_index_vanishes, run / "recipe.toml", LOCAL, disks)[0]
    assert numbers(metrics) == stopped[1]
    assert events(run / "run", "resume")[0]["step"] == 1


def test_a_newer_checkpoint_of_the_run_directory_is_preferred(workers, stopped, run):
    assert go_on(workers, run, overrides=["run.stop_after=1"])[-1] == stopped[1][2]
    assert go_on(workers, run) == stopped[1]
    assert [event["step"] for event in events(run / "run", "resume")] == [2, 3]


def test_where_the_run_directory_has_only_a_damaged_one_the_disks_are_used(workers, stopped, run):
    go_on(workers, run, overrides=["run.stop_after=1"])
    damage(run / "run/checkpoints/step_00000003/rank_00000.safetensors")
    assert go_on(workers, run, overrides=["checkpoint.async=true", "checkpoint.every=3"]) == stopped[1]
    assert [event["step"] for event in events(run / "run", "resume")] == [2, 2]
    assert len(events(run / "run", "checkpoint_passed_over")) == 1


def test_what_another_run_of_the_same_name_left_is_not_loaded(workers, stopped, run):
    shutil.rmtree(run / "run")
    assert go_on(workers, run) == stopped[1]
    assert not events(run / "run", "resume")


def test_a_disk_that_was_away_while_its_steps_were_made_anew_is_not_loaded(workers, stopped, run):
    disks = [(run / name, run / f"{name}-away") for name in ("disk0", "disk1")]
    for disk, away in disks:
        disk.rename(away)
    go_on(workers, run, overrides=["run.stop_after=1"])
    for disk, away in disks:
        shutil.rmtree(disk)
        away.rename(disk)
    assert go_on(workers, run) == stopped[1]
    assert [event["step"] for event in events(run / "run", "resume")] == [1]


def test_one_folder_that_all_nodes_see_is_noticed_and_works(workers, stopped, run):
    for name in ("run", "disk0", "disk1"):
        shutil.rmtree(run / name)
    go_on(workers, run, disks=["disk0", "disk0"], overrides=["run.stop_after=3"])
    shutil.rmtree(run / "run/checkpoints")
    assert go_on(workers, run, disks=["disk0", "disk0"]) == stopped[1]
    assert events(run / "run", "resume")[0]["step"] == 2
    assert "all nodes see that folder" in (run / "run/logs/rank_00000.log").read_text()


def test_training_goes_on_where_a_local_checkpoint_cannot_be_written(workers, stopped, run):
    next((run / "disk1").glob("*/node_00001")).joinpath("partial_step_00000003").touch()
    assert go_on(workers, run) == stopped[1]
    (event,) = events(run / "run", "local_checkpoint_failed")
    assert event["step"] == 3 and "rank 2" in event["reason"] and "partial_step_00000003" in event["reason"]
    assert steps_on(run / "disk0") == ["step_00000001", "step_00000002"]


def moves_while_saving(rank, ranks, recipe, overrides, disks):
    """Bytes that this rank's watchdog hears of as written, and how often of a piece that was sent or received."""
    heard: list[tuple[int, ...]] = []
    save = LocalTier.save

    def watched(self, *arguments):
        with mock.patch.object(self.mesh.spans, "move", lambda *written: heard.append(written)):
            return save(self, *arguments)

    with mock.patch.object(LocalTier, "save", watched), mock.patch.object(file_exchange, "PIECE_BYTES", 1 << 16):
        train_on_nodes(rank, ranks, recipe, overrides, disks)
    return sum(map(sum, heard)), heard.count(())


def test_a_watchdog_sees_that_a_long_local_save_goes_on(workers, tmp_path):
    recipe = write_recipe(tmp_path, model=dict(num_hidden_layers=2), train=dict(steps=2))
    found = workers.run(2, moves_while_saving, recipe, LOCAL, [tmp_path / "disk0", tmp_path / "disk1"])
    sizes = [file.stat().st_size for file in sorted((tmp_path / "disk0").glob("*/node_*/step_00000001/rank_*"))]
    for (written, pieces), size in zip(found, sizes, strict=True):
        assert 0.9 * size < written < size and pieces >= max(sizes) >> 16


def test_a_folder_that_a_node_cannot_write_is_refused_by_all(workers, stopped, run):
    shutil.rmtree(run / "disk1")
    (run / "disk1").touch()
    with pytest.raises(AssertionError, match=r"ConfigError.*checkpoint\.local_dir \$TEST_DISK cannot be used"):
        go_on(workers, run)
    (run / "disk1").unlink()


def test_a_start_from_scratch_is_refused(workers, stopped, run):
    with pytest.raises(AssertionError, match=r'checkpoint\.load = "" starts from the beginning'):
        go_on(workers, run, overrides=["checkpoint.load="])


def test_what_the_next_start_does_is_said_of_local_checkpoints_too(run):
    directory = RunDirectory(run / "run", is_writer=False)
    assert "has no checkpoint yet" in next_start(directory)
    (directory.local,) = (run / "disk1").glob("*/node_00001")
    assert next_start(directory).endswith(f"to resume from {directory.local / 'step_00000002'}")
    (directory.checkpoints / "step_00000003").mkdir(parents=True)
    (directory.checkpoints / "step_00000003/index.json").touch()
    assert next_start(directory).endswith(f"to resume from {directory.checkpoints / 'step_00000003'}")


@pytest.mark.parametrize(
    ("nodes", "peers"),
    [("aabb", [2, 3, 0, 1]), ("aabbc", [2, 3, 4, 4, 0]), ("abab", [1, 0, 3, 2]), ("a", [0])],
    ids=["two of two ranks", "the last of one", "ranks by turns", "one"],
)
def test_each_rank_has_a_peer_on_the_next_node(nodes, peers):
    assert [Nodes.named(nodes).peer(rank) for rank in range(len(nodes))] == peers


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
