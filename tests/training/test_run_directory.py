"""The run directory belongs to all ranks of one run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megagap.errors import ConfigError, DataError, DistributedError
from megagap.observe import run_directory
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.process.launch import chosen_threads
from megagap.training import trainer
from megagap.training.stop_requests import Requests
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def open_directory(rank: int, ranks: int, recipe: Path, shared: bool) -> str:
    """The message of the refusal, or nothing. Not shared: every rank has a directory of its own."""
    folder = recipe.parent / ("run" if shared else f"run{rank}")
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    run = RunDirectory(folder, is_writer=rank == 0)
    run.open()
    try:
        with patch.object(run_directory, "LOCK_SECONDS", 0.5):
            run.require_shared(DistributedCommunicator(mesh))
    except DistributedError as error:
        return str(error)
    finally:
        run.close()
    return ""


def test_a_directory_that_all_ranks_see_is_accepted(workers, tmp_path):
    assert workers.run(2, open_directory, write_recipe(tmp_path), True) == ["", ""]


def test_a_directory_that_is_not_shared_is_refused_by_every_rank(workers, tmp_path):
    for answer in workers.run(2, open_directory, write_recipe(tmp_path), False):
        assert "is not shared" in answer


FILES = ["config.toml", "environment.json", "metrics.jsonl", "events.jsonl", "status.json", "lock"]
FILES += ["logs/rank_00000.log", "checkpoints/latest"]
FOLDERS = ["logs", "tensorboard", "checkpoints", "."]


def folder(path: Path) -> None:
    path.mkdir(parents=True)


def file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def dangling(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/nowhere-at-all/x")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in (folder, dangling)]
    + [(name, damage) for name in FOLDERS for damage in (file, dangling)],
)
def test_what_a_run_could_not_write_is_found_at_its_start(tmp_path, name, damage):
    damage(tmp_path / "run" / name)
    with pytest.raises(ConfigError) as error:
        RunDirectory(tmp_path / "run", is_writer=True).open(tensorboard=True)
    lines = str(error.value).splitlines()
    assert lines[0] == f"config error: run.dir {tmp_path}/run cannot be written"
    assert str(tmp_path / "run" / name) in lines[1] and len(lines) == 3


@pytest.mark.parametrize(
    ("files", "place", "told"),
    [
        (
            ["index.json"],
            "run/checkpoints/step_00000010",
            "is a checkpoint\n  go on with the run: --run.dir {}/run; or",
        ),
        (["index.json"], "average", "is a checkpoint\n  start a new run from it, .*: --checkpoint.load {}/average"),
        (["latest"], "run/checkpoints", "holds a run's checkpoints\n  go on with the run: --run.dir {}/run; or"),
        (["config.json", "model.safetensors"], "hf", "is a Hugging Face model\n.* from-hf --input {}/hf"),
    ],
    ids=str,
)
def test_no_run_is_made_in_what_holds_something_else(tmp_path, files, place, told):
    (tmp_path / place).mkdir(parents=True)
    for file in files:
        (tmp_path / place / file).touch()
    with pytest.raises(ConfigError, match=f"run.dir {tmp_path / place} {told.format(tmp_path)}"):
        RunDirectory(tmp_path / place, is_writer=True).open()
    assert sorted(path.name for path in (tmp_path / place).iterdir()) == sorted(files)


def test_a_start_that_is_refused_says_failed_where_it_can(tmp_path):
    folder(tmp_path / "run" / "metrics.jsonl")
    run = RunDirectory(tmp_path / "run", is_writer=True)
    with pytest.raises(ConfigError) as error:
        run.open()
    run.fail(str(error.value))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and "metrics.jsonl" in status["message"]


def test_a_failure_is_recorded_in_each_place_that_can_be_written(tmp_path):
    run = RunDirectory(tmp_path / "run", is_writer=True)
    run.open()
    folder(run.path / "events.jsonl")
    with pytest.raises(DataError, match=r"events\.jsonl"):
        run.fail("full")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    (run.path / "events.jsonl").rmdir()
    (run.path / "status.json").unlink()
    folder(run.path / "status.json/x")
    run.has_begun = True
    with pytest.raises(DataError, match=r"status\.json"):
        run.fail("full")
    assert json.loads((tmp_path / "run/events.jsonl").read_text())["message"] == "full"


def test_a_run_that_has_ended_is_not_called_failed_by_what_comes_after(tmp_path):
    run = RunDirectory(tmp_path / "run", is_writer=True)
    run.open()
    run.has_begun = True
    run.status("preempted", "stopped")
    run.fail("aborted")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "preempted"
    run.status("running")
    run.fail("aborted")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    run.close()


@pytest.mark.parametrize(
    ("status", "steps", "answer"),
    [
        ('{"state": "finished", "step": 4}', 4, True),
        ('{"state": "finished", "step": 4}', 5, False),
        ('{"state": "failed", "step": 4}', 4, False),
        ('{"state": "finished"}', 4, False),
        ("[]", 4, False),
        ("", 4, False),
    ],
)
def test_a_finished_run_that_cannot_be_written_needs_no_writing(tmp_path, monkeypatch, status, steps, answer):
    (tmp_path / "status.json").write_text(status)
    assert not RunDirectory(tmp_path, is_writer=True).is_archived(steps)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as root, everything can be written
    assert RunDirectory(tmp_path, is_writer=True).is_archived(steps) == answer


# A limit on the size of files ends writing as a full disk does, and needs no disk of its own.
LIMITED = """
import resource, sys
from megagap.errors import run_tool
from megagap.observe import logs, metrics, run_directory
from megagap.train import main
kind = sys.argv[1]
owner, name = {
    "metrics.jsonl": (metrics.MetricsFile, "write"),
    "tensorboard": (metrics.TensorBoard, "write"),
    "events.jsonl": (run_directory.RunDirectory, "event"),
    "rank_00000.log": (logs._LogFile, "emit"),
    "checkpoints": (sys.modules["megagap.training.keeper"], "save"),
}[kind]
original, calls = getattr(owner, name), []
def limited(*arguments, **named):
    calls.append(1)
    limit = 300 if len(calls) > 2 or kind == "checkpoints" else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        return original(*arguments, **named)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
setattr(owner, name, limited)
run_tool(lambda: main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", ["metrics.jsonl", "tensorboard", "events.jsonl", "rank_00000.log", "checkpoints"])
def test_a_disk_that_is_full_in_mid_run_ends_it_with_one_message(tmp_path, kind):
    recipe = write_recipe(tmp_path, run=dict(tensorboard=True, log_every=1), checkpoint=dict(every=1))
    done = subprocess.run([sys.executable, "-c", LIMITED, kind, recipe], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "Logging error" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if " error: " in line]
    assert kind in message
    assert "File too large" in done.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and kind in status["message"]


def ask_again(requests: Requests, times: int) -> list[bool]:
    answers = []
    for _ in range(times):
        answers.append(requests.poll()[1])
        if answers[-1]:
            requests.saved()
    return answers


@pytest.fixture
def requests(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return Requests(tmp_path / "SAVE")


@pytest.mark.parametrize("make", [file, folder, dangling])
def test_SAVE_is_answered_once_whatever_it_is(tmp_path, requests, make):
    make(tmp_path / "SAVE")
    assert ask_again(requests, 3) == [True, False, False]
    assert not os.path.lexists(tmp_path / "SAVE")


def test_a_SAVE_that_cannot_be_removed_is_answered_once_until_it_is_gone(tmp_path, requests, caplog):
    folder(tmp_path / "SAVE" / "x")
    assert ask_again(requests, 3) == [True, False, False]
    assert caplog.text.count(f"cannot remove {tmp_path}/SAVE") == 1
    shutil.rmtree(tmp_path / "SAVE")
    assert ask_again(requests, 1) == [False]
    file(tmp_path / "SAVE")
    assert ask_again(requests, 2) == [True, False]


@pytest.mark.parametrize(
    ("variables", "expected"), [({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "4,2"}, 4), ({}, None)]
)
def test_threads_are_the_users_choice_where_there_is_no_torchrun(monkeypatch, variables, expected):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert chosen_threads() == expected


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "2,x", "9" * 30])
def test_threads_that_are_no_number_are_refused(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(ConfigError, match=r"OMP_NUM_THREADS=.* must be a number of threads"):
        chosen_threads()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_directory_that_is_gone_ends_the_run_before_it_writes_into_another(tmp_path, how):
    run = RunDirectory(tmp_path / "run", is_writer=True)
    run.open()
    run.require_in_place()
    if how == "removed":
        shutil.rmtree(run.path)
    else:
        run.path.rename(tmp_path / "elsewhere")
    other = RunDirectory(tmp_path / "run", is_writer=True)
    if how == "replaced":
        other.open()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="run was removed, moved or replaced"):
        run.require_in_place()
    run.fail("gone")
    left = sorted(tmp_path.rglob("*"))
    assert [path for path in left if path != tmp_path / "elsewhere/lock"] == [
        path for path in before if path != tmp_path / "elsewhere/lock"
    ]
    assert (tmp_path / "run/lock").exists() == (how == "replaced")
    other.close()


def train_without_its_directory(rank, ranks, recipe):
    """Train, with the run directory removed in the second step; the message of the end."""
    step = trainer.train_step

    def removing_step(state, batch, poll):
        if state.step == 1:
            shutil.rmtree(recipe.parent / "run")
        return step(state, batch, poll)

    try:
        with patch.object(trainer, "train_step", removing_step):
            train_recipe(rank, ranks, recipe, [])
    except DataError as error:
        return str(error)
    return ""


def test_a_run_whose_directory_is_removed_does_not_finish_without_its_metrics(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 4}, checkpoint={"every": 3}, model={"num_hidden_layers": 1})
    (message,) = workers.run(1, train_without_its_directory, recipe)
    assert "run was removed, moved or replaced while" in message and not (tmp_path / "run/checkpoints").exists()


def begun(folder: Path, is_writer: bool) -> RunDirectory:
    run = RunDirectory(folder, is_writer)
    run.open()
    run.has_begun = True
    run.step = 7
    run.status("running")
    return run


def state_in(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["state"]


def test_the_failure_of_a_writer_that_was_killed_is_recorded_by_another_rank(tmp_path):
    begun(tmp_path, is_writer=True).close()  # as the system does for a process that is gone
    begun(tmp_path, is_writer=False).fail("rank 3 lost contact")
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "rank 3 lost contact"
    assert state_in(tmp_path) == "failed"
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["event"] == "failure" and event["step"] == 7
    begun(tmp_path, is_writer=True).close()  # nobody holds the lock


def test_a_writer_that_lives_records_its_failure_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "LOST_SECONDS", 0.1)
    writer = begun(tmp_path, is_writer=True)  # of this start, or of a restart
    begun(tmp_path, is_writer=False).fail("rank 3 lost contact")
    assert state_in(tmp_path) == "running"
    writer.status("finished")
    writer.close()
    begun(tmp_path, is_writer=False).fail("rank 3 lost contact")
    assert state_in(tmp_path) == "finished"
