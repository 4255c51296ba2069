"""``draw_schedule`` as a user runs it."""

import json
import subprocess
from pathlib import Path

import pytest

from megagap.observe.spans import span_file
from megagap.parallel.schedule import SCHEDULES
from tests.launching import SECONDS
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), ROOT / "tools/draw_schedule.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_json_is_one_object_with_bubble_and_live_activations_of_every_rank(schedule):
    done = run(schedule, "--stages", 4, "--microbatches", 8, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    bubble = {"gpipe": 3 / 11, "1f1b": 3 / 11, "interleaved": 3 / 19, "zb-h1": 3 / 27, "zb-v": 3 / 51}
    live = {"gpipe": [8] * 4, "1f1b": [4, 3, 2, 1], "interleaved": [11, 9, 7, 5], "zb-h1": [4] * 4, "zb-v": [8] * 4}
    assert report["bubble_fraction"] == pytest.approx(bubble[schedule])
    assert report["peak_live_activations"] == live[schedule]
    assert (report["schedule"], report["stages"], report["microbatches"]) == (schedule, 4, 8)
    assert report["chunks"] == SCHEDULES[schedule].default_chunks
    assert [len(rank) for rank in report["ranks"]] == [len(report["ranks"][0])] * 4 or schedule == "zb-h1"


def test_the_drawing_has_a_line_for_each_rank_and_each_action_at_its_time():
    done = run("1f1b", "--stages", 2, "--microbatches", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1f1b: 2 stages, 2 microbatches, 1 chunk per stage",
        "rank 0  F0 F1       B0---    B1---",
        "rank 1     F0 B0--- F1 B1---",
        "bubble: 33.3% of the time, mean over the ranks",
        "live activations at most: 2, 1",
    ]


@pytest.mark.parametrize("name", ["deep/zb-v.png", "zb-v", "."])
def test_the_image_is_written_as_it_is_named_and_into_a_folder_as_schedule_png(tmp_path, name):
    done = run("zb-v", "--stages", 3, "--microbatches", 5, "--output", tmp_path / name)
    assert done.returncode == 0, done.stderr
    written = {"deep/zb-v.png": "deep/zb-v.png", "zb-v": "zb-v.png", ".": "schedule.png"}[name]
    assert (tmp_path / written).read_bytes().startswith(PNG)
    assert "I0b" in done.stdout


SHAPE = ["--stages", "4", "--microbatches", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2f2b", *SHAPE], "invalid choice: '2f2b'"),
        ([], "give a SCHEDULE with --stages and --microbatches, or --run RUN"),
        (["1f1b", "--stages", "4"], "give a SCHEDULE with --stages and --microbatches"),
        (["1f1b", *SHAPE, "--chunks", "2"], "--chunks 2: 1f1b has 1 per rank; for 2: gpipe, interleaved, zb-v"),
        (["zb-v", *SHAPE, "--chunks", "3"], "--chunks 3: zb-v has 2 per rank; for 3: gpipe, interleaved"),
        (["1f1b", "--stages", "0", "--microbatches", "8"], "must be at least 1"),
        (["1f1b", "--stages", "4", "--microbatches", "-1"], "must be at least 1"),
        (["gpipe", *SHAPE, "--chunks", "0"], "must be at least 1"),
        (["gpipe", "--stages", "four", "--microbatches", "8"], "invalid int value"),
        (["gpipe", "--stages", str(10**12), "--microbatches", str(10**12)], "must be at most 50,000"),
        (["gpipe", *SHAPE, "--step", "3"], "--step applies to --run only"),
        (["gpipe", "--run", "runs/x"], "--run has its own schedule"),
        (["--run", "nowhere"], "nowhere has no spans/rank_00000.jsonl: no spans were recorded"),
        (["gpipe", *SHAPE, "--output", "x.docx"], "docx"),
        (["gpipe", *SHAPE, "--output", "/proc/x.png"], "/proc"),
    ],
)
def test_faults_end_with_a_message_and_code_2(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stderr and not done.stdout


@pytest.fixture(scope="module")
def recorded(workers, tmp_path_factory):
    """A run of two pipeline ranks and two replicas with spans."""
    folder = tmp_path_factory.mktemp("recorded")
    recipe = write_recipe(folder, train=dict(steps=3))
    overrides = ["parallel.pp=2", "parallel.vpp=2", "run.spans=true", f"run.dir={folder / 'run'}"]
    workers.run(4, train_recipe, recipe, overrides)
    return folder / "run"


def test_measured_times_of_a_run_are_drawn_like_a_schedule(recorded, tmp_path):
    done = run("--run", recorded, "--step", 2, "--output", tmp_path / "step.png")
    assert done.returncode == 0, done.stderr
    assert f"{recorded}, step 2: interleaved, measured" in done.stdout and (tmp_path / "step.png").stat().st_size
    done = run("--run", recorded, "--json")
    report = json.loads(done.stdout)
    assert (report["step"], report["stages"], report["chunks"], report["schedule"]) == (3, 2, 2, "interleaved")
    assert 0 < report["bubble_fraction"] < 1 and report["peak_live_activations"] == [4, 3]
    assert all(0 <= action["start"] <= action["end"] <= report["makespan"] + 1e-9 for action in report["ranks"][0])


@pytest.mark.parametrize(
    ("arguments", "damage", "message"),
    [
        (["--step", "9"], None, "has no step 9; it has steps 1 to 3"),
        ([], "{]", "is not a span"),
        ([], '{"name": "forward", "step": 1, "start": 2.0, "end": 1.0}', "it ends before it starts"),
        ([], '{"name": "forward", "step": 1, "start": "x", "end": 1.0}', "is not a span"),
        ([], "[]", "is not a span"),
        ([], '{"name": "forward", "step": 1, "start": 1.0, "end": Infinity, "microbatch": 0, "chunk": 0}', "finite"),
        ([], '{"name": "forward", "step": 1, "start": 1.0, "end": 2.0, "microbatch": "x"}', "microbatch"),
        ([], '{"first_step": 1, "pipeline": ["x"]}', "is not a span"),
        ([], "[" * 100_000, "is not a span"),
        (["--step", "7"], '{"name": "wait", "step": 7, "start": 1.0, "end": 2.0}', "a rank without actions"),
    ],
)
def test_faults_of_a_recording_name_file_line_and_step(recorded, tmp_path, arguments, damage, message):
    copy = tmp_path / "copy"
    for rank in (0, 2):
        lines = span_file(recorded, rank).read_text().splitlines()
        path = span_file(copy, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines if damage is None else [lines[0], damage, *lines[1:]]))
    done = run("--run", copy, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stderr and ("rank_00000.jsonl" in done.stderr or "step 7" in done.stderr)


def test_a_rank_whose_spans_are_missing_is_named(recorded, tmp_path):
    copy = span_file(tmp_path, 0)
    copy.parent.mkdir()
    copy.write_text(span_file(recorded, 0).read_text())
    done = run("--run", tmp_path)
    assert done.returncode == 2 and "has no spans/rank_00002.jsonl" in done.stderr
    lines = span_file(recorded, 2).read_text().splitlines()
    span_file(tmp_path, 2).write_text("\n".join(line for line in lines if '"step": 3' not in line))
    assert "lacks step 3" in run("--run", tmp_path).stderr
