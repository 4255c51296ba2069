import os
import shutil
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


@pytest.mark.parametrize(("options", "stays"), [(["--build-lib", "build/lib"], True), (["--inplace"], False)])
def test_without_torch_the_kernels_of_a_checkout_go_only_where_it_is_built_itself(
    tmp_path: Path, options: list[str], stays: bool
):
    """A wheel is often built by a Python without torch, which must not harm the checkout that it is built in."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    kernels = tmp_path / "megagap/_C.some-platform.so"
    kernels.parent.mkdir()
    kernels.touch()
    (tmp_path / "without/torch").mkdir(parents=True)
    (tmp_path / "without/torch/__init__.py").write_text("raise ImportError")
    environment = {key: value for key, value in os.environ.items() if key != "MEGAGAP_BUILD"}
    environment["PYTHONPATH"] = str(tmp_path / "without")
    command = [sys.executable, "setup.py", "-q", "build_ext", *options]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "warning: megagap is installed without compiled kernels" in done.stderr, done.stderr
    assert kernels.exists() == stays
