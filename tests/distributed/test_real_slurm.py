"""``examples/slurm/train.sbatch`` under a real Slurm, on two nodes whose names resolve to nothing."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagap.observe.metrics import read_metrics
from tests.distributed.machines import ROOT, can_make_namespaces, namespaces
from tests.distributed.slurm import Slurm, missing, slurm
from tests.recipes import write_recipe

lacking = missing() + ([] if can_make_namespaces() else ["network namespaces"])
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(lacking), reason=f"no Slurm on this machine: {', '.join(lacking)}"),
]

SECONDS = 400.0


@pytest.fixture
def cluster() -> Iterator[Slurm]:
    with namespaces() as machines, slurm(machines) as started:
        yield started


class Job:
    """A submitted job that trains a recipe of four ranks, two on each node, in ``folder``."""

    def __init__(self, cluster: Slurm, folder: Path, *options: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe_of(steps=100_000)
        environment = {"MEGAGAP_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        script = ["examples/slurm/train.sbatch", str(folder / "recipe.toml")]
        arguments = ["--parsable", f"--output={folder / 'job.out'}", *options]
        self.number = cluster("sbatch", *arguments, *script, **environment).strip()

    def recipe_of(self, steps: int) -> None:
        """The number of steps takes effect when the job starts the next time."""
        write_recipe(self.folder, train=dict(steps=steps), parallel=dict(pp=2), checkpoint=dict(every=20, keep=2))

    @property
    def output(self) -> str:
        return (self.folder / "job.out").read_text()

    def status(self) -> dict:
        return json.loads((self.folder / "run/status.json").read_text())

    def events(self, name: str) -> list[dict]:
        path = self.folder / "run/events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def wait_for(self, condition) -> None:
        def is_there() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state not in ("FAILED", "CANCELLED", "TIMEOUT"), (state, self.output, self.cluster.log)
            return condition()

        self.cluster.wait(is_there, SECONDS)

    def wait_until_requeued(self) -> None:
        """Then at once: Slurm would leave it for two minutes."""
        self.wait_for(lambda: self.cluster.job(self.number)["Restarts"] != "0")
        self.wait_for(lambda: self.cluster.job(self.number)["JobState"] in ("PENDING", "RUNNING"))
        if self.cluster.job(self.number)["JobState"] == "PENDING":
            self.cluster("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def wait_until_finished(self) -> None:
        self.cluster.wait(lambda: self.cluster.job(self.number)["JobState"] not in ("PENDING", "RUNNING"), SECONDS)
        assert self.cluster.job(self.number)["JobState"] in ("COMPLETING", "COMPLETED"), self.output
        assert self.status()["state"] == "finished"


def require_each_step_once(folder: Path) -> None:
    steps = [record["step"] for record in read_metrics(folder / "run/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_a_job_is_signalled_before_its_time_is_over_saves_goes_back_into_the_queue_and_finishes(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--time=2", "--signal=USR1@60")
    job.wait_for(lambda: job.events("start"))
    job.wait_for(lambda: job.status()["state"] == "preempted")
    step = job.status()["step"]
    assert "SIGUSR1" in job.status()["message"]
    assert (tmp_path / f"run/checkpoints/step_{step:08}/index.json").exists()
    job.recipe_of(steps=step + 3)
    job.wait_until_requeued()
    job.wait_until_finished()
    assert job.events("resume")[-1]["folder"].endswith(f"step_{step:08}")
    assert job.status()["step"] == step + 3 and "Traceback" not in job.output
    require_each_step_once(tmp_path)


def test_a_job_whose_node_is_killed_goes_back_into_the_queue_and_finishes(cluster, tmp_path):
    job = Job(cluster, tmp_path, "--time=60")
    job.wait_for(lambda: job.events("checkpoint"))
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.job(job.number)["Restarts"] != "0", SECONDS)
    step = job.events("checkpoint")[-1]["step"]
    job.recipe_of(steps=step + 23)
    cluster.start_node("n2")
    job.wait_until_requeued()
    job.wait_until_finished()
    assert job.events("resume") and os.path.exists(tmp_path / f"run/checkpoints/step_{step + 23:08}")
    require_each_step_once(tmp_path)
