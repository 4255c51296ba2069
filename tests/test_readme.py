"""The README's commands work, as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def block(name: str) -> str:
    """The shell block behind ``<!-- tested: NAME -->``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- tested: {re.escape(name)} -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert found, name
    return found[1]


def run(script: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_main_job_by_hand(tmp_path):
    for name in ("examples", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    run(block("the main job"), tmp_path)
    for result in ("run/metrics.jsonl", "loss.png", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json"):
        assert (tmp_path / "runs/example" / result).stat().st_size > 0, result


def test_the_training_path_can_be_read_in_an_afternoon():
    assert 1500 < int(run(block("line count"), ROOT)) < 6000
