"""A run whose updates are skipped keeps its last good checkpoint and ends as failed."""

import json

import pytest
import torch

from megagap.checkpoint import find_latest
from megagap.errors import DivergedError
from megagap.observe.metrics import read_metrics
from megagap.training import evaluations, guard, trainer
from tests.launching import finish, launch, wait_until
from tests.recipes import write_recipe
from tests.training_run import train_recipe

RUINOUS = ["optim.lr=1e30", "optim.schedule=constant", "optim.warmup_steps=0"]


def train_with_skipped(rank, ranks, recipe, overrides, skipped):
    """Train, with the updates of the steps ``skipped`` refused; the end as (kind, message)."""
    accept, step = guard.accept_update, trainer.train_step

    def refusing_step(state, batch, poll):
        refused = state.step + 1 in skipped
        guard.accept_update = lambda loss, norm: accept(loss, norm) & torch.tensor(not refused)
        try:
            return step(state, batch, poll)
        finally:
            guard.accept_update = accept

    trainer.train_step = refusing_step
    try:
        train_recipe(rank, ranks, recipe, overrides)
    except DivergedError as error:
        return "failed", str(error)
    finally:
        trainer.train_step = step
    return "done", ""


def folders(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def events(run, name):
    records = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == name]


@pytest.fixture
def recipe(tmp_path):
    checkpoint, train = {"every": 3, "keep": 1}, {"steps": 30, "evaluate_every": 4, "evaluate_samples": 2}
    return write_recipe(tmp_path, checkpoint=checkpoint, train=train, model={"num_hidden_layers": 2})


@pytest.mark.parametrize(
    ("skipped", "left", "end"),
    [
        (range(4, 40), 3, "failed"),  # a long row
        (range(1, 40), None, "failed"),  # from the first step on
        (range(29, 40), 27, "failed"),  # fewer are left than it takes to give a run up
        ([30], 27, "failed"),  # the last step only
        ([3, 6, 9, 30], 27, "failed"),
        ([3, 4, 6, 9, 12], 30, "done"),  # a row that ends is no divergence
        (range(2, 31, 2), 27, "failed"),  # every other step, the last among them
        (range(1, 31, 2), 30, "done"),  # every other step, but not the last
        (range(5, 25), 30, "done"),  # as many in a row as are allowed
        (range(5, 26), 3, "failed"),
    ],
    ids=str,
)
def test_no_checkpoint_is_written_or_removed_while_updates_are_skipped(workers, tmp_path, recipe, skipped, left, end):
    ((kind, message),) = workers.run(1, train_with_skipped, recipe, [], set(skipped))
    run = tmp_path / "run"
    assert kind == end
    assert folders(run) == ([f"step_{left:08}"] if left else [])
    if left:
        assert find_latest(run / "checkpoints").name == f"step_{left:08}"
    if end == "failed":
        where = f"The last good checkpoint is {run / 'checkpoints' / f'step_{left:08}'}" if left else "no checkpoint"
        assert where in message and "the same command" in message and "--train.skip_samples" in message
    written = [event["folder"] for event in events(run, "checkpoint")]
    assert not {f"step_{step:08}" for step in skipped} & set(written)


def test_a_checkpoint_that_was_due_in_a_row_of_skipped_steps_is_written_after_it(workers, tmp_path, recipe):
    workers.run(1, train_with_skipped, recipe, ["train.steps=8", "checkpoint.keep=0"], {3, 4})
    assert folders(tmp_path / "run") == ["step_00000005", "step_00000006", "step_00000008"]


def test_the_samples_of_the_skipped_steps_are_named_as_the_setting_that_leaves_them_out(workers, recipe):
    skip = 'train.skip_samples=["10:13"]'
    ((_, message),) = workers.run(1, train_with_skipped, recipe, [skip], set(range(5, 99)))
    # Steps 5 to 25 of 8 samples each, and step 4, whose update came before, are positions 24 to 199; 3 numbers are left
    # out before, and stay so.
    assert """'["10:13", "27:203"]'""" in message


@pytest.mark.parametrize(("precision", "lr"), [("fp32", 1e6), ("fp32", 1e20), ("bf16-mixed", 1e8)])
def test_weights_so_large_that_norms_hide_them_are_no_checkpoint_and_no_end(workers, tmp_path, recipe, precision, lr):
    layout = [f"train.precision={precision}", "optim.schedule=constant", "train.evaluate_every=0"]
    workers.run(1, train_with_skipped, recipe, [*layout, "train.steps=3"], set())
    ruinous = [f"optim.lr={lr}", "optim.warmup_steps=0"]
    for steps in (4, 30):
        ((kind, _),) = workers.run(1, train_with_skipped, recipe, [*layout, *ruinous, f"train.steps={steps}"], set())
        assert kind == "failed" and folders(tmp_path / "run") == ["step_00000003"]


@pytest.mark.parametrize("end", ["in the row", "at its first step"])
def test_the_samples_that_a_message_names_can_be_left_out(workers, tmp_path, recipe, end):
    skipped = range(4, 99) if end == "at its first step" else range(5, 99)
    ((_, message),) = workers.run(1, train_with_skipped, recipe, ["optim.schedule=constant"], set(skipped))
    setting = message.split("--train.skip_samples '")[1].split("'")[0]
    again = ["optim.schedule=constant", f"train.skip_samples={setting}"]
    assert workers.run(1, train_with_skipped, recipe, again, set()) == [("done", "")]


def test_a_run_whose_settings_were_mended_starts_a_new_count(workers, tmp_path, recipe):
    constant = ["optim.schedule=constant"]
    assert workers.run(1, train_with_skipped, recipe, constant, set(range(5, 99)))[0][0] == "failed"
    assert workers.run(1, train_with_skipped, recipe, constant, {8}) == [("done", "")]


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [({}, "fp32"), ({}, "bf16-mixed"), ({"tp": 2}, "bf16-mixed"), ({"pp": 2}, "fp32")],
    ids=str,
)
def test_a_diverged_run_ends_as_failed_on_every_rank(workers, tmp_path, parallel, precision):
    checkpoint, model = {"every": 2, "keep": 1}, {"num_hidden_layers": 2}
    recipe = write_recipe(tmp_path, checkpoint=checkpoint, model=model, parallel=parallel, train={"steps": 4})
    layout = [f"train.precision={precision}"]
    workers.run(2, train_with_skipped, recipe, [*layout, "optim.schedule=constant"], set())
    ends = workers.run(2, train_with_skipped, recipe, [*layout, *RUINOUS, "train.steps=90"], set())
    assert [kind for kind, _ in ends] == ["failed", "failed"] and len(set(ends)) == 1
    assert folders(tmp_path / "run") == ["step_00000004"]
    assert "step_00000004: the same command resumes from it" in ends[0][1]


def test_the_end_of_a_diverged_run_is_told_in_status_and_exit_code(tmp_path, recipe):
    code, output = finish(launch(recipe, 1, "--train.evaluate_every=0", *(f"--{s}" for s in RUINOUS)))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert code == 2 and status["state"] == "failed" and "training diverged" in status["message"]
    assert "training diverged" in output and "Traceback" not in output


def test_an_update_at_the_last_step_that_ruins_the_weights_does_not_finish_the_run(workers, tmp_path, recipe):
    workers.run(1, train_with_skipped, recipe, ["train.steps=3", "optim.schedule=constant"], set())
    overrides = [*RUINOUS, "train.steps=4", "train.evaluate_every=0"]
    ((kind, message),) = workers.run(1, train_with_skipped, recipe, overrides, set())
    assert kind == "failed" and "after step 4, the last one, the updated weights give a loss" in message
    assert folders(tmp_path / "run") == ["step_00000003"]
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["skipped"] is False


def test_a_validation_loss_that_is_not_finite_withholds_the_checkpoint(workers, tmp_path, recipe):
    ((kind, message),) = workers.run(1, train_with_nan_validation, recipe, ["train.steps=4"])
    assert kind == "failed" and "the validation loss of fr is not finite" in message
    assert folders(tmp_path / "run") == ["step_00000003"]


def train_with_nan_validation(rank, ranks, recipe, overrides):
    evaluate = evaluations.evaluate
    evaluations.evaluate = lambda *arguments: evaluate(*arguments) | {"fr": float("nan")}
    try:
        return train_with_skipped(rank, ranks, recipe, overrides, set())
    finally:
        evaluations.evaluate = evaluate


def test_older_checkpoints_stay_until_an_update_has_followed_the_newest(workers, tmp_path, recipe):
    ((_, message),) = workers.run(1, train_with_skipped, recipe, [], set(range(7, 40)))
    assert folders(tmp_path / "run") == ["step_00000003", "step_00000006"]
    assert "step_00000003: move step_00000006 out of" in message


def test_steps_skipped_in_a_row_are_counted_over_restarts(workers, tmp_path, recipe):
    # Each start makes steps 4 to 13 from the checkpoint at 3, skips all but two, and is stopped.
    workers.run(1, train_with_skipped, recipe, ["train.steps=3", "optim.schedule=constant"], set())
    ends: list[tuple[str, str]] = []
    for _ in range(3):
        ends += workers.run(1, train_until_stopped, recipe, {*range(6, 40)}, 10)
    assert [kind for kind, _ in ends] == ["done", "done", "failed"]
    assert "for 21 steps in a row (16 of them in earlier starts), up to step 10" in ends[2][1]
    assert folders(tmp_path / "run") == ["step_00000003"]


def train_until_stopped(rank, ranks, recipe, skipped, steps):
    return train_with_skipped(rank, ranks, recipe, ["optim.schedule=constant", f"run.stop_after={steps}"], skipped)


def test_a_stop_among_skipped_steps_says_from_where_the_next_start_resumes(workers, tmp_path, recipe):
    workers.run(1, train_until_stopped, recipe, set(range(5, 40)), 8)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and "no checkpoint was written there (the updates" in status["message"]
    assert f"resume from {tmp_path}/run/checkpoints/step_00000003" in status["message"]
    assert folders(tmp_path / "run") == ["step_00000003"]


def test_a_stop_among_skipped_steps_without_a_checkpoint_says_so(workers, tmp_path, recipe):
    workers.run(1, train_until_stopped, recipe, set(range(1, 40)), 4)
    message = json.loads((tmp_path / "run/status.json").read_text())["message"]
    assert message.endswith("the run has no checkpoint yet: the same command starts from the beginning")


def test_an_update_at_a_step_that_was_skipped_ends_the_count(workers, tmp_path, recipe):
    workers.run(1, train_until_stopped, recipe, set(range(5, 9)), 8)
    workers.run(1, train_until_stopped, recipe, set(), 12)  # from step 3: all well
    assert [event["step"] for event in events(tmp_path / "run", "updates_resumed")] == [5]
    ((kind, message),) = workers.run(1, train_with_skipped, recipe, ["optim.schedule=constant"], set(range(1, 99)))
    assert kind == "failed" and "earlier starts" not in message


def test_a_request_to_save_waits_for_the_end_of_a_row_of_skipped_steps(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 100_000}, model={"num_hidden_layers": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/SAVE").touch()
    process = launch(recipe, 1, *(f"--{setting}" for setting in RUINOUS))
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists(), process)
    code, _ = finish(process)
    assert code == 2 and (tmp_path / "run/SAVE").exists() and folders(tmp_path / "run") == []


def test_more_than_max_skipped_steps_in_a_row_end_the_run(workers, tmp_path, recipe):
    ((kind, message),) = workers.run(1, train_with_skipped, recipe, ["guard.max_skipped=2"], set(range(5, 40)))
    assert kind == "failed" and "for 3 steps in a row, up to step 7" in message
    assert f"The last good checkpoint is {tmp_path}/run/checkpoints/step_00000003" in message
