"""Branching off a run at a constant learning rate: cooldowns, and starts with weights and data but another schedule."""

import json

import pytest

from megagap.checkpoint import Index
from tests.recipes import write_recipe
from tests.training.test_phases import numbers
from tests.training_run import train_recipe

LR = 3e-3
BRANCHED_AT = 4
STEPS = 8


@pytest.fixture(scope="module")
def trunk(workers, tmp_path_factory):
    """A recipe at a constant rate, its metrics, and the settings that load the checkpoint after :data:`BRANCHED_AT`."""
    folder = tmp_path_factory.mktemp("trunk")
    optim = dict(lr=LR, schedule="constant", warmup_steps=2)
    recipe = write_recipe(folder, train=dict(steps=STEPS), optim=optim, checkpoint=dict(every=1))
    (metrics,) = workers.run(1, train_recipe, recipe, [f"run.dir={folder / 'trunk'}"])
    return recipe, metrics, f"checkpoint.load={folder / f'trunk/checkpoints/step_{BRANCHED_AT:08}'}"


def branch(workers, trunk, run, mode, *overrides, ranks=1):
    """Train a branch; its metrics."""
    recipe, _, load = trunk
    settings = [load, f"checkpoint.load_mode={mode}", f"run.dir={run}", f"train.steps={STEPS}", *overrides]
    return workers.run(ranks, train_recipe, recipe, settings)[0]


COOLDOWN = ("optim.schedule=linear", "optim.warmup_steps=0")


def test_the_first_step_of_a_cooldown_has_its_rate_and_the_trunks_weights_and_data(trunk, workers, tmp_path):
    metrics = branch(workers, trunk, tmp_path, "cooldown", *COOLDOWN)
    assert [m["lr"] for m in metrics] == pytest.approx([LR * (1 - i / 4) for i in (1, 2, 3, 4)])
    trunk_next = trunk[1][BRANCHED_AT]
    for key in ("step", "loss", "grad_norm", "consumed_samples", "consumed_tokens"):
        assert metrics[0][key] == trunk_next[key], key
    assert metrics[1]["loss"] != trunk[1][BRANCHED_AT + 1]["loss"]


def test_a_cooldown_with_the_trunks_rate_is_the_trunk(trunk, workers, tmp_path):
    """Moments and counts of updates are taken over: as long as the rate is the same, so is every number."""
    metrics = branch(workers, trunk, tmp_path, "cooldown", *COOLDOWN, "optim.schedule=wsd", "optim.cooldown_steps=2")
    rates = [LR, LR, LR / 2, 0]
    assert [m["lr"] for m in metrics] == pytest.approx(rates)
    assert numbers(metrics[:2]) == numbers(trunk[1][BRANCHED_AT : BRANCHED_AT + 2])
    assert metrics[2]["loss"] == trunk[1][BRANCHED_AT + 2]["loss"]


@pytest.mark.parametrize("overrides", [[], ["parallel.tp=2"]], ids=["one process", "tp2"])
def test_a_branch_that_was_stopped_resumes_with_its_own_schedule(trunk, workers, tmp_path, overrides):
    ranks = 1 + len(overrides)
    whole = branch(workers, trunk, tmp_path / "whole", "cooldown", *COOLDOWN, *overrides, ranks=ranks)
    stopped = branch(
        workers, trunk, tmp_path / "cut", "cooldown", *COOLDOWN, *overrides, "run.stop_after=1", ranks=ranks
    )
    assert len(stopped) == 1
    resumed = branch(workers, trunk, tmp_path / "cut", "cooldown", *COOLDOWN, *overrides, ranks=ranks)
    assert numbers(resumed) == numbers(whole)


def test_going_on_with_a_branch_elsewhere_keeps_its_schedule(trunk, workers, tmp_path):
    whole = branch(workers, trunk, tmp_path / "whole", "cooldown", *COOLDOWN, "checkpoint.every=1")
    recipe = trunk[0]
    load = f"checkpoint.load={tmp_path}/whole/checkpoints/step_00000006"
    settings = [load, f"run.dir={tmp_path / 'elsewhere'}", f"train.steps={STEPS}", *COOLDOWN]
    assert numbers(workers.run(1, train_recipe, recipe, settings)[0]) == numbers(whole[2:])
    state = Index.read(tmp_path / "elsewhere/checkpoints/step_00000008").state
    assert (state["step"], state["updates"], state["schedule_origin"]) == (8, 8, BRANCHED_AT)


def test_weights_and_data_start_a_schedule_with_its_warmup_and_without_moments(trunk, workers, tmp_path):
    metrics = branch(workers, trunk, tmp_path, "model+data")
    assert [m["lr"] for m in metrics] == pytest.approx([LR / 2, LR, LR, LR])
    assert metrics[0]["loss"] == trunk[1][BRANCHED_AT]["loss"]
    assert Index.read(tmp_path / "checkpoints/step_00000008").state["updates"] == 4
    with_moments = branch(workers, trunk, tmp_path / "moments", "model+optimizer+data")
    assert metrics[0]["grad_norm"] == with_moments[0]["grad_norm"]
    assert metrics[1]["loss"] != with_moments[1]["loss"]
    assert Index.read(tmp_path / "moments/checkpoints/step_00000008").state["updates"] == 8


def test_moments_taken_over_go_on_as_the_trunks(trunk, workers, tmp_path):
    metrics = branch(workers, trunk, tmp_path, "model+optimizer+data", "optim.warmup_steps=0")
    assert numbers(metrics) == numbers(trunk[1][BRANCHED_AT:])


def test_the_log_says_what_a_branch_takes_and_events_record_it(trunk, workers, tmp_path):
    branch(workers, trunk, tmp_path, "cooldown", *COOLDOWN)
    log = (tmp_path / "logs/rank_00000.log").read_text()
    assert "with weights and optimizer state of" in log
    assert 'and a learning-rate schedule that starts anew (load_mode "cooldown")' in log
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert resumed["mode"] == "cooldown" and resumed["lost_steps"] == 0


@pytest.mark.parametrize(("steps", "warmup"), [(BRANCHED_AT, 0), (2, 0), (BRANCHED_AT + 1, 2)])
def test_a_branch_without_room_for_its_schedule_is_refused_with_the_number_to_set(
    trunk, workers, tmp_path, steps, warmup
):
    with pytest.raises(AssertionError) as error:
        settings = [f"train.steps={steps}", f"optim.warmup_steps={warmup}"]
        branch(workers, trunk, tmp_path, "model+optimizer+data", *settings)
    assert f"set it to {BRANCHED_AT} and the steps of the branch: at least {BRANCHED_AT + max(1, warmup)}" in str(
        error.value
    )


def test_another_past_is_refused_for_a_branch_too(trunk, workers, tmp_path):
    with pytest.raises(AssertionError, match=r"train\.seed"):
        branch(workers, trunk, tmp_path, "model+data", "train.seed=8")
