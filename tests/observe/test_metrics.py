"""metrics.jsonl: cut back on resuming, torn lines, numbers that JSON does not have."""

import json

import pytest

from megagap.errors import DataError
from megagap.observe.metrics import MetricsFile, duration, read_metrics


def write(path, steps):
    metrics = MetricsFile(path, after_step=0)
    for step in steps:
        metrics.write({"step": step, "loss": 1.0 / step})
    metrics.close()


def test_a_run_that_goes_on_after_step_3_keeps_the_records_up_to_3(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    resumed = MetricsFile(path, after_step=3)
    resumed.write({"step": 4})
    resumed.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


def test_a_line_torn_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_damaged_line_within_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        read_metrics(path)


def test_a_record_can_be_read_at_once(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_numbers_that_are_not_finite_become_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


@pytest.mark.parametrize(("seconds", "text"), [(12, "12s"), (200, "3m 20s"), (4320, "1h 12m")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
