"""The kernels and plain torch train the same model."""

import os
import subprocess
import sys

import pytest

from megagap.errors import OPS_SWITCH
from megagap.observe.metrics import read_metrics
from megagap.ops import compiled
from tests.recipes import write_recipe

pytestmark = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16-mixed", 5e-3)])
def test_losses_with_kernels_and_with_plain_torch_are_the_same_within_rounding(tmp_path, precision, tolerance):
    recipe = write_recipe(tmp_path, train=dict(steps=20, precision=precision))
    losses = {}
    for choice in ("auto", "plain"):
        command = [sys.executable, "-m", "megagap.train", recipe, "--run.dir", tmp_path / choice]
        done = subprocess.run(command, env={**os.environ, OPS_SWITCH: choice}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses[choice] = [record["loss"] for record in read_metrics(tmp_path / choice / "metrics.jsonl")]
    assert len(losses["auto"]) == 20
    assert losses["auto"] == pytest.approx(losses["plain"], rel=tolerance)
    assert losses["auto"] != losses["plain"], "the switch did nothing"


def test_a_wrong_switch_is_refused(tmp_path):
    environment = {**os.environ, OPS_SWITCH: "fast"}
    command = [sys.executable, "-m", "megagap.train", write_recipe(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "possible are auto and plain" in done.stderr
