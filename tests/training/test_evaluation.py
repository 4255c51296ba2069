"""When a run evaluates, and what a stop during an evaluation does."""

import json
import time
from unittest.mock import patch

import pytest

from megagap.config import load_recipe, timeline_of
from megagap.errors import ConfigError
from megagap.observe.metrics import read_metrics
from megagap.training import evaluate as evaluation
from megagap.training import trainer
from tests.recipes import write_recipe
from tests.training_run import train_recipe

FIRST = {"evaluate_first": True, "evaluate_samples": 5, "steps": 3}


def training_numbers(metrics):
    return [(m["loss"], m["grad_norm"]) for m in metrics if m["step"]]


def test_an_evaluation_before_the_first_step_is_step_0_and_changes_nothing_of_training(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=FIRST | {"evaluate_every": 3, "precision": "bf16-mixed"})
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    first = metrics[0]
    assert first.keys() == {"step", "consumed_samples", "consumed_tokens", "validation_loss"} | {
        f"validation_loss/{name}" for name in ("fr", "en")
    }
    assert first["consumed_samples"] == 0 and 6 < first["validation_loss"] < 6.5  # log(509)
    assert "validation at step 0 | fr 6." in (tmp_path / "run/logs/rank_00000.log").read_text()
    (without,) = workers.run(1, train_recipe, recipe, ["train.evaluate_first=false", f"run.dir={tmp_path / 'without'}"])
    assert [m["step"] for m in without] == [1, 2, 3]
    assert training_numbers(without) == training_numbers(metrics)
    assert without[-1]["validation_loss"] == metrics[-1]["validation_loss"]


def test_it_is_made_without_later_evaluations_too_and_by_all_layouts_alike(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=FIRST)
    (one,) = workers.run(1, train_recipe, recipe, [f"run.dir={tmp_path / 'one'}"])
    assert ["validation_loss" in m for m in one] == [True, False, False, False]
    four = workers.run(4, train_recipe, recipe, ["parallel.tp=2", "parallel.pp=2"])[0]
    assert four[0]["validation_loss"] == pytest.approx(one[0]["validation_loss"], rel=1e-5)


def test_a_run_that_resumes_does_not_evaluate_first_and_one_that_starts_over_does_so_once(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=FIRST)
    workers.run(1, train_recipe, recipe, ["run.stop_after=1"])
    (resumed,) = workers.run(1, train_recipe, recipe, ["run.stop_after=1"])
    assert [m["step"] for m in resumed] == [0, 1, 2]
    for folder in (tmp_path / "run/checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)
    (again,) = workers.run(1, train_recipe, recipe, [])
    assert [m["step"] for m in again] == [0, 1, 2, 3]

    weights = [f"checkpoint.load={tmp_path / 'run'}", "checkpoint.load_mode=model", f"run.dir={tmp_path / 'new'}"]
    (new,) = workers.run(1, train_recipe, recipe, [*weights, "train.steps=2"])
    assert new[0]["step"] == 0 and new[0]["validation_loss"] < again[0]["validation_loss"]


def test_it_needs_held_out_data(tmp_path):
    recipe = write_recipe(tmp_path, train=FIRST, data={"split": "100,0,0"})
    with pytest.raises(ConfigError, match=r"train\.evaluate_first = .* needs a held-out set"):
        load_recipe(recipe)


@pytest.mark.parametrize(("ranks", "layout"), [(1, []), (2, ["parallel.pp=2"])], ids=["one", "pp2"])
def test_looking_for_a_stop_meanwhile_does_not_change_the_losses(workers, tmp_path, ranks, layout):
    recipe = write_recipe(tmp_path, train={"steps": 2, "evaluate_every": 1, "evaluate_samples": 23})
    losses = []
    for microbatches in (1, 5, 1000):
        settings = [*layout, f"run.dir={tmp_path / str(microbatches)}"]
        metrics = workers.run(ranks, train_with_pauses, recipe, settings, microbatches)[0]
        losses.append([{key: m[key] for key in m if "loss" in key} for m in metrics])
    assert losses[0] == losses[1] == losses[2]


def train_with_pauses(rank, ranks, recipe, overrides, microbatches):
    with patch.object(evaluation, "MICROBATCHES_PER_STAGE", microbatches):
        return train_recipe(rank, ranks, recipe, overrides)


def train_with_stop_in_evaluation(rank, ranks, recipe, overrides):
    """Rank 1 is asked to stop once the first evaluation has begun; how many parts of it this rank computed."""
    execute, parts = evaluation.execute, []
    poll = trainer.Requests.poll

    def counting(*arguments):
        parts.append(1)
        return execute(*arguments)

    def stopping(self):
        if parts and rank == ranks - 1:
            self.reason = "SIGTERM"
        return poll(self)

    with patch.object(evaluation, "execute", counting), patch.object(trainer.Requests, "poll", stopping):
        train_recipe(rank, ranks, recipe, overrides)
    return len(parts)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_during_an_evaluation_is_answered_soon_and_leaves_no_partial_numbers(workers, tmp_path, ranks):
    train = {"steps": 9, "evaluate_every": 2, "evaluate_samples": 200}
    recipe = write_recipe(tmp_path, train=train, data={"split": "50,50,0"}, checkpoint={"every": 4})
    whole = workers.run(ranks, train_recipe, recipe, [f"run.dir={tmp_path / 'whole'}"])[0]
    parts = workers.run(ranks, train_with_stop_in_evaluation, recipe, [])
    assert parts == [1] * ranks
    status = json.loads((tmp_path / "run/status.json").read_text())
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert status["state"] == "preempted" and status["step"] == 2
    assert [m["step"] for m in metrics] == [1, 2] and not any("validation_loss" in m for m in metrics)
    assert "the evaluation at step 2 was stopped" in (tmp_path / "run/logs/rank_00000.log").read_text()
    resumed = workers.run(ranks, train_recipe, recipe, [])[0]
    assert training_numbers(resumed) == training_numbers(whole)


def test_a_stop_during_the_evaluation_before_the_first_step_says_that_there_is_no_checkpoint(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=FIRST | {"evaluate_samples": 200}, data={"split": "50,50,0"})
    assert workers.run(1, train_with_stop_in_evaluation, recipe, []) == [1]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and status["step"] == 0
    assert "stopped by SIGTERM before the first step; the run has no checkpoint yet" in status["message"]
    assert read_metrics(tmp_path / "run/metrics.jsonl") == []


def test_a_stopped_evaluation_is_no_time_of_a_step(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 2, "evaluate_every": 1, "evaluate_samples": 2})
    (seconds,) = workers.run(1, pause_through_an_exception, recipe)
    assert seconds < 5


def pause_through_an_exception(rank, ranks, recipe):
    from tests.training_run import Path, RunDirectory, make_mesh, torch
    from tests.training_run import Process as Place

    settings = load_recipe(recipe)
    mesh = make_mesh(settings, Place(0, 1, 0, 1), torch.device("cpu"))
    recorder = trainer.Recorder(
        settings, timeline_of(settings), mesh, RunDirectory(Path(settings.run.dir), is_writer=False), 0
    )
    before = recorder.last_end
    try:
        with recorder.pause():
            time.sleep(0.01)
            raise evaluation.EvaluationStoppedError
    except evaluation.EvaluationStoppedError:
        return 0 if recorder.last_end - before >= 0.01 else 9


def test_stop_after_makes_so_many_steps_a_start_and_leaves_the_schedule_alone(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 7})
    whole = workers.run(2, train_recipe, recipe, [f"run.dir={tmp_path / 'whole'}"])[0]
    ends = []
    for _ in range(3):
        metrics = workers.run(2, train_recipe, recipe, ["run.stop_after=3"])[0]
        status = json.loads((tmp_path / "run/status.json").read_text())
        ends.append((status["state"], status["step"], len(metrics)))
        if status["state"] == "preempted":
            assert "stopped by run.stop_after after step" in status["message"]
            assert (tmp_path / f"run/checkpoints/step_{status['step']:08}").exists()
    assert ends == [("preempted", 3, 3), ("preempted", 6, 6), ("finished", 7, 7)]
    assert training_numbers(metrics) == training_numbers(whole)
    assert [m["lr"] for m in metrics] == [m["lr"] for m in whole]


def test_stop_after_a_step_that_is_evaluated_evaluates_it(workers, tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 5, "evaluate_every": 2, "evaluate_samples": 2})
    for _ in range(3):
        metrics = workers.run(2, train_recipe, recipe, ["run.stop_after=2"])[0]
    assert [m["step"] for m in metrics if "validation_loss" in m] == [2, 4, 5]


def test_stop_after_the_last_step_finishes_the_run(workers, tmp_path):
    workers.run(1, train_recipe, write_recipe(tmp_path, train={"steps": 2}), ["run.stop_after=2"])
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 3, 4, 5]), (100, [0, 3, 5])])
def test_tensorboard_gets_every_step_or_those_of_its_setting(workers, tmp_path, every, steps):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train = {"steps": 5, "evaluate_first": True, "evaluate_every": 3, "evaluate_samples": 2}
    run = {"tensorboard": True} | ({"tensorboard_every": every} if every > 1 else {})
    recipe = write_recipe(tmp_path, train=train, run=run, model={"num_hidden_layers": 1})
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert sorted({e.step for name in ("loss", "validation_loss") for e in events.Scalars(name)}) == steps
    for e in events.Scalars("loss"):
        assert e.value == pytest.approx(metrics[e.step]["loss"], rel=1e-6)
