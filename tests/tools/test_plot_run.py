"""The plotting tool as a user runs it."""

import json
import subprocess
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb

from megagap.commands import plot as plot_run
from megagap.observe.curves import Curve, Difference
from tests.launching import SECONDS
from tests.warm_start import python

TOOL = Path(__file__).parents[2] / "tools" / "plot_run.py"
PNG = b"\x89PNG\r\n\x1a\n"


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python(), str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS)


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


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    done = plot(some_run(tmp_path / "a/run"), some_run(tmp_path / "b/run"))
    assert f"{tmp_path}/a/run: loss" in done.stdout and f"{tmp_path}/b/run: loss" in done.stdout


def test_the_name_of_a_run_is_shown_whole_however_long_and_whatever_is_in_it(tmp_path):
    names = ["a" * 150, "_lr_$3e-4$_[bold]_:smile:"]
    done = plot(*(some_run(tmp_path / name) for name in names), "--difference")
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"{name}: validation_loss/fr\n" in done.stdout
    assert f"{names[1]} minus {names[0]}\n" in done.stdout


def lines_of(run_count: int, smooth: float = 0.0, compared: bool = False):
    """The image's panels: the lines of each."""
    x = np.arange(1.0, 5.0)
    curves = [Curve("loss", x, 1 / x), Curve("validation_loss/fr", x[1::2], x[1::2]), Curve("validation_loss/en", x, x)]
    runs = [plot_run.Run(f"run {i}", i, curves) for i in range(run_count)]
    differences = [Difference("loss", x, x), Difference("validation_loss/fr", x[1::2], x[1::2])] if compared else []
    figure = plot_run._figure(runs, differences, "loss", "tokens", smooth)
    return [axes.get_lines() for axes in figure.axes]


def test_a_run_has_one_colour_and_its_sources_have_marks_of_their_own():
    (lines,) = lines_of(2)
    colours = [to_rgb(line.get_color()) for line in lines]
    assert colours[:3] == [colours[0]] * 3 and colours[3:] == [colours[3]] * 3 and colours[0] != colours[3]
    marks = [line.get_marker() for line in lines]
    assert marks[:3] == marks[3:] and marks[0] == "None" and len({*marks[:3]}) == 3
    assert [line.get_linestyle() for line in lines[:3]] == ["-", "--", "--"]
    assert [line.get_label() for line in lines[:2]] == ["run 0: loss", "run 0: validation_loss/fr"]


def test_smoothing_draws_the_average_over_the_faint_curve_and_leaves_validation_alone():
    (lines,) = lines_of(1, smooth=3)
    assert len(lines) == 4
    assert lines[0].get_alpha() < 0.5 and lines[0].get_color() == lines[1].get_color()
    assert lines[0].get_ydata()[-1] < lines[1].get_ydata()[-1] < lines[1].get_ydata()[0]
    assert lines[2].get_ydata().tolist() == [2, 4]


def test_the_difference_has_a_panel_of_its_own():
    above, below = lines_of(2, compared=True)
    assert len(above) == 6
    assert [line.get_label() for line in below[:2]] == ["loss", "validation_loss/fr"]


def test_the_difference_of_two_runs_is_summarised_in_the_terminal(tmp_path):
    first = write_run(tmp_path / "a", [{"step": step, "loss": 2.0} for step in range(1, 5)])
    second = write_run(tmp_path / "b", [{"step": step, "loss": 2.0 - (step == 3)} for step in range(2, 9)])
    done = plot(first, second, "--difference", "--output", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert "b minus a" in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("│ loss")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["loss", "3", "-0.3333", "-1", "3"]
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_every_axis_is_drawn(tmp_path):
    records: list[dict[str, object]] = [{"step": 0, "validation_loss/fr": 3.0}]
    for step in range(1, 5):
        progress = {"consumed_tokens": step * 10**9, "consumed_samples": step * 1000, "step_seconds": 60.0}
        records.append({"step": step, "loss": 1.0 / step} | progress)
    records[-1]["validation_loss/fr"] = 1.0
    for axis in ("step", "tokens", "samples", "hours"):
        done = plot(write_run(tmp_path / axis, records), "--x", axis, "--smooth", 2)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / axis / "loss.png").read_bytes().startswith(PNG)


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


def test_a_folder_in_place_of_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    done = plot(tmp_path)
    assert done.returncode == 2 and "cannot read" in done.stderr and "Traceback" not in done.stderr


def test_what_cannot_be_drawn_is_named_without_a_traceback(tmp_path):
    empty = write_run(tmp_path / "empty", [])
    broken = write_run(tmp_path / "broken", [])
    (broken / "metrics.jsonl").write_text("no json\n{}\n")
    run = some_run(tmp_path / "run")
    later = write_run(tmp_path / "later", [{"step": 11, "loss": 1.0}])
    for arguments, message in (
        ((tmp_path / "nowhere",), "nowhere does not exist"),
        ((empty,), "is empty"),
        ((broken,), "metrics.jsonl:1"),
        ((run, "--key", "los"), "possible: grad_norm, loss, validation_loss/fr"),
        ((run, "--x", "tokens"), "has no consumed_tokens, which --x tokens needs\n  possible: step"),
        ((run, "--difference"), "--difference compares two runs; 1 given"),
        ((run, later, "--difference"), "no step in common"),
        ((run, "--smooth", "0"), "must be a number of points above 0"),
        ((run, "--smooth", "nan"), "must be a number of points above 0"),
        ((run, "--x", "days"), "invalid choice: 'days'"),
    ):
        done = plot(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr
