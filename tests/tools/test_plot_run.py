"""The plotting tool as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "plot_run.py"
PNG = b"\x89PNG\r\n\x1a\n"


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120
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
    assert plot(some_run(tmp_path / "run"), "--key", "grad_norm").returncode == 0
    assert (tmp_path / "run" / "grad_norm.png").read_bytes().startswith(PNG)


def test_several_runs_are_told_apart_by_their_names(tmp_path):
    done = plot(some_run(tmp_path / "one"), some_run(tmp_path / "two"))
    assert "one: loss" in done.stdout and "two: loss" in done.stdout


def test_losses_that_are_not_finite_leave_gaps(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}])
    assert plot(run).returncode == 0


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
