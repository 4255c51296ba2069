"""Which checkpoints of a run stay."""

import logging
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from megagap.checkpoint import Retention, save_checkpoint
from megagap.config import load_recipe
from megagap.errors import ConfigError
from megagap.parallel.shard import Slice, whole
from megagap.training import trainer
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def save_step(checkpoints: Path, step: int, **state: object) -> Path:
    folder = checkpoints / f"step_{step:08}"
    save_checkpoint(folder, [Slice("weight", whole("w", (2,)), 0, 2, torch.zeros(2))], {"step": step, **state})
    return folder


def steps(checkpoints: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))


def test_the_newest_stay_and_with_keep_0_all(tmp_path: Path) -> None:
    for step in (1, 2, 4, 30):
        save_step(tmp_path, step)
    Retention(tmp_path, 0).apply()
    assert steps(tmp_path) == [1, 2, 4, 30]
    Retention(tmp_path, 2).apply()
    assert steps(tmp_path) == [4, 30]


def test_what_latest_names_and_what_is_ahead_of_it_stays_and_is_not_counted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        save_step(tmp_path, step)
    (tmp_path / "latest").write_text("step_00000004\n")
    Retention(tmp_path, 2).apply()
    assert steps(tmp_path) == [3, 4, 5, 6]


def test_multiples_and_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: float(6), 6: 3.5, 7: None, 8: 9.0}
    for step, loss in losses.items():
        save_step(tmp_path, step, **({} if loss is None else {"validation_loss": loss}))
    Retention(tmp_path, keep=1, keep_every=4, keep_best=2).apply()
    assert steps(tmp_path) == [2, 4, 6, 8]
    # After a restart, too, and when a better one comes.
    save_step(tmp_path, 9, validation_loss=1.0)
    save_step(tmp_path, 10, validation_loss=2.0)
    Retention(tmp_path, keep=1, keep_every=4, keep_best=2).apply()
    assert steps(tmp_path) == [4, 8, 9, 10]


def test_a_checkpoint_written_again_counts_with_its_new_loss(tmp_path: Path) -> None:
    retention = Retention(tmp_path, keep=1, keep_best=1)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save_step(tmp_path, step, validation_loss=loss)
    retention.apply()
    assert steps(tmp_path) == [1, 3]
    retention.written(save_step(tmp_path, 1, validation_loss=9.0))
    for step in (2, 3, 4):
        retention.written(save_step(tmp_path, step, validation_loss=float(step)))
    retention.apply()
    assert steps(tmp_path) == [2, 4]


def test_a_deletion_that_fails_is_survived_told_once_and_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for step in (1, 2):
        save_step(tmp_path, step)
    retention, rmtree = Retention(tmp_path, 1), shutil.rmtree

    def fails(path: Path, *rest: object, **options: object) -> None:
        if "removed" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, *rest, **options)

    monkeypatch.setattr(shutil, "rmtree", fails)
    retention.apply()
    save_step(tmp_path, 3)  # in spite of the leftover
    retention.apply()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"cannot remove the old checkpoint {tmp_path / f'step_{step:08}'}" for step in (1, 2)
    ]
    assert steps(tmp_path) == [3]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    retention.apply()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["checkpoint.keep_every=4"], "checkpoint.keep_every = 4 +has no effect without checkpoint.keep"),
        (["checkpoint.keep=1", "checkpoint.every=3", "checkpoint.keep_every=4"], "must be a multiple"),
        (["checkpoint.keep=1", "checkpoint.keep_best=1"], "needs validation losses: set train.evaluate_every"),
        (
            ["checkpoint.keep=1", "checkpoint.keep_best=1", "checkpoint.every=3", "train.evaluate_every=4"],
            "first meet at step 12",
        ),
    ],
)
def test_settings_that_would_keep_nothing_are_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write_recipe(tmp_path), changes)


def test_a_run_keeps_the_checkpoint_of_its_lowest_validation_loss_over_a_restart(workers, tmp_path: Path) -> None:
    # The rate rises until it is so high that the loss does, too.
    recipe = write_recipe(
        tmp_path,
        train=dict(steps=8, evaluate_every=1),
        optim=dict(lr=0.15, warmup_steps=8, schedule="constant"),
        checkpoint=dict(every=1, keep=1, keep_best=1),
    )
    workers.run(1, train_recipe, recipe, ["run.stop_after=5"])
    (metrics,) = workers.run(1, train_recipe, recipe, [])
    best = min(metrics, key=lambda record: record["validation_loss"])["step"]
    assert best <= 5
    assert steps(tmp_path / "run/checkpoints") == [best, 8]


def train_while_a_removal_waits_for_a_later_step(rank, ranks, recipe):
    has_gone_on, removals, apply, step = threading.Event(), [], Retention.apply, trainer.train_step

    def waiting(retention):
        removals.append(has_gone_on.wait(60))
        apply(retention)

    def observed(state, *rest):
        result = step(state, *rest)
        if state.step == 7:  # the checkpoint of step 4 is the newest, and 6 the step after which the one before goes
            has_gone_on.set()
        return result

    with mock.patch.object(Retention, "apply", waiting), mock.patch.object(trainer, "train_step", observed):
        train_recipe(rank, ranks, recipe, [])
    return removals


def test_training_goes_on_while_old_checkpoints_are_removed(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=8), checkpoint=dict(every=4, keep=1))
    assert workers.run(1, train_while_a_removal_waits_for_a_later_step, recipe) == [[True, True]]
    assert steps(tmp_path / "run/checkpoints") == [8]
