"""torchrun starts a run again by itself: after a rank has died, with fewer machines, and with more."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from megagap.observe.metrics import read_metrics
from tests.distributed.machines import ROOT, finish, wait_until
from tests.launching import descendants
from tests.launching import finish as finish_process
from tests.launching import wait_until as wait_for
from tests.recipes import write_recipe
from tests.training_run import train_recipe

PYTHON = """#!/usr/bin/env bash
exec {python} "${{@/#megagap.train/tests.gated_train}}"
"""


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_whose_first_rank_is_killed_goes_on_by_itself_and_the_failure_is_recorded(workers, tmp_path):
    recipe = write_recipe(tmp_path, model=dict(num_hidden_layers=2), train=dict(steps=5), checkpoint=dict(every=2))
    expected = workers.run(2, train_recipe, recipe, [f"run.dir={tmp_path / 'alone'}"])[0]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "-m", "tests.gated_train", str(recipe), "--checkpoint.load", ""],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GATES": "3"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        waits = tmp_path / "waits_3"
        wait_for(lambda: waits.exists() and waits.read_text(), process)
        os.kill(int(waits.read_text()), signal.SIGKILL)
        (tmp_path / "gate_3").touch()
        code, output = finish_process(process)
    finally:
        for pid in [*descendants(process.pid), process.pid] if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    assert code == 0, output
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path / "run/metrics.jsonl")] == [
        (m["step"], m["loss"]) for m in expected
    ]
    happened = [event["event"] for event in events(tmp_path / "run")]
    assert happened.index("failure") < happened.index("resume"), happened
    (failure,) = [event for event in events(tmp_path / "run") if event["event"] == "failure"]
    assert "rank 1 lost contact" in failure["message"]


@pytest.mark.long
def test_a_run_goes_on_with_half_its_machines_and_again_with_all(machines, workers, tmp_path):
    """The second machine is lost with its disk, and comes back empty."""
    recipe = write_recipe(tmp_path, model=dict(num_hidden_layers=2), train=dict(steps=9))
    expected = workers.run(4, train_recipe, recipe, [f"run.dir={tmp_path / 'alone'}"])[0]
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=shlex.quote(sys.executable)))
    python.chmod(0o700)
    local = ["--checkpoint.local_every", "1", "--checkpoint.local_dir", "$DISK"]
    launch = machines.launcher(
        tmp_path, recipe, *local, nodes="1:2", options=["--restarts", "3"], MEGAGAP_PYTHON=str(python), GATES="3,6"
    )
    first, second = launch(0), launch(1)
    wait_until((tmp_path / "waits_3").exists, (first, second))
    second.kill()
    shutil.rmtree(tmp_path / "disk1")
    (tmp_path / "gate_3").touch()

    wait_until((tmp_path / "waits_6").exists, (first,))
    signals = first.output.count("closing signal")
    second = launch(1)
    wait_until(lambda: first.output.count("closing signal") > signals, (first, second))
    (tmp_path / "gate_6").touch()
    assert finish((first, second)) == [0, 0], first.output + second.output

    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    key = "step", "consumed_samples"
    assert [[m[name] for name in key] for m in metrics] == [[m[name] for name in key] for m in expected]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=2e-6)
    happened = events(tmp_path / "run")
    assert [event["processes"] for event in happened if event["event"] == "start"] == [4, 2, 4]
    resumed = [event for event in happened if event["event"] == "resume"]
    assert resumed[0]["step"] == 2 and "disk0" in resumed[0]["folder"]
    assert resumed[1]["step"] == 7 and resumed[1]["lost_steps"] == 0  # all saved when they were told to stop
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
