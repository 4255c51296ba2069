"""``examples/slurm/train.sbatch`` under a real Slurm, on two nodes whose names resolve to nothing.

Both tests go on with one job where they can: each start of it costs the seconds of four processes.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from megagap.observe.metrics import read_metrics
from tests.distributed.machines import ROOT, can_make_namespaces, namespaces
from tests.distributed.slurm import DoesNotStartError, Slurm, missing, slurm
from tests.launching import SECONDS
from tests.recipes import write_recipe

lacking = missing() or ([] if can_make_namespaces() else ["network namespaces"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacking), reason=f"no Slurm on this machine: {', '.join(lacking)}"),
]

ONE_PROCESS = """#!/usr/bin/env bash
exec {python} "${{@/#auto/1}}"
"""
"""A Python that starts one process per node, however many cores the machine has."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Job:
    """A submitted job that trains a recipe of two ranks, one on each node, in ``folder``."""

    def __init__(self, cluster: Slurm, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe_of(steps=1_000_000)
        python = folder / "python"
        python.write_text(ONE_PROCESS.format(python=sys.executable))
        python.chmod(0o755)
        environment = {"MEGAGAP_PYTHON": str(python), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        script = ["examples/slurm/train.sbatch", str(folder / "recipe.toml")]
        options = ["--parsable", f"--output={folder / 'job.out'}", "--time=60", "--signal=USR1@1200"]
        self.number = cluster("sbatch", *options, *script, **environment).strip()

    def recipe_of(self, steps: int) -> None:
        """The number of steps takes effect when the job starts the next time."""
        checkpoint = dict(every=20, keep=2)
        write_recipe(self.folder, train=dict(steps=steps), parallel=dict(pp=2), checkpoint=checkpoint)

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    @property
    def output(self) -> str:
        return (self.folder / "job.out").read_text()

    @property
    def steps(self) -> list[int]:
        path = self.folder / "run/metrics.jsonl"
        return [record["step"] for record in read_metrics(path)] if path.exists() else []

    def status(self) -> dict:
        return json.loads((self.folder / "run/status.json").read_text())

    def events(self, name: str) -> list[dict]:
        path = self.folder / "run/events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def update(self, *settings: str) -> None:
        self.cluster("scontrol", "update", f"JobId={self.number}", *settings)

    def wait_for(self, condition) -> None:
        """Fails at once when the job has ended."""

        def is_there() -> bool:
            ended = self.state in ENDED
            holds = condition()
            assert holds or not ended, f"{self.output}\n{self.cluster.log}"
            return holds

        self.cluster.wait(is_there, SECONDS)

    def start_again(self) -> None:
        """Once both nodes are free, but at once: Slurm would leave it in the queue for two minutes."""
        self.wait_for(lambda: self.state == "PENDING" and self.cluster.count_idle() == 2)
        time.sleep(2)  # what starts in the second in which the job was ended is refused by slurmd as part of it
        self.update("TimeLimit=60", "StartTime=now")

    def require_each_step_once(self) -> None:
        assert self.steps == list(range(1, len(self.steps) + 1))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with namespaces() as machines, ExitStack() as stack:
        try:
            started = stack.enter_context(slurm(machines))
        except DoesNotStartError as error:
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield started


@pytest.fixture(scope="module")
def submitted() -> list[Job]:
    return []


@pytest.fixture
def job(cluster, submitted, tmp_path_factory) -> Job:
    """It trains, and has made a checkpoint."""
    if not submitted or submitted[-1].state not in ("PENDING", "RUNNING"):
        submitted.append(Job(cluster, tmp_path_factory.mktemp("job")))
    submitted[-1].wait_for(lambda: submitted[-1].events("checkpoint"))
    return submitted[-1]


def test_a_job_whose_node_is_killed_goes_back_into_the_queue_and_goes_on_from_its_checkpoint(cluster, job):
    before, starts = job.restarts, len(job.events("start"))
    cluster.kill_node("n2")
    job.wait_for(lambda: job.restarts > before)
    saved = job.events("checkpoint")[-1]["step"]
    cluster.start_node("n3")
    job.start_again()
    job.wait_for(lambda: len(job.events("start")) > starts and job.events("checkpoint")[-1]["step"] > saved)
    resumed = int(job.events("resume")[-1]["folder"].rpartition("_")[2])
    assert resumed in (saved, saved + 20)  # the node may die between a checkpoint and the line that tells of it
    job.require_each_step_once()


def test_a_job_is_signalled_before_its_time_is_over_saves_goes_back_into_the_queue_and_finishes(cluster, job):
    before = job.restarts
    job.update("EndTime=now+19minutes")
    job.wait_for(lambda: job.status()["state"] == "preempted")
    step = job.status()["step"]
    assert "SIGUSR1" in job.status()["message"]
    assert (job.folder / f"run/checkpoints/step_{step:08}/index.json").exists()
    job.recipe_of(steps=step + 3)
    job.wait_for(lambda: job.restarts > before)
    job.start_again()
    job.wait_for(lambda: job.state == "COMPLETED")
    assert job.status()["state"] == "finished", job.output
    assert job.status()["step"] == step + 3
    assert job.events("resume")[-1]["folder"].endswith(f"step_{step:08}")
    job.require_each_step_once()
