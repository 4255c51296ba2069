"""The script for a GPU runs whole on a machine without one, at small sizes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launching import SECONDS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script is run by itself")


def run(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MEGAGAP_PYTHON": sys.executable, "PYTHONPATH": ""}
    command = ["bash", "tests/gpu/run_all.sh", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.long
def test_every_stage_that_a_cpu_can_run_passes_and_leaves_its_report(tmp_path):
    """In a copy, which it builds in."""
    checkout = tmp_path / "megagap"
    for name in ("megagap", "csrc", "tests", "tools", "examples"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    done = run(checkout, "--output", str(tmp_path / "reports"), "--seconds", "800")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch sees no GPU" in done.stdout and "all passed; reports are in" in done.stdout
    reports = {path.name for path in (tmp_path / "reports").iterdir()}
    assert {"machine.txt", "build.txt", "training.txt", "mfu.txt", "benchmark.json", "kernels.txt"} <= reports
    assert list(checkout.glob("megagap/_C*.so")), "it was not built"


def test_what_has_no_time_left_is_named_and_fails(tmp_path):
    done = run(ROOT, "--output", str(tmp_path), "--seconds", "1", "--only", "mfu kernels")
    assert done.returncode == 1
    assert "mfu (no time left)" in done.stderr and "kernels (no time left)" in done.stderr
