import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("rocm", "possible: cpu, cuda, hip"),
        pytest.param(
            "cuda", "is not a CUDA build", marks=pytest.mark.skipif(torch.version.cuda is not None, reason="it is one")
        ),
        pytest.param(
            "hip", "is not a ROCm build", marks=pytest.mark.skipif(torch.version.hip is not None, reason="it is one")
        ),
    ],
)
def test_a_target_that_cannot_be_built_is_an_error_that_says_why(target: str, message: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        env={**os.environ, "MEGAGAP_BUILD": target},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-1]  # torch may have warned before
    assert said.startswith(f"error: MEGAGAP_BUILD={target}: ") and message in said
