"""Ctrl-C and SIGTERM: the first one saves and stops, a second one stops at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagap.checkpoint import find_latest
from megagap.observe.run_directory import RunDirectory
from megagap.process.interrupt import InterruptCounter, watch_interrupts
from megagap.resume.next_start import next_start
from tests.launching import descendants, finish, interrupt_torchrun, is_alive, is_training, launch, wait_until
from tests.recipes import write_recipe
from tests.warm_start import python

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(
    ("under_torchrun", "received", "counts"),
    [
        (False, [(INT, 0), (INT, 0.1)], [1, 2]),
        (False, [(INT, 0), (TERM, 5)], [1, 2]),
        (False, [(TERM, 0), (TERM, 0.1), (TERM, 5)], [1, 0, 2]),  # a scheduler and a launcher send the same one
        (True, [(INT, 0), (INT, 0.1), (INT, 5)], [1, 0, 2]),  # torchrun and a scheduler pass on the same Ctrl-C
        (True, [(INT, 0), (TERM, 0.1)], [1, 2]),  # torchrun's answer to a second Ctrl-C
        (True, [(USR1, 0), (TERM, 5), (USR1, 9)], [0, 1, 0]),  # a notice, and the end of the time that it left
        (True, [(TERM, 0), (INT, 1)], [1, 2]),
        (True, [(TERM, 0), (TERM, 0.5), (TERM, 9)], [1, 0, 2]),
    ],
    ids=str,
)
def test_signals_are_counted_from_what_a_process_receives(under_torchrun, received, counts):
    counter = InterruptCounter(under_torchrun)
    assert [counter.count(number, seconds) for number, seconds in received] == counts


def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path):
    process = launch(write_recipe(tmp_path), 1, cold=True)
    wait_until(lambda: b"libtorch" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)
    process.send_signal(INT)
    code, output = finish(process)
    assert code in (-INT, 130) and "Traceback" not in output, output  # 130: once the run handles it


def test_the_first_and_the_second_ctrl_c_are_each_answered_once():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("handler"))
    try:
        with watch_interrupts(lambda _: seen.append("first"), lambda _: seen.append("second")):
            for expected in ("first", "second"):
                os.kill(os.getpid(), signal.SIGINT)
                wait_until(lambda expected=expected: expected in seen)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [name for name in seen if name != "handler"] == ["first", "second"]


def launch_stalled(tmp_path, recipe, ranks, place):
    """A run that stands still there."""
    process = launch(recipe, ranks, stall_after=place, cold=ranks > 1)
    wait_until((tmp_path / "run/stalled").exists, process)
    return process


@pytest.mark.parametrize("saved", [True, False], ids=["with a checkpoint", "without"])
def test_a_second_ctrl_c_stops_at_once_and_says_what_the_next_start_does(tmp_path, saved):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), checkpoint=dict(every=2 if saved else 0))
    process = launch_stalled(tmp_path, recipe, 1, "3")
    checkpoint = find_latest(tmp_path / "run/checkpoints")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130 and "Traceback" not in output
    assert "aborted by a second Ctrl-C after step" in output and "without saving" in output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and status["message"] in output
    if saved:
        assert f"run the same command again to resume from {checkpoint}" in output
    else:
        assert "the run has no checkpoint yet: the same command starts from the beginning" in output
    assert "last checkpoint" not in output and find_latest(tmp_path / "run/checkpoints") == checkpoint


def test_a_second_sigterm_stops_at_once_and_one_that_comes_twice_does_not(tmp_path):
    """The run stands still: the first SIGTERM cannot be answered at a step boundary."""
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), checkpoint=dict(every=2))
    process = launch_stalled(tmp_path, recipe, 1, "3")
    for pause in (0.1, 1.2):
        process.send_signal(TERM)
        time.sleep(pause)
        assert process.poll() is None
    process.send_signal(TERM)
    code, output = finish(process)
    assert code == 143 and "Traceback" not in output
    assert "aborted by a second SIGTERM after step" in output and "without saving" in output
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert find_latest(tmp_path / "run/checkpoints").name == "step_00000002"


def train_with(change, recipe):
    """A run whose process executes ``change`` first, with the module of the training loop as ``trainer``."""
    code = (
        "import os, signal, sys\nfrom megagap.errors import run_tool\nfrom megagap.train import main\n"
        f"from megagap.training import trainer\n{change}\nrun_tool(lambda: main(sys.argv[1:]))"
    )
    return subprocess.run([python(), "-c", code, str(recipe)], capture_output=True, text=True)


def test_ctrl_c_during_start_up_ends_without_a_traceback(tmp_path):
    """The signal comes as the run directory opens."""
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    done = train_with("trainer.build_state = lambda *_: os.kill(os.getpid(), signal.SIGINT)", recipe)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "interrupted; the run has no checkpoint yet: the same command starts from the beginning" in done.stderr


def test_a_signal_before_the_first_step_stops_after_it(tmp_path):
    """The signal comes as metrics.jsonl opens; opening TensorBoard's file may take seconds."""
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    signalled = (
        "class Signalled(trainer.Recorder):\n"
        "    def __init__(self, *rest):\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "        super().__init__(*rest)\n"
        "trainer.Recorder = Signalled"
    )
    done = train_with(signalled, recipe)
    assert done.returncode == 0, done.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and status["step"] == 1


def test_a_command_in_the_background_ignores_a_ctrl_c_that_is_not_meant_for_it(tmp_path):
    """As a shell starts it: with SIGINT ignored."""
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    ignoring = f"trap '' INT; exec {sys.executable} -m megagap.train {recipe} --run.max_minutes 0.05"
    process = subprocess.Popen(["bash", "-c", ignoring], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: is_training(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    assert "run.max_minutes" in json.loads((tmp_path / "run/status.json").read_text())["message"]


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves_and_stops_all_ranks(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    process = launch(recipe, 2, cold=True)
    wait_until(lambda: is_training(tmp_path / "run"), process)
    interrupt_torchrun(process)
    _, output = finish(process)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and "stopped by Ctrl-C (SIGINT)" in status["message"], output
    assert (tmp_path / f"run/checkpoints/step_{status['step']:08}").exists()


@pytest.mark.slow
def test_a_second_ctrl_c_on_torchrun_stops_all_ranks_at_once_even_in_a_collective(tmp_path):
    """Rank 1 stands still after step 3, and rank 0 waits for it."""
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), checkpoint=dict(every=2))
    process = launch_stalled(tmp_path, recipe, 2, "3:1")
    pids = descendants(process.pid)
    interrupt_torchrun(process)
    time.sleep(2)
    assert all(map(is_alive, pids))
    interrupt_torchrun(process)
    _, output = finish(process)
    wait_until(lambda: not any(map(is_alive, pids)))
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "failed" and "aborted by a second Ctrl-C" in status["message"], output
    assert output.count("aborted by a second Ctrl-C") == 1 and "rank 0 failed" not in output
    assert find_latest(tmp_path / "run/checkpoints").name == "step_00000002"


@pytest.mark.parametrize(
    ("load", "exists", "told"),
    [
        ("latest", True, "run the same command again to resume from {run}/checkpoints/step_00000002"),
        ("", True, "to resume from {run}/checkpoints/step_00000002, run the command again with --checkpoint.load"),
        ("latest", False, "the run has no checkpoint yet: the same command starts from the beginning"),
        ("", False, "the run has no checkpoint yet: the same command starts from the beginning"),
        ("runs/seed", False, "the run has no checkpoint yet: the same command starts from runs/seed again"),
        ("runs/seed", True, "run the same command again to resume from {run}/checkpoints/step_00000002"),
    ],
)
def test_what_the_same_command_does_next(tmp_path, load, exists, told):
    run = RunDirectory(tmp_path / "run", is_writer=False)
    if exists:
        (run.checkpoints / "step_00000002").mkdir(parents=True)
        (run.checkpoints / "step_00000002/index.json").touch()
    assert next_start(run, load).startswith(told.format(run=run.path))
