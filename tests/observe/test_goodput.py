"""A run's wall time is accounted for, over all of its starts: the parts add up to it."""

import json
from pathlib import Path

import pytest

from megagap.errors import DataError
from megagap.observe.goodput import ACCOUNTING, Goodput
from tests.launching import finish, kill_all, start_ranks, wait_until
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python


def write(run: Path, *lines: tuple[str, int, float, float]) -> None:
    records = [dict(zip(("name", "step", "start", "end"), line, strict=True)) for line in lines]
    (run / ACCOUNTING).write_text("".join(json.dumps(record) + "\n" for record in records))


KILLED = [
    ("start", 1, 100.0, 104.0),
    ("step", 1, 105.0, 107.0),
    ("step", 2, 107.0, 109.0),
    ("evaluation", 2, 110.0, 113.0),
    ("checkpoint", 2, 113.0, 114.0),
    ("step", 3, 114.0, 116.0),
]
"""Killed in step 4, with a checkpoint of step 2."""


def test_each_second_is_counted_once(tmp_path):
    write(
        tmp_path,
        *KILLED,
        ("start", 3, 130.0, 134.0),
        ("step", 3, 135.0, 137.0),
        ("step", 4, 137.0, 140.0),
        ("end", 0, 141.0, 141.0),
    )
    found = Goodput.of_run(tmp_path)
    expected = dict(steps=9.0, lost=2.0, evaluation=3.0, checkpoint=1.0, start_up=10.0, other=2.0, down=14.0)
    assert found.seconds == expected
    assert found.wall == 41.0 and found.share == pytest.approx(9 / 41)
    assert (found.starts, found.steps, found.lost_steps) == (2, 4, 1)
    assert "goodput 22.0% of 41.0 s in 2 start(s)" in found.line()


def test_a_start_that_is_killed_before_its_first_step_is_start_up(tmp_path):
    write(tmp_path, *KILLED, ("start", 3, 130.0, 134.0))
    found = Goodput.of_run(tmp_path)
    assert found.seconds["start_up"] == 9.0 and found.seconds["down"] == 14.0 and found.wall == 34.0


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    write(tmp_path, *KILLED)
    before = Goodput.of_run(tmp_path)
    with (tmp_path / ACCOUNTING).open("a") as file:
        file.write('{"name": "st')
    assert Goodput.of_run(tmp_path) == before


def test_a_run_without_accounts_is_named(tmp_path):
    with pytest.raises(DataError, match=r"accounting\.jsonl does not exist"):
        Goodput.of_run(tmp_path)
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(DataError, match=r"recipe\.toml is not a run directory") as error:
        Goodput.of_run(tmp_path / "recipe.toml")
    assert "remove" not in str(error.value)


@pytest.mark.slow
def test_the_accounts_of_a_run_that_was_killed_and_went_on_add_up_to_its_wall_time(tmp_path):
    run = tmp_path / "run"
    recipe = write_recipe(
        tmp_path,
        train=dict(steps=9, evaluate_every=4, evaluate_samples=4),
        checkpoint=dict(every=4),
    )
    (killed,) = start_ranks(recipe, 1, stall_after=6)
    wait_until((run / "stalled").exists, killed)
    kill_all(killed)
    (resumed,) = start_ranks(recipe, 1)
    code, output = finish(resumed)
    assert code == 0 and "goodput " in output, output
    code, printed = finish(_tool(run))
    found = json.loads(printed.splitlines()[-1])
    assert code == 0 and (found["starts"], found["steps"], found["lost_steps"]) == (2, 9, 3)
    lines = [json.loads(line) for line in (run / ACCOUNTING).read_text().splitlines()]
    assert sum(found["seconds"].values()) == pytest.approx(lines[-1]["end"] - lines[0]["start"])
    assert all(seconds > 0 for seconds in found["seconds"].values()), found
    steps = sum(line["end"] - line["start"] for line in lines if line["name"] == "step")
    assert found["seconds"]["steps"] + found["seconds"]["lost"] == pytest.approx(steps)


def _tool(run: Path):
    from tests.launching import _start

    return _start([python(), "tools/goodput.py", str(run), "--json"])


def test_a_run_ends_well_though_its_accounts_are_damaged(workers, tmp_path):
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", ("step", 1, 1.0, 2.0))
    workers.run(1, train_recipe, write_recipe(tmp_path, train=dict(steps=3)), [])
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert "no goodput: " in (tmp_path / "run/logs/rank_00000.log").read_text()
