"""Curves that are drawn and compared, against sums by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megagap.errors import DataError
from megagap.observe.curves import Curve, differences, read_curves


def write_run(folder: Path, records: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def losses(folder: Path, values: dict[int, float], seconds: float = 1.0) -> Path:
    return write_run(folder, [{"step": s, "loss": value, "step_seconds": seconds} for s, value in values.items()])


def test_records_before_the_first_step_stand_at_0_of_every_axis(tmp_path):
    records: list[dict[str, object]] = [{"step": 0, "validation_loss": 3.0, "validation_loss/fr": 3.0}]
    for step in (1, 2):
        progress = {"consumed_tokens": step * 8, "consumed_samples": step * 2, "step_seconds": 1800.0}
        records.append({"step": step, "loss": 1.0, "validation_loss/fr": None} | progress)
    records[2]["validation_loss/fr"] = 2.0
    run = write_run(tmp_path / "run", records)
    for axis, at in (("step", [1, 2]), ("tokens", [8, 16]), ("samples", [2, 4]), ("hours", [0.5, 1.0])):
        training, validation = read_curves(run, "loss", axis).curves
        assert training.x.tolist() == at and training.y.tolist() == [1, 1]
        assert validation.x.tolist() == [0, at[-1]] and validation.y.tolist() == [3, 2]
        assert (training.is_evaluated, validation.is_evaluated) == (False, True)


def test_an_axis_that_was_not_recorded_is_refused_with_those_that_were(tmp_path):
    run = losses(tmp_path / "run", {1: 2.0})
    with pytest.raises(DataError, match=r"no consumed_tokens, which --x tokens needs\n  possible: step, hours"):
        read_curves(run, "loss", "tokens")


def test_the_average_is_that_of_exponential_weights():
    y = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    smoothed = Curve("loss", np.arange(5.0), y).smoothed(2.5)
    for i, mean in enumerate(smoothed.y):
        weights = [math.exp(-(i - j) / 2.5) for j in range(i + 1)]
        assert mean == pytest.approx(np.average(y[: i + 1], weights=weights))
    assert Curve("loss", np.arange(5.0), y).smoothed(1e300).y == pytest.approx(np.cumsum(y) / np.arange(1, 6))
    assert Curve("loss", np.arange(5.0), y).smoothed(1e-9).y == pytest.approx(y)


def test_the_difference_is_the_second_minus_the_first_at_common_steps(tmp_path):
    first = read_curves(losses(tmp_path / "a", {1: 1.0, 2: 2.0, 4: 4.0}), "loss")
    second = read_curves(losses(tmp_path / "b", {2: 1.5, 3: 9.0, 4: 5.0}), "loss")
    (difference,) = differences(first, second, "step")
    assert difference.x.tolist() == [2, 4] and difference.y.tolist() == [-0.5, 1.0]
    assert difference.mean == 0.25 and difference.largest == (1.0, 4.0)


def test_validation_sources_are_compared_as_far_as_both_runs_have_them(tmp_path):
    runs = []
    for name, source in (("a", "fr"), ("b", "en")):
        records = [{"step": 1, "loss": 1.0, f"validation_loss/{source}": 1.0, "validation_loss/code": 2.0}]
        runs.append(read_curves(write_run(tmp_path / name, records), "loss"))
    assert [difference.key for difference in differences(runs[0], runs[1], "step")] == ["loss", "validation_loss/code"]


def test_hours_are_compared_by_interpolating_the_first_run(tmp_path):
    first = read_curves(losses(tmp_path / "a", {1: 1.0, 2: 3.0}, seconds=3600), "loss", "hours")
    second = read_curves(losses(tmp_path / "b", {1: 5.0, 2: 5.0, 3: 5.0}, seconds=1800), "loss", "hours")
    (difference,) = differences(first, second, "hours")
    assert difference.x.tolist() == [1.0, 1.5] and difference.y.tolist() == [4.0, 3.0]


def test_runs_without_a_common_step_are_refused_with_what_each_has(tmp_path):
    first = read_curves(losses(tmp_path / "a", {1: 1.0, 2: 2.0}), "loss")
    second = read_curves(losses(tmp_path / "b", {3: 1.0}), "loss")
    with pytest.raises(DataError, match=r"no step in common.*a has steps 1 to 2, .*b has step 3\n"):
        differences(first, second, "step")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (b"", "is empty"),
        (b'{"step": 1, "lo', "is empty or has no complete record"),
        (b"[1]\n", "metrics.jsonl:1 is not the record of a step"),
        (b'{"step": 1, "loss": 2}\n[1]\n', "metrics.jsonl:2 is not the record of a step"),
        (b'{"loss": 2}\n{"step": 2}\n', "metrics.jsonl:1 is not the record of a step"),
        (b'{"step": "1", "loss": 2}\n', "metrics.jsonl:1 is not the record of a step"),
        (b'\xff\xfe\n{"step": 2}\n', "metrics.jsonl:1 is not valid JSON"),
        (b"[" * 100_000 + b'\n{"step": 2}\n', "metrics.jsonl:1 is not valid JSON"),
        (b'{"step": 1, "loss": NaN}\n', "no numbers named 'loss'\n  possible: none"),
        (b'{"step": 1}\n', "no numbers named 'loss'"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", "no numbers named 'loss'"),
        (b'{"step": 1' + b"0" * 400 + b', "loss": 1}\n', "is empty or has no complete record"),
    ],
    ids=range(12),
)
def test_metrics_that_cannot_be_read_are_named(tmp_path, metrics, message):
    (write_run(tmp_path / "run", []) / "metrics.jsonl").write_bytes(metrics)
    with pytest.raises(DataError) as error:
        read_curves(tmp_path / "run", "loss")
    assert message in str(error.value)
