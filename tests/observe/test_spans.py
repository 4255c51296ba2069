"""Spans are written as they were, of all processes alike, and cost nothing where they are off."""

import json
from contextlib import closing, contextmanager, suppress

import pytest

from megagap.errors import DataError
from megagap.observe.spans import BUFFERED_LINES, HostClock, Recording, read_step, span_file
from megagap.parallel.spans import Spans

START = {"first_step": 1, "processes": 1, "pipeline": [0], "schedule": "1f1b", "chunks": 1}


class DelayedClock:
    """Like a GPU's: marks are reached some time after they were made, and read in their order."""

    def __init__(self) -> None:
        self.made, self.reached, self.read = 0, 0, 0

    def mark(self) -> list[int]:
        self.made += 1
        return [self.made]

    def has_passed(self, mark: list[int]) -> bool:
        return mark[0] <= self.reached

    def seconds(self, mark: list[int]) -> float:
        self.read += 1
        assert mark[0] == self.read, "not in the order in which they were made"
        return float(mark[0])


@contextmanager
def recorded(path, rank=0, clock=None, start=START):
    """Spans that are recorded there."""
    spans = Spans()
    with closing(Recording(path, rank, clock or HostClock(), start)) as recording, spans.heard_by(recording):
        yield spans


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_span_has_name_rank_step_start_end_and_what_it_was_given(tmp_path):
    with recorded(span_file(tmp_path, 3), 3, DelayedClock()) as spans:
        spans.begin_step(7)
        with spans.span("forward", microbatch=1, chunk=0):
            pass
    start, span = lines(span_file(tmp_path, 3))
    assert start == START
    assert span == {"name": "forward", "rank": 3, "step": 7, "start": 1.0, "end": 2.0, "microbatch": 1, "chunk": 0}


def test_nothing_waits_for_a_device_that_is_behind(tmp_path):
    clock = DelayedClock()
    with recorded(span_file(tmp_path, 0), clock=clock) as spans:
        for step in (1, 2, 3):
            spans.begin_step(step)
            with spans.span("forward"), spans.wait("wait"):
                pass
            clock.reached = clock.made - 6  # one and a half steps behind
        assert clock.read <= clock.reached
    assert [(span["name"], span["step"]) for span in lines(span_file(tmp_path, 0))[1:]] == [
        (name, step) for step in (1, 2, 3) for name in ("wait", "forward")
    ]


def test_a_block_that_raises_is_recorded_too(tmp_path):
    with recorded(span_file(tmp_path, 0)) as spans, suppress(ValueError), spans.span("forward"):
        raise ValueError
    assert len(lines(span_file(tmp_path, 0))) == 2


def test_lines_are_buffered_over_steps(tmp_path):
    with recorded(span_file(tmp_path, 0)) as spans:
        steps = 0
        while len(lines(span_file(tmp_path, 0))) == 1:
            steps += 1
            spans.begin_step(steps)
            for _ in range(BUFFERED_LINES // 4):
                with spans.span("forward"):
                    pass
    assert steps == 5


def test_collectives_and_what_is_not_to_be_heard_are_left_out(tmp_path):
    with recorded(span_file(tmp_path, 0)) as spans:
        for outer in (spans.collective("all-reduce", "tp"), spans.span("checkpoint"), spans.unheard()):
            with outer, spans.span("forward"):
                pass
    assert [span["name"] for span in lines(span_file(tmp_path, 0))[1:]] == ["forward", "checkpoint"]


def record(path, steps, start=START):
    with recorded(path, start=start) as spans:
        for step in steps:
            spans.begin_step(step)
            with spans.span("forward", microbatch=step, chunk=0):
                pass


def test_of_a_step_that_was_made_again_the_last_time_counts(tmp_path):
    record(span_file(tmp_path, 0), (1, 2, 3))
    record(span_file(tmp_path, 0), (3, 4), {**START, "schedule": "zb-h1"})
    assert read_step(tmp_path).step == 4
    again = read_step(tmp_path, 3)
    assert again.start.schedule == "zb-h1" and len(again.ranks[0]) == 1
    assert read_step(tmp_path, 2).start.schedule == "1f1b"


def test_a_last_line_cut_short_by_a_kill_is_left_out(tmp_path):
    record(span_file(tmp_path, 0), (1, 2))
    with span_file(tmp_path, 0).open("a") as file:
        file.write('{"name": "forw')
    assert read_step(tmp_path).step == 2


def test_a_file_without_spans_yet_says_when_they_are_written(tmp_path):
    record(span_file(tmp_path, 0), ())
    with pytest.raises(DataError, match="has no spans yet"):
        read_step(tmp_path)
