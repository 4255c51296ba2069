"""metrics.jsonl: cut back on resuming, torn lines, numbers that JSON does not have."""

import json
import os

import pytest

from megagap.errors import DataError
from megagap.observe.metrics import MetricsFile, TensorBoard, duration, read_metrics


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


def test_a_file_that_is_cut_back_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    path, synced, replaced = tmp_path / "metrics.jsonl", [], []
    write(path, range(1, 6))
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), fsync(file)))

    def replacing(new, old):
        replaced.append(os.stat(new).st_ino in synced)
        synced.clear()
        replace(new, old)

    monkeypatch.setattr(os, "replace", replacing)
    MetricsFile(path, after_step=3).close()
    assert replaced == [True] and synced == [os.stat(tmp_path).st_ino], "the file before, its folder after"


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b'{"step": 1}\n\0\0\0\n{"step": 2}\n', "has NUL bytes"),
        (b'{"step": 1}\nnonsense\n{"step": 2}\n', "is not valid JSON"),
        (b'{"step": 1}\n[3]\n{"step": 2}\n', "is not the record of a step"),
    ],
)
def test_a_damaged_line_is_told_with_how_to_be_rid_of_it(tmp_path, text, told):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(DataError) as error:
        read_metrics(tmp_path / "metrics.jsonl")
    assert f"metrics.jsonl:2 {told}" in str(error.value) and "sed -i 2d" in str(error.value)


@pytest.mark.parametrize("text", ["[model]\npreset = 'tiny'\n", '{"text": "a"}\n{"text": "b"}\n', "[1]\n\n"])
def test_no_line_of_another_file_is_to_be_deleted(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(DataError, match=r"recipe\.toml is not a run's metrics\.jsonl") as error:
        read_metrics(tmp_path / "recipe.toml")
    assert "sed" not in str(error.value)


@pytest.mark.parametrize("tail", [b"\0" * 100, b'{"step": 3, "lo\0\0\0', b'{"step"', b"\xff\xfe"])
def test_what_a_power_cut_left_at_the_end_is_cut_off_on_going_on(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(path, [])
    resumed = MetricsFile(path, after_step=2)
    resumed.write({"step": 3})
    resumed.close()
    assert len(path.read_bytes().splitlines()) == len(read_metrics(path))


def test_metrics_that_are_a_link_to_another_disk_stay_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "m").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "disk" / "m")
    write(tmp_path / "metrics.jsonl", [1])
    assert (tmp_path / "metrics.jsonl").is_symlink() and (tmp_path / "disk" / "m").read_text().count("\n") == 1


def test_tensorboard_reads_what_was_written_and_not_the_steps_made_again(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoard(tmp_path, after_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 1.0 / step, "mfu": None, "skipped": False})
    first.close()
    (written,) = tmp_path.iterdir()
    written.rename(tmp_path / "events.out.tfevents.0000000001.x")  # an earlier second
    again = TensorBoard(tmp_path, after_step=1)
    again.write({"step": 2, "loss": 7.0})
    again.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 7.0)]
    assert events.Tags()["scalars"] == ["loss", "skipped"]
