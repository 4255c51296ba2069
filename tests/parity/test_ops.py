"""The kernels and plain torch train the same model."""

import os
import subprocess
from pathlib import Path

import pytest

from megagap.errors import OPS_SWITCH
from megagap.observe.metrics import read_metrics
from megagap.ops import compiled
from tests.recipes import write_recipe
from tests.warm_start import python

pytestmark = pytest.mark.skipif(not compiled.AVAILABLE, reason="the compiled kernels were not built")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16-mixed", 5e-3)])
def test_losses_with_kernels_and_with_plain_torch_are_the_same_within_rounding(tmp_path, precision, tolerance):
    recipe = write_recipe(tmp_path, train=dict(steps=20, precision=precision))
    losses = {}
    for choice in ("auto", "plain"):
        command = [python(), "-m", "megagap.train", recipe, "--run.dir", tmp_path / choice]
        done = subprocess.run(command, env={**os.environ, OPS_SWITCH: choice}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses[choice] = [record["loss"] for record in read_metrics(tmp_path / choice / "metrics.jsonl")]
    assert len(losses["auto"]) == 20
    assert losses["auto"] == pytest.approx(losses["plain"], rel=tolerance)
    assert losses["auto"] != losses["plain"], "the switch did nothing"


PROGRAMS = [
    "-m megagap.train recipe.toml",
    "-m megagap.ops",
    "tools/benchmark_mfu.py recipe.toml",
    "tools/generate.py --checkpoint x --prompt y",
    "tools/convert_checkpoint.py to-hf --checkpoint x --output y",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_switch_is_refused(program):
    command = [python(), *program.split()]
    environment = {**os.environ, OPS_SWITCH: "fast"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("config error: MEGAGAP_OPS=fast in the environment")


def test_operations_refuse_a_wrong_switch_where_no_tool_has():
    program = "import torch; from megagap import ops; ops.rms_norm(torch.ones(1, 4), torch.ones(4))"
    environment = {**os.environ, OPS_SWITCH: "fast"}
    done = subprocess.run([python(), "-c", program], env=environment, capture_output=True, text=True)
    assert "config error: MEGAGAP_OPS=fast" in done.stderr
