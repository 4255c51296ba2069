"""Two machines train as one, and neither waits for the other when it is gone."""

import json
import shlex
import sys
import time

import pytest

from megagap.observe.metrics import read_metrics
from tests.distributed.machines import ROOT, finish, wait_until
from tests.launching import is_alive, is_training
from tests.parity.test_layouts import layout_overrides
from tests.recipes import write_recipe
from tests.training_run import train_recipe

SECONDS_TO_END = 180
"""For the survivors of a lost machine: five to speak, the rest for busy cores; far below a collective's time-out."""


PYTHON = """#!/usr/bin/env bash
exec {python} "${{@/#megagap.train/tests.distributed.several}}"
"""
"""For ``launch.sh``: another program in the place of the trainer."""


def numbers(metrics):
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics]


def our_tracebacks(text: str) -> list[str]:
    """torchrun ends with a traceback of its own; ours would go through our files."""
    return [line for line in text.splitlines() if f'File "{ROOT}/megagap' in line]


LAYOUTS = {
    "tp within, pp across": dict(tp=2, pp=2),
    "tp within, dp across": dict(tp=2),
    "tp within, cp across": dict(tp=2, cp=2),
    "cp within, pp across": dict(cp=2, pp=2, context_mode="alltoall"),
    "tp within, dp across, zero 3": dict(tp=2, zero=3),
}
"""Of two processes on each machine; ranks next to each other are on one."""


@pytest.mark.long
def test_two_machines_train_like_one_to_the_last_bit(machines, workers, tmp_path):
    """With tp within, pp across, as a run of its own."""
    recipe, overrides = write_recipe(tmp_path), layout_overrides(dict(tp=2, pp=2))
    expected = workers.run(4, train_recipe, recipe, [*overrides, f"run.dir={tmp_path / 'one'}"])[0]

    started = machines.launch(tmp_path, recipe, *(f"--{override}" for override in overrides))
    assert finish(started) == [0, 0], "\n".join(one.output for one in started)
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == 10
    assert numbers(metrics) == numbers(expected)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


def test_every_kind_of_parallelism_across_two_machines_is_that_of_one_to_the_last_bit(machines, workers, tmp_path):
    """One launch, which starts ten processes, trains all layouts, in the place of ``megagap.train``."""
    recipe = write_recipe(tmp_path, train=dict(steps=4))
    layouts = {name: layout_overrides(layout) for name, layout in LAYOUTS.items()}
    (tmp_path / "layouts.json").write_text(json.dumps(layouts))
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=shlex.quote(sys.executable)))
    python.chmod(0o700)
    started = machines.launch(tmp_path, recipe, MEGAGAP_PYTHON=str(python))
    assert finish(started) == [0, 0], "\n".join(one.output for one in started)
    for name, overrides in layouts.items():
        expected = workers.run(4, train_recipe, recipe, [*overrides, f"run.dir={tmp_path / 'one' / name}"])[0]
        metrics = read_metrics(tmp_path / name / "metrics.jsonl")
        assert len(metrics) == 4
        assert numbers(metrics) == numbers(expected), name


@pytest.mark.parametrize("lost", [pytest.param(1, marks=pytest.mark.long), 0], ids=["second", "first"])
def test_when_a_machine_is_lost_the_other_says_so_and_ends(machines, tmp_path, lost):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), parallel=dict(pp=2))
    started = machines.launch(tmp_path, recipe)
    wait_until(lambda: is_training(tmp_path / "run"), started)
    gone, other = started[lost], started[1 - lost]

    gone.kill()
    before = time.monotonic()
    wait_until(lambda: other.process.poll() is not None or time.monotonic() - before > SECONDS_TO_END, ())

    assert other.process.poll() not in (None, 0), other.output
    assert len(gone.children) >= 2 and not any(is_alive(pid) for pid in gone.children)
    ranks = (0, 1) if lost else (2, 3)
    assert any(f"distributed error: rank {rank} lost contact with another rank" in other.output for rank in ranks)
    assert "the same command" in other.output
    assert not our_tracebacks(other.output)
    for rank in ranks:
        assert not our_tracebacks((tmp_path / f"run/logs/rank_{rank:05}.log").read_text())
