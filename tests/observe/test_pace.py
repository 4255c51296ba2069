"""Ranks that are slow by themselves are told from those that wait for them."""

import json
import time
from pathlib import Path
from unittest import mock

import pytest

from megagap.model.llama import LlamaStage
from megagap.observe.metrics import read_metrics
from megagap.observe.pace import IN_A_ROW, Pace, SlowRanks
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.spans import Spans
from tests.recipes import write_recipe
from tests.training_run import train_recipe


class CountingClock:
    """A second passes with each mark."""

    def __init__(self) -> None:
        self.made = 0

    def mark(self) -> int:
        self.made += 1
        return self.made

    def has_passed(self, mark: int) -> bool:
        return True

    def seconds(self, mark: int) -> float:
        return float(mark)


def make_step(spans: Spans, step: int) -> None:
    spans.begin_step(step)
    with spans.span("step"):
        with spans.span("forward"), spans.collective("all-reduce", "tp"), spans.wait("wait"):
            pass
        with spans.wait("wait", peer=1):
            pass


def test_a_rank_s_own_time_is_that_of_the_step_without_its_waits():
    pace, spans = Pace(4, Mesh.single(), CountingClock()), Spans()
    with spans.heard_by(pace):
        for step in range(1, 9):
            make_step(spans, step)
            shared = pace.share(step)
            # Marks: begin, two of each outermost wait, end: 5 seconds, of which 2 are waits.
            assert shared.tolist() == ([3.0] if step == 7 else [])


class Events:
    def __init__(self) -> None:
        self.named, self.is_writer = [], True

    def event(self, name, **details):
        self.named.append((name, details["rank"]))


def test_a_rank_is_named_once_it_was_slow_several_times_in_a_row_and_again_after_it_recovered():
    events = Events()
    ranks = SlowRanks(Layout(4), events)
    slow, even = [1.0, 1.0, 1.3, 1.1], [1.0] * 4
    for times in (slow, slow, even, slow, slow):
        ranks.judge(1, times)
    assert not events.named
    for _ in range(3):
        assert ranks.judge(1, slow) == {"own_seconds": 1.0, "own_seconds_max": 1.3}
    assert events.named == [("slow_rank", 2)]
    for times in (even, slow, slow, slow):
        ranks.judge(1, times)
    assert events.named == [("slow_rank", 2)] * 2


def test_ranks_are_compared_with_those_of_their_stage_and_small_or_unknown_times_are_not():
    for layout, times in (
        (Layout(4, pp=2), [1.0, 1.0, 2.0, 2.0]),
        (Layout(2), [0.001, 0.01]),
        (Layout(2), [0.0, 1.0]),
    ):
        events = Events()
        ranks = SlowRanks(layout, events)
        for _ in range(IN_A_ROW + 1):
            ranks.judge(1, times)
        assert not events.named


def train_with_a_slow_rank(rank, ranks, recipe, overrides):
    forward = LlamaStage.forward

    def slow(self, *arguments, **options):
        begin = time.perf_counter()
        result = forward(self, *arguments, **options)
        time.sleep(max(0.15, 3 * (time.perf_counter() - begin)))  # whatever else the machine does
        return result

    with mock.patch.object(LlamaStage, "forward", slow if rank == 1 else forward):
        return train_recipe(rank, ranks, recipe, overrides)


@pytest.mark.parametrize("parallel", [pytest.param({}, marks=pytest.mark.long), {"tp": 2}], ids=str)
def test_a_rank_that_is_slowed_is_named_in_events_and_log(workers, tmp_path: Path, parallel):
    for attempt in range(3):  # what else the machine does may hold up the other rank as much
        folder = tmp_path / str(attempt)
        run = dict(dir=str(folder), tensorboard=False, slow_ranks_every=3)
        recipe = write_recipe(tmp_path, parallel=parallel, run=run, train=dict(steps=13))
        metrics = workers.run(2, train_with_a_slow_rank, recipe, [])[0]
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        if [event["rank"] for event in events if event["event"] == "slow_rank"] == [1]:
            break
    else:
        pytest.fail(f"not named in {attempt + 1} runs")
    assert "rank 1 is slow" in (folder / "logs/rank_00000.log").read_text()
    shared = [m for m in metrics if "own_seconds" in m]
    assert [m["step"] for m in shared] == [6, 9, 12]
    for m in shared:
        assert m["own_seconds"] < m["own_seconds_max"] and m["own_seconds_max"] > 0.3
    assert read_metrics(folder / "metrics.jsonl") == metrics
