"""Whether a stop can be answered in the time that launchers leave."""

import logging

import pytest

from megagap.training import stop_requests
from megagap.training.stop_requests import GRACE_SETTING, grace_seconds, warn_of_short_grace
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def warned(caplog, *arguments) -> str:
    caplog.clear()
    assert warn_of_short_grace(*arguments) == bool(caplog.text)
    return caplog.text


@pytest.fixture(autouse=True)
def no_setting(monkeypatch):
    monkeypatch.delenv(GRACE_SETTING, raising=False)
    monkeypatch.setattr(logging.getLogger("megagap"), "propagate", True)  # other tests may have set up logs


def test_a_save_that_fits_30_seconds_with_the_steps_before_it_is_fine(caplog):
    assert not warned(caplog, [5.0], 19.0, "cpu")
    assert not warned(caplog, [5.0], 9.0, "cuda")
    assert not warned(caplog, [1.0, 1.0, 100.0], 20.0, "cpu"), "the first step may be slow: the median counts"


def test_one_that_does_not_fit_is_warned_of_with_what_to_set(caplog):
    text = warned(caplog, [5.0, 5.0, 6.0], 21.0, "cpu")
    assert "up to 2 steps of 5.0 s and a save of 21.0 s take 31 s" in text and "killed after 30 s" in text
    for cure in ("--shutdown-timeout 50", f"{GRACE_SETTING}=50", "--signal=USR1@50", "run.max_minutes"):
        assert cure in text
    assert "up to 4 steps of 5.0 s" in warned(caplog, [5.0], 21.0, "cuda")


def test_before_any_step_nothing_is_known(caplog):
    assert not warned(caplog, [], 100.0, "cpu")


def test_steps_that_are_too_long_by_themselves_are_warned_of_before_the_first_save(caplog):
    assert "up to 2 steps of 16.0 s and a save take 32 s or more" in warned(caplog, [90.0, 16.0, 15.0], None, "cpu")
    assert not warned(caplog, [90.0, 14.0, 14.0], None, "cpu"), "the first step may be slow"
    assert not warned(caplog, [90.0, 16.0], None, "cpu"), "too early to tell"


@pytest.mark.parametrize(("text", "seconds"), [("120", 120), ("", 30), (" 45 ", 45), ("soon", 30), ("-1", 30)])
def test_a_longer_grace_that_torchrun_was_given_counts(caplog, monkeypatch, text, seconds):
    monkeypatch.setenv(GRACE_SETTING, text)
    assert grace_seconds() == seconds
    assert bool(warned(caplog, [1.0], 50.0, "cpu")) == (seconds < 52)


def test_a_torchrun_that_cannot_be_told_waits_30_seconds(monkeypatch):
    monkeypatch.setattr(stop_requests, "fields", lambda config: ())
    assert grace_seconds({GRACE_SETTING: "600"}) == 30


def test_a_run_of_long_steps_warns_before_its_first_save(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=4))
    workers.run(1, train_with_little_grace, recipe)
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert log.count("a SIGTERM may end this run before it has saved") == 1
    assert log.index("a SIGTERM may end") < log.index("checkpoint ")


def train_with_little_grace(rank, ranks, recipe):
    from unittest.mock import patch

    with patch.object(stop_requests, "GRACE_SECONDS", 0.0):
        train_recipe(rank, ranks, recipe, [])


def test_a_run_warns_once_at_its_first_save(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=4), checkpoint=dict(every=2))
    workers.run(1, train_with_little_grace, recipe)
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert log.count("a SIGTERM may end this run before it has saved") == 1
    assert log.index("checkpoint ") < log.index("a SIGTERM may end")


def test_a_run_whose_saves_are_quick_does_not(workers, tmp_path):
    workers.run(1, train_recipe, write_recipe(tmp_path, train=dict(steps=4), checkpoint=dict(every=2)), [])
    assert "SIGTERM" not in (tmp_path / "run/logs/rank_00000.log").read_text()
