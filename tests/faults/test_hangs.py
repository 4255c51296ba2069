"""A rank that stands still ends the whole run within the time-out, and the report says which rank and where."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launching import finish, launch, start_ranks
from tests.recipes import write_recipe

SECONDS = 8.0
"""The time-out: a busy machine must make a step in it, and start in twice the time."""
MARGIN = 10.0
"""Seconds after the time-out at which all must have ended."""

PLACES = {
    "forward": "rank 1 stands in forward of microbatch 0, chunk 0",
    "loader": "rank 1 stands in loader",
    "checkpoint": "rank 1 stands in checkpoint",
    "background": "rank 1 stands in checkpoint > writer",
    "removal": "rank 0 stands in checkpoint > removal of old checkpoints",
    "collective": "rank 1 waits in wait for rank 0, while others wait for it elsewhere",
}


@dataclass
class Hung:
    """A run of two ranks in which one hung, once all have ended."""

    run: Path
    codes: list[int]
    outputs: list[str]

    @property
    def report(self) -> str:
        return (self.run / "logs/hang_report.txt").read_text()


def recipe_that_hangs(folder: Path, place: str) -> Path:
    folder.mkdir()
    parallel = dict(pp=2) if place == "collective" else {}
    run = dict(dir=str(folder / "run"), tensorboard=False, hang_seconds=SECONDS)
    checkpoint = {"every": 2 if place == "removal" else 4, "keep": 1, "async": place == "background"}
    return write_recipe(folder, train=dict(steps=100_000), parallel=parallel, checkpoint=checkpoint, run=run)


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """All of them at once: most of their time they wait."""
    folder = tmp_path_factory.mktemp("hangs")
    places = (*PLACES, "late", "end")
    recipes = {place: recipe_that_hangs(folder / place, place) for place in places}
    started = {
        place: start_ranks(recipes[place], 2, "--run.stop_after=6", hangs=(int(place != "removal"), place))
        for place in places
    }
    found = {}
    for place, processes in started.items():
        ends = [finish(process) for process in processes]
        found[place] = Hung(folder / place / "run", [code for code, _ in ends], [output for _, output in ends])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_hang_ends_all_ranks_and_names_the_one_and_where_it_stands(hung, place):
    run = hung[place]
    assert run.codes == [1, 1], run.outputs
    message = re.search(r"distributed error: (\d+) s without progress at step \d+: (.*)", run.outputs[0])
    assert message is not None, run.outputs
    assert SECONDS <= int(message[1]) < SECONDS + MARGIN
    assert message[2] == PLACES[place] and f"Suspected: {PLACES[place]}." in run.report
    assert "Traceback" not in "".join(run.outputs)
    status = (run.run / "status.json").read_text()
    assert '"failed"' in status and PLACES[place] in status


@pytest.mark.slow
def test_a_rank_that_hangs_after_its_last_step_is_named_and_the_run_stays_what_it_was(hung):
    run = hung["end"]
    assert run.codes == [1, 1] and "Suspected: rank 1 stands in code that no span names." in run.report
    assert "in hanging_exit" in run.report and "rank 0 (pp 0, dp 0, cp 0, tp 0; process " in run.report
    assert '"preempted"' in (run.run / "status.json").read_text()


@pytest.mark.slow
def test_the_report_has_place_waits_and_stacks_of_every_rank(hung):
    report = hung["forward"].report
    assert "rank 0 (pp 0, dp 0, cp 0, tp 0; process " in report and "step 3, " in report
    waiting = r"reduction of gradients > reduce-scatter over shard \(number \d+\)\n  for [\d.]+ s; waits for rank 1"
    assert re.search(waiting, report)
    first, second = report.split("---- rank 0: stacks")[1].split("---- rank 1: stacks")
    assert "in finish_reduction" in first and "in hanging_forward" in second
    assert "in hanging_fsync" in hung["checkpoint"].report and "in hanging_read" in hung["loader"].report


@pytest.mark.slow
def test_torchs_own_record_has_the_collectives_that_are_not_finished(hung):
    def unfinished(rank):
        record = json.loads((hung["forward"].run / f"logs/flight_recorder/rank_{rank:05}.json").read_text())
        return [entry["profiling_name"] for entry in record["entries"] if not entry["retired"]]

    assert unfinished(0) and not unfinished(1)


@pytest.mark.long
def test_a_rank_that_keeps_pythons_lock_is_named_with_its_stack(tmp_path):
    recipe = recipe_that_hangs(tmp_path / "lock", "lock")
    ends = [finish(process) for process in start_ranks(recipe, 2, hangs=(1, "lock"))]
    assert [code for code, _ in ends] == [1, 1]
    run = Hung(tmp_path / "lock/run", [], [])
    assert "rank 1 (pp 0, dp 1, cp 0, tp 0): Python does not run: see its stack" in run.report
    assert "in hanging_forward" in run.report.split("---- rank 1: stacks")[1]


@pytest.mark.long
def test_a_frozen_rank_is_named_and_torchrun_ends_it(tmp_path):
    recipe = recipe_that_hangs(tmp_path / "frozen", "frozen")
    process = launch(recipe, 2, hangs=(1, "frozen"), cold=True)
    code, output = finish(process)
    assert code == 1 and "rank 1 gives no sign of life" in output, output


@pytest.mark.slow
def test_a_rank_that_goes_on_before_the_time_is_over_is_not_a_hang(hung):
    """After half of it all ranks write where they stand; they remove it again."""
    run = hung["late"]
    assert run.codes == [0, 0], run.outputs
    assert not list((run.run / "logs/hang").iterdir()) and not (run.run / "logs/hang_report.txt").exists()
