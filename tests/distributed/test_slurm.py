"""``examples/slurm/train.sbatch`` does under Slurm what it says; Slurm's commands are stand-ins here."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.distributed.machines import ROOT, Machines, Started, finish, wait_until
from tests.launching import free_port, is_training
from tests.recipes import write_recipe


def write_commands(folder: Path, machines: Machines) -> None:
    """srun starts the task on each machine and waits; scontrol knows the machines and notes a requeue."""
    tasks = [
        f'{shlex.join(machine.enter)} "${{task[@]}}" {shlex.join(machine.options)} --processes 1 "$@" & pids+=($!)'
        for machine in machines.machines
    ]
    options = ["while [[ $1 == -* ]]; do shift; done", 'task=("${@:1:2}"); shift ${#task[@]}']
    # Each by its number: "wait -n" does not know of one that ended as another did.
    wait = ['printf "%s\\n" "${pids[@]}" >>"$PIDS"', 'for pid in "${pids[@]}"; do wait "$pid" || exit; done']
    lines = [*options, *tasks, *wait]
    addresses = " ".join(machine.address for machine in machines.machines)
    commands = {
        "srun": lines,
        "scontrol": [f'[[ $1 == requeue ]] && echo "$2" >>"$REQUEUED" || printf "%s\\n" {addresses}'],
    }
    folder.mkdir()
    for name, lines in commands.items():
        (folder / name).write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
        (folder / name).chmod(0o755)


def submit(machines: Machines, folder: Path, job: str, *arguments: str) -> tuple[Started]:
    (folder / "pids").unlink(missing_ok=True)
    return (
        machines.start(
            ["bash", str(ROOT / "examples/slurm/train.sbatch"), *arguments],
            folder / "job.out",
            PATH=f"{folder / 'bin'}:{os.environ['PATH']}",
            SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_JOB_ID=job,
            SLURM_JOB_NODELIST="two",
            PIDS=str(folder / "pids"),
            REQUEUED=str(folder / "requeued"),
        ),
    )


def test_a_signalled_job_saves_and_goes_back_into_the_queue_until_the_run_is_finished(machines, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), parallel=dict(pp=2))
    write_commands(tmp_path / "bin", machines)
    number = str(free_port() + 470_000)  # train.sbatch derives the port from its last four digits
    job = submit(machines, tmp_path, number, str(recipe))
    wait_until(lambda: is_training(tmp_path / "run"), job)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)

    assert finish(job) == [0], job[0].output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted"
    assert (tmp_path / f"run/checkpoints/step_{status['step']:08}").exists()
    assert (tmp_path / "requeued").read_text() == f"{number}\n"
    assert "Traceback" not in job[0].output

    job = submit(machines, tmp_path, number, str(recipe), "--train.steps", str(status["step"] + 3))
    assert finish(job) == [0], job[0].output
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "finished"
    assert (tmp_path / "requeued").read_text() == f"{number}\n"


def test_a_notice_that_comes_before_the_workers_reaches_them(machines, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    machine = machines.machines[0]
    options = ["--first", f"{machine.address}:{free_port()}", "--nodes", "1", "--processes", "1", *machine.options]
    task = [*machine.enter, sys.executable, str(ROOT / "examples/slurm/task.py"), *options, str(recipe)]
    job = (machines.start(task, tmp_path / "job.out"),)
    wait_until(lambda: "launch:" in job[0].output, job)  # torchrun starts next
    job[0].process.send_signal(signal.SIGUSR1)

    assert finish(job) == [0], job[0].output
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted" and "SIGUSR1" in status["message"]
    assert (tmp_path / f"run/checkpoints/step_{status['step']:08}").exists()


def test_a_task_ends_as_what_it_starts_even_if_a_signal_comes_then(tmp_path):
    """launch.sh is a stand-in here, which ends at once with a code of its own, while signals come."""
    script = tmp_path / "slurm/task.py"
    script.parent.mkdir()
    script.write_text((ROOT / "examples/slurm/task.py").read_text())
    launch = tmp_path / "multi_node/launch.sh"
    launch.parent.mkdir()
    launch.write_text("#!/bin/sh\nkill -USR1 $PPID\nkill -USR1 $$\n(sleep 0.01; kill -USR1 $PPID) &\nexit $1\n")
    launch.chmod(0o755)
    for code in (0, 7):
        assert subprocess.run([sys.executable, script, str(code)]).returncode == code
    launch.write_text("#!/bin/sh\nkill -TERM $PPID\nexec sleep 60\n")
    assert subprocess.run([sys.executable, script]).returncode == 128 + signal.SIGTERM


def test_a_job_with_a_faulty_recipe_ends_before_any_node_is_busy(machines, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=-1))
    write_commands(tmp_path / "bin", machines)
    job = submit(machines, tmp_path, "1", str(recipe))
    wait_until(lambda: job[0].process.poll() is not None, ())
    assert job[0].process.returncode == 2
    assert "train.steps" in job[0].output and "Traceback" not in job[0].output
    assert not (tmp_path / "pids").exists()
