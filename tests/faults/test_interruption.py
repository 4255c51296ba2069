"""Runs that are killed, stopped or started twice lose nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megagap.config import load_recipe
from megagap.errors import ConfigError
from megagap.observe import run_directory
from megagap.observe.metrics import read_metrics
from tests.launching import (
    SECONDS,
    descendants,
    finish,
    is_alive,
    is_training,
    kill_all,
    launch,
    start_ranks,
    wait_until,
)
from tests.recipes import write_recipe
from tests.training_run import train_recipe


def same_numbers(metrics):
    return [{key: m[key] for key in ("step", "loss", "grad_norm", "lr", "consumed_samples")} for m in metrics]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallel", "precision", "steps"),
    [
        pytest.param(8, dict(tp=2, pp=2), "fp32", 16, marks=pytest.mark.long),
        (4, dict(tp=2, pp=2), "fp32", 16),
        (2, {}, "bf16-mixed", 24),
    ],
    ids=["tp2 pp2 dp2 fp32", "tp2 pp2 fp32", "dp2 bf16-mixed"],
)
def test_a_killed_run_goes_on_bit_for_bit(workers, tmp_path, ranks, parallel, precision, steps):
    train = dict(steps=steps, precision=precision)
    recipe = write_recipe(tmp_path, train=train, checkpoint=dict(every=4), parallel=parallel)
    expected = workers.run(ranks, train_recipe, recipe, [f"run.dir={tmp_path / 'alone'}"])[0]

    killed = start_ranks(recipe, ranks, stall_after=11)
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(read_metrics(metrics)) == 10, killed[0])  # written one step late
    for process in killed:
        kill_all(process)
    workers.run(ranks, train_recipe, recipe, [])  # in processes that have torch already: launching takes long

    assert same_numbers(read_metrics(tmp_path / "run/metrics.jsonl")) == same_numbers(expected)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.count("start") == 2 and names.count("resume") == 1
    lost = next(event["lost_steps"] for event in events if event["event"] == "resume")
    assert lost == 2
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_saves_at_the_next_step_and_exits_0(workers, tmp_path, number):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    process = launch(recipe, 1)
    wait_until(lambda: is_training(tmp_path / "run"), process)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 0, output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and number.name in status["message"]
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    assert 0 < status["step"] == metrics[-1]["step"] < 100_000
    folder = tmp_path / f"run/checkpoints/step_{status['step']:08}"
    assert folder.exists() and f"resume from {folder}" in status["message"]
    assert f"run directory {tmp_path / 'run'}" in output
    assert ("press it again to stop at once" in output) == (number == signal.SIGINT)


@pytest.mark.parametrize("program", ["megagap.train", "megagap"])
def test_a_notice_before_the_run_starts_is_answered_once_it_has(tmp_path, program):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    command = [sys.executable, "-m", program, *(["train"] if program == "megagap" else []), str(recipe)]
    # As a child of examples/slurm/task.py, which ignores it.
    ignoring = ["sh", "-c", "trap '' USR1; exec \"$@\"", "sh", *command]
    process = subprocess.Popen(ignoring, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: is_held(process.pid, signal.SIGUSR1) or is_training(tmp_path / "run"), process)
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 0, output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and "SIGUSR1" in status["message"]
    assert (tmp_path / f"run/checkpoints/step_{status['step']:08}").exists()


def is_held(pid: int, number: signal.Signals) -> bool:
    """Whether a process holds this signal back."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(fields["SigBlk"], 16) >> number - 1 & 1)


def test_a_run_of_one_process_outlives_the_shell_that_started_it(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    command = f"nohup {sys.executable} -m megagap.train {recipe} >/dev/null 2>&1 & echo $!"
    pid = int(subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout)
    try:
        wait_until(lambda: is_training(tmp_path / "run"))
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_file_named_SAVE_asks_for_a_checkpoint_once(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    process = launch(recipe, 1)
    wait_until(lambda: is_training(tmp_path / "run"), process)
    (tmp_path / "run/SAVE").touch()
    wait_until(lambda: list((tmp_path / "run/checkpoints").glob("step_*")), process)
    wait_until(lambda: not (tmp_path / "run/SAVE").exists(), process)
    kill_all(process)
    assert len(list((tmp_path / "run/checkpoints").glob("step_*"))) <= 2  # asked for and, at most, seen twice


def test_max_minutes_stops_like_a_signal_and_the_run_goes_on(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=60))
    workers.run(2, train_recipe, recipe, ["run.max_minutes=0.0001"])
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and status["step"] < 60 and "run.max_minutes" in status["message"]
    metrics = workers.run(2, train_recipe, recipe, [])[0]
    assert [m["step"] for m in metrics] == list(range(1, 61))


def test_workers_end_with_a_killed_launcher(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    process = launch(recipe, 2, cold=True)
    wait_until(lambda: (tmp_path / "run/status.json").exists(), process)
    pids = descendants(process.pid)
    assert len(pids) >= 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_workers_end_with_a_launcher_that_is_killed_as_they_start(tmp_path):
    """Before they have imported torch, or told the kernel whom to end with."""
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    process = launch(recipe, 2, cold=True)
    wait_until(lambda: len(descendants(process.pid)) >= 2, process)
    pids = descendants(process.pid)
    process.kill()
    try:
        # The workers hold its output open: the end of it is theirs.
        assert "Traceback" not in process.communicate(timeout=SECONDS)[0]
        wait_until(lambda: not any(map(is_alive, pids)))
    finally:
        for pid in filter(is_alive, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("adopter", ["another program", "init"])
def test_a_worker_that_another_than_torchrun_has_adopted_ends_at_once(adopter):
    """The worker leads a session, as torchrun has it; its parent is a shell, or whoever takes over from that."""
    command = "import os; os.setsid(); from megagap.process.parent import end_with_parent; "
    command += "end_with_parent(); print('goes on')"
    line = f'{sys.executable} -c "{command}"' + ("; true" if adopter == "another program" else " & disown")
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    )
    assert done.stdout == "" and "torchrun, which started this process, has died" in done.stderr


def test_a_worker_of_a_living_launcher_goes_on_and_so_does_one_behind_a_wrapper():
    worker = "from megagap.process.parent import end_with_parent; end_with_parent(); print('goes on')"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    for command in ([sys.executable, "-c", worker], ["bash", "-c", f'{sys.executable} -c "{worker}"; true']):
        # This process has torch in its memory, as torchrun has.
        done = subprocess.run(command, capture_output=True, text=True, env=environment, start_new_session=True)
        assert done.stdout == "goes on\n", done.stderr


def test_a_finished_run_says_so_and_exits_0(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=2))
    workers.run(1, train_recipe, recipe, [])
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    code, output = finish(launch(recipe, 1))
    assert code == 0 and "is finished" in output
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_second_writer_is_refused_and_names_the_holder(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    first = launch(recipe, 1, cold=True)
    wait_until(lambda: (tmp_path / "run/status.json").exists(), first)
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=rf"is being written by process {first.pid} on"):
        run_directory.RunDirectory(tmp_path / "run", is_writer=True).open()
    kill_all(first)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"model": {"hidden_size": 32}}, "model.hidden_size was 64, is 32"),
        ({"train": {"seed": 8}}, "train.seed was 7, is 8"),
    ],
)
def test_going_on_with_another_model_or_data_is_refused_with_the_difference(workers, tmp_path, change, shown):
    workers.run(1, train_recipe, write_recipe(tmp_path, train=dict(steps=2)), [])
    section, settings = next(iter(change.items()))
    recipe = write_recipe(
        tmp_path, **{"train": dict(steps=4), section: dict(steps=4) | settings if section == "train" else settings}
    )
    code, output = finish(launch(recipe, 1))
    assert code == 2 and shown in output and "Traceback" not in output
    # The finished run that was not gone on with is left as it was.
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert load_recipe(tmp_path / "run/config.toml").train.steps == 2


def test_skipped_samples_can_be_ahead_but_not_behind(workers, tmp_path):
    """Eight samples a step: after two steps, sample 16 is next."""
    recipe = write_recipe(tmp_path, train=dict(steps=2))
    workers.run(1, train_recipe, recipe, [])
    (metrics,) = workers.run(1, train_recipe, recipe, ["train.steps=3", 'train.skip_samples=["16:32"]'])
    assert len(metrics) == 3
    for changed in ("0:8", "0:16"):  # the second leaves the last number, 39, as it was
        code, output = finish(launch(recipe, 1, "--train.steps", "4", "--train.skip_samples", f'["{changed}"]'))
        assert code == 2 and "only later numbers can be skipped" in output


def test_the_weights_of_a_checkpoint_start_a_new_run(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=4))
    workers.run(1, train_recipe, recipe, [])
    overrides = ["checkpoint.load_mode=model", f"checkpoint.load={tmp_path / 'run'}", f"run.dir={tmp_path / 'new'}"]
    (metrics,) = workers.run(1, train_recipe, recipe, [*overrides, "train.steps=2", "train.seed=8"])
    from_scratch = read_metrics(tmp_path / "run/metrics.jsonl")
    assert metrics[0]["step"] == 1 and metrics[0]["loss"] < from_scratch[0]["loss"] - 0.05


def test_a_folder_seeds_an_empty_run_and_another_layout_goes_on(workers, tmp_path):
    """From one process's checkpoint to tp2 · pp2: the losses after it are those of the run left alone."""
    recipe = write_recipe(tmp_path, train=dict(steps=8), checkpoint=dict(every=4))
    (expected,) = workers.run(1, train_recipe, recipe, [])
    overrides = [
        f"checkpoint.load={tmp_path / 'run/checkpoints/step_00000004'}",
        f"run.dir={tmp_path / 'branch'}",
        "parallel.tp=2",
        "parallel.pp=2",
    ]
    metrics = workers.run(4, train_recipe, recipe, overrides)[0]
    assert [m["step"] for m in metrics] == [5, 6, 7, 8]
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected[4:]], rel=1e-5)
