"""``megagap replay-step``: a step made again is bit-equal to what the run recorded, and one flipped bit is told."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megagap.errors import ConfigError, DataError
from megagap.observe.metrics import read_metrics
from megagap.observe.run_directory import RunDirectory
from megagap.process.rendezvous import Process
from megagap.replay import ReplayError, config_of, replay, settings_of_run
from megagap.training import step as training_step
from megagap.training.mesh import make_mesh
from tests.launching import SECONDS
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[1]
LAYOUTS = {1: [], 2: ["parallel.tp=2"], 4: ["parallel.pp=2", "optim.zero=2"]}


def run_again(rank, ranks, run, step):
    """As the command does; the report, and the message of its end."""
    settings = settings_of_run(run, step, ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    report = replay(settings, mesh, RunDirectory(run, is_writer=False), step)
    try:
        report.require_equal()
    except ReplayError as error:
        return report.as_dict(), str(error)
    return report.as_dict(), ""


def train_with_a_flip(rank, ranks, recipe, overrides, at):
    """At step ``at`` the last bit of one element of the last rank's reduced gradients is another."""
    compute = training_step.compute_gradients

    def computing(state, *rest, **others):
        work = compute(state, *rest, **others)
        if state.step == at and rank == ranks - 1:
            bucket = next(bucket for bucket in state.optimizer.store.buckets if bucket.is_owned)
            part = next(bucket.slices("gradient", bucket.own_gradient)).tensor
            part[:1].view(torch.int32)[0] ^= 1
        return work

    training_step.compute_gradients = computing
    try:
        train_recipe(rank, ranks, recipe, overrides)
    finally:
        training_step.compute_gradients = compute


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(
        tmp_path_factory.mktemp("replay"),
        model={"num_hidden_layers": 2},
        train={"steps": 6},
        checkpoint={"every": 3},
        guard={"spikes": "report", "window": 4, "hash_every": 1},
    )


@pytest.fixture(scope="module")
def made(recipe, workers, tmp_path_factory):
    """Runs, by the number of their processes."""
    folder = tmp_path_factory.mktemp("made")
    for ranks, layout in LAYOUTS.items():
        workers.run(ranks, train_recipe, recipe, [*layout, f"run.dir={folder / str(ranks)}"])
    return folder


@pytest.mark.parametrize("ranks", LAYOUTS)
@pytest.mark.parametrize(("step", "start"), [(2, None), (4, 3), (6, 3)])
def test_a_step_is_bit_equal_to_what_the_run_recorded(workers, made, ranks, step, start):
    run = made / str(ranks)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for report, message in workers.run(ranks, run_again, run, step):
        assert report["equal"] and report["notes"] == [] and message == ""
        assert report["start"] == (None if start is None else f"{run}/checkpoints/step_{start:08}")
        assert set(report["numbers"]) == {"loss", "grad_norm", "gradient_hash"}
    record = read_metrics(run / "metrics.jsonl")[step - 1]
    assert report["numbers"]["gradient_hash"]["replayed"] == record["gradient_hash"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "the run is left as it is"


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_one_flipped_bit_of_a_gradient_is_told(workers, recipe, tmp_path, ranks):
    workers.run(ranks, train_with_a_flip, recipe, [*LAYOUTS[ranks], f"run.dir={tmp_path}"], 5)
    (report, message), *_ = workers.run(ranks, run_again, tmp_path, 5)
    assert not report["equal"] and report["first_difference"] == 5
    assert not report["numbers"]["gradient_hash"]["equal"] and report["numbers"]["loss"]["equal"]
    assert f"step 5 of {tmp_path}, run again from {tmp_path}/checkpoints/step_00000003, is not what" in message
    (later, message), *_ = workers.run(ranks, run_again, tmp_path, 6)
    assert later["first_difference"] == 5 and "step 5, before step 6," in message
    (before, _), *_ = workers.run(ranks, run_again, tmp_path, 4)
    assert before["equal"]


def test_updates_that_the_run_skipped_are_skipped_again(workers, made, tmp_path):
    """A fault of the machine that was skipped does not make the steps after it differ."""
    run = tmp_path / "run"
    shutil.copytree(made / "1", run)
    shutil.rmtree(run / "checkpoints")
    workers.run(1, train_skipping, run, 2)
    (report, _), *_ = workers.run(1, run_again, run, 3)
    assert report["first_difference"] == 2, "the record of the fault itself"
    assert report["numbers"]["loss"]["equal"] and report["numbers"]["gradient_hash"]["equal"]


def train_skipping(rank, ranks, run, at):
    """Trains again from the start, with a NaN in one gradient of step ``at``."""
    compute = training_step.compute_gradients

    def computing(state, *rest, **others):
        work = compute(state, *rest, **others)
        if state.step == at:
            state.optimizer.store.buckets[0].own_gradient[0] = torch.nan
        return work

    training_step.compute_gradients = computing
    try:
        train_recipe(rank, ranks, run / "config.toml", [f"run.dir={run}"])
    finally:
        training_step.compute_gradients = compute


def test_without_a_hash_loss_and_norm_are_compared_and_that_is_said(workers, made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "1", run)
    records = read_metrics(run / "metrics.jsonl")
    lines = [json.dumps({k: v for k, v in record.items() if k != "gradient_hash"}) for record in records]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    done = command(run, "--step", "5")
    assert done.returncode == 0, done.stderr
    assert "bit-equal to the record" in done.stdout and "guard.hash_every" in done.stdout


def test_the_command_prints_json_and_ends_with_2_where_the_step_differs(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "1", run)
    records = read_metrics(run / "metrics.jsonl")
    records[4]["loss"] += 1e-7
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = command(run, "--step", "5", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 2 and not report["equal"] and report["numbers"]["grad_norm"]["equal"]
    assert done.stderr.startswith("replay differs: step 5 of") and "Traceback" not in done.stderr


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [python(), ROOT / "tools/replay_step.py", *arguments]
    return subprocess.run([str(part) for part in line], capture_output=True, text=True, timeout=SECONDS)


def test_a_step_that_was_not_recorded_is_refused(workers, made):
    (message,) = workers.run(1, refusal, made / "1", 7)
    assert "has no step 7" in message and "it has steps 1 to 6" in message


def refusal(rank, ranks, run, step):
    with pytest.raises(DataError) as caught:
        run_again(rank, ranks, run, step)
    return str(caught.value)


def test_another_number_of_processes_is_refused_with_the_command_that_fits(made):
    with pytest.raises(ConfigError, match=r"made by 2 processes, not by 1: .*\n.*torchrun --nproc-per-node 2"):
        settings_of_run(made / "2", 5, 1)
    with pytest.raises(ConfigError, match=r"is not a run: it has no config\.toml"):
        settings_of_run(made, 5, 1)


def test_the_settings_of_a_step_are_those_before_the_restart_that_changed_them(tmp_path):
    for name in ("config.toml", "config_before_step_00000004.toml", "config_before_step_00000010.toml"):
        (tmp_path / name).touch()
    found = [config_of(tmp_path, step).name for step in (1, 4, 5, 10, 11)]
    first, second = "config_before_step_00000004.toml", "config_before_step_00000010.toml"
    assert found == [first, first, second, second, "config.toml"]
