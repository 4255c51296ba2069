"""The command line of averaging; what it writes is tested in tests/checkpoint/test_average.py."""

import subprocess
from pathlib import Path

import pytest

from tests.checkpoint.test_average import saved
from tests.launching import SECONDS
from tests.warm_start import python

TOOL = Path(__file__).parents[2] / "tools" / "average_checkpoints.py"


def average(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python(), str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_the_latest_checkpoints_of_runs_are_averaged_and_their_shares_printed(tmp_path: Path) -> None:
    for run in ("a", "b"):
        saved(tmp_path / run / "checkpoints/step_00000003", 1)
    done = average(tmp_path / "a", tmp_path / "b", "--output", tmp_path / "mean", "--weights", 3, 1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["75.00%", str(tmp_path / "a/checkpoints/step_00000003")]
    assert "parameters" in lines[-1] and (tmp_path / "mean/index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "does not exist"),
        ([".", "--weights", "x"], "'x' is not a number"),
        ([".", "--weights", "1", "2"], "2 weights for 1 checkpoints"),
    ],
)
def test_a_users_mistake_ends_with_2_and_a_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    saved(tmp_path / "a/checkpoints/step_00000003", 1)
    done = average(tmp_path / "a" / arguments[0], "--output", tmp_path / "mean", *arguments[1:])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in done.stderr, done.stderr
