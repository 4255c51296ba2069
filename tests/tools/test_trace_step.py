"""The trace as a user runs it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.launching import SECONDS
from tests.recipes import write_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), ROOT / "tools/trace_step.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=SECONDS)


def test_json_is_one_object_with_the_keys_of_the_contract_and_nothing_else(tmp_path):
    done = run(write_recipe(tmp_path), "--device", "a100", "--train.micro_batch_size", "4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["flops"] > 0 and report["step_seconds"] > 0 and report["tokens_per_second"] > 0
    assert set(report["mfu"]) == {"full", "causal"}
    assert report["host_syncs"] == 0 and report["peak_memory_bytes"] > 0
    assert {"matrix products", "attention", "loss", "norms and rotary", "optimizer"} < {
        part["kind"] for part in report["by_kind"]
    }
    assert all(set(part) == {"kind", "kernels", "flops", "bytes", "seconds"} for part in report["by_kind"])
    assert report["recipe"]["train"]["micro_batch_size"] == 4


def test_tables_and_the_picture_show_kinds_call_sites_and_assumptions(tmp_path):
    picture = tmp_path / "deep" / "step.png"
    done = run(write_recipe(tmp_path), "--world-size", "2", "--output", picture)
    assert done.returncode == 0, done.stderr
    for part in (
        "matrix products",
        "collectives",
        "parallel/tensor.py:",
        "MFU",
        "no host synchronisation",
        "data sheet",
    ):
        assert part in done.stdout
    assert "…" not in done.stdout  # nothing is cut off without a terminal
    assert picture.read_bytes().startswith(PNG)


def test_an_output_folder_gets_step_png(tmp_path):
    (tmp_path / "out").mkdir()
    assert run(write_recipe(tmp_path), "--output", tmp_path / "out", "--json").returncode == 0
    assert (tmp_path / "out/step.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h999"], "possible: h100, h200, a100, mi250x, mi300x, cpu"),
        (["--parallel.pp", "2", "--world-size", "2"], "parallel.pp = 2"),
        (["--world-size", "0"], "must be positive"),
        (["--bandwidth-tb", "nan"], "must be positive"),
        (["--product-tflops", "inf"], "must be positive"),
        (["--world-size", "3"], "global_batch_size"),
        (["--output", "x.docx"], "docx"),
        (["--output", "/proc/x.png"], "/proc"),
        (["--trainn.steps", "1"], "train"),
        (["--memory", "--sites", "3"], "apply to a trace only, not to --memory"),
        (["--memory", "--data.document_mask", "true"], "ask with --data.document_mask false"),
    ],
)
def test_faults_end_with_a_message_and_code_2(tmp_path, arguments, message):
    done = run(write_recipe(tmp_path), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert message in done.stderr and not done.stdout


def test_a_recipe_that_does_not_exist_is_named(tmp_path):
    done = run(tmp_path / "none.toml")
    assert done.returncode == 2 and "none.toml" in done.stderr and "Traceback" not in done.stderr
