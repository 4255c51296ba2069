"""The plotting tool as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagap.errors import DataError
from tools import plot_run

TOOL = Path(__file__).parents[2] / "tools" / "plot_run.py"
PNG = b"\x89PNG\r\n\x1a\n"


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def write_run(folder: Path, records: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def some_run(folder: Path) -> Path:
    records: list[dict[str, object]] = [
        {"step": step, "loss": 8.0 / step, "grad_norm": 1.0, "mfu": None, "skipped": False} for step in range(1, 11)
    ]
    records[4]["validation_loss/fr"] = 2.5
    records[9]["validation_loss/fr"] = 1.5
    return write_run(folder, records)


def test_losses_are_drawn_in_the_terminal_and_as_png(tmp_path):
    done = plot(some_run(tmp_path / "run"), "--output", tmp_path / "picture.png")
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout and "validation_loss/fr" in done.stdout
    assert "\x1b" not in done.stdout  # colours are for terminals
    assert (tmp_path / "picture.png").read_bytes().startswith(PNG)


def test_image_goes_into_the_run_directory_unless_told_otherwise(tmp_path):
    run = some_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    assert plot(run, "--key", "grad_norm").returncode == plot(run, "--output", tmp_path / "other").returncode == 0
    assert (tmp_path / "run" / "grad_norm.png").read_bytes().startswith(PNG)
    assert (tmp_path / "other" / "loss.png").read_bytes().startswith(PNG)


def test_several_runs_are_told_apart_by_their_names(tmp_path):
    done = plot(some_run(tmp_path / "one"), some_run(tmp_path / "two"))
    assert "one: loss" in done.stdout and "two: loss" in done.stdout


def test_losses_that_are_not_finite_leave_gaps(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}])
    assert plot(run).returncode == 0


def test_an_output_without_ending_becomes_a_png_and_is_named_so(tmp_path):
    done = plot(some_run(tmp_path / "run"), "--output", tmp_path / "deep" / "picture")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deep" / "picture.png").read_bytes().startswith(PNG)
    assert "picture.png" in done.stderr and [path.name for path in (tmp_path / "deep").iterdir()] == ["picture.png"]


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    run = some_run(tmp_path / "run")
    (tmp_path / "file").touch()
    for output in ("file/picture.png", "picture.xyz"):
        done = plot(run, "--output", tmp_path / output)
        assert done.returncode == 2 and "data error: " in done.stderr and "Traceback" not in done.stderr
        assert str((tmp_path / output).parent) in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (b"", "is empty"),
        (b'{"step": 1, "lo', "is empty, or has no whole record"),
        (b"[1]\n", "metrics.jsonl:1 is not the record of a step"),
        (b'{"step": 1, "loss": 2}\n[1]\n', "metrics.jsonl:2 is not the record of a step"),
        (b'{"loss": 2}\n{"step": 2}\n', "metrics.jsonl:1 is not the record of a step"),
        (b'{"step": "1", "loss": 2}\n', "metrics.jsonl:1 is not the record of a step"),
        (b'\xff\xfe\n{"step": 2}\n', "metrics.jsonl:1 is not valid JSON"),
        (b"[" * 100_000 + b'\n{"step": 2}\n', "metrics.jsonl:1 is not valid JSON"),
        (b'{"step": 1}\n', "no numbers named 'loss'"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", "no numbers named 'loss'"),
        (b'{"step": 1' + b"0" * 400 + b', "loss": 1}\n', "is empty, or has no whole record"),
    ],
    ids=range(11),
)
def test_metrics_that_are_none_are_named_without_a_traceback(tmp_path, metrics, message):
    (write_run(tmp_path / "run", []) / "metrics.jsonl").write_bytes(metrics)
    with pytest.raises(DataError) as error:
        plot_run.curves_of(tmp_path / "run", "loss", named=False)
    assert message in str(error.value)


def test_a_folder_in_place_of_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    done = plot(tmp_path)
    assert done.returncode == 2 and "cannot read" in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_drawn_is_named_without_a_traceback(tmp_path):
    empty = write_run(tmp_path / "empty", [])
    broken = write_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").write_text("no json\n{}\n")
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((empty,), "is empty"),
        ((broken,), "metrics.jsonl:1"),
        ((some_run(tmp_path / "run"), "--key", "los"), "possible: grad_norm, loss, validation_loss/fr"),
    ):
        done = plot(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr
