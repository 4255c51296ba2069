"""The wheel, installed into an empty environment, does the README's main job from an empty folder.

Its dependencies come from the environment that runs the tests, instead of from a package index: a ``.pth`` file makes
them visible. It is built from a copy of the checkout, without a C++ compiler, hence computes with plain torch.
"""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megagap.commands import SUMMARIES
from megagap.observe.metrics import read_metrics
from megagap.terminal.programs import TOOLS
from tests.test_docs import README, blocks

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("megagap", "csrc", "examples", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NO_SOURCES = ("__pycache__", "*.so")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*NO_SOURCES))
        else:
            shutil.copy2(ROOT / name, source / name)
    (source / "build/lib/megagap").mkdir(parents=True)  # as an earlier build may have left it
    (source / "build/lib/megagap/removed.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", output]
    environment = {key: value for key, value in os.environ.items() if key != "MEGAGAP_BUILD"} | {"CXX": "false"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.glob("megagap-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    run_checked([sys.executable, "-m", "venv", "--without-pip", folder])
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python", "--disable-pip-version-check"]
    run_checked([*pip, "install", "--no-deps", "--no-index", wheel])
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path in site.getsitepackages() or "-packages" in Path(path).name]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in others))
    return folder


def run_checked(command: list[object]) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def shell(script: str, folder: Path, environment: Path) -> str:
    variables = {"PATH": f"{environment}/bin:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_the_command(script: str) -> str:
    """A script for a checkout, for the installed command and a small machine."""
    for subcommand, tool in TOOLS.items():
        script = script.replace(f"python tools/{tool}.py", f"megagap {subcommand}")
    script = script.replace("torchrun ", "python -m torch.distributed.run --standalone ")
    script = script.replace("-m megagap.train", "-m megagap train").replace("examples/recipes/", "")
    return script.replace("--megabytes 2", "--megabytes 0.5").replace("--max-tokens 20000", "--max-tokens 1000")


def test_the_wheel_holds_the_package_and_all_that_it_reads(wheel: Path):
    ignored = ("__pycache__", ".so")
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "megagap").rglob("*.*") if path.is_file()}
    expected = {name for name in package if not any(part in name for part in ignored)}
    recipes = ROOT / "examples/recipes"
    expected |= {f"megagap/recipes/{path.relative_to(recipes)}" for path in recipes.rglob("*.toml")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected and "megagap/py.typed" in names


@pytest.fixture(scope="module")
def job_done(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the installed command has done the README's main job."""
    folder = tmp_path_factory.mktemp("empty")
    for name in ("code", "gaperon-1b-one-gpu"):
        shell(f"megagap recipe {name} > {name}.toml", folder, environment)
    recipe = (folder / "code.toml").read_text(encoding="utf-8")
    (folder / "code.toml").write_text(recipe.replace("steps = 40", "steps = 6").replace("warmup_steps = 5", ""))
    job = with_the_command(blocks(README)["the main job"])
    assert "tools/" not in job and job.count("megagap ") >= 9
    where = shell("python -c 'import megagap; print(megagap.__file__)'", folder, environment)
    assert where.startswith(str(environment))
    shell(job, folder, environment)
    return folder


@pytest.mark.slow
def test_the_main_job_of_the_readme_through_the_installed_command(job_done: Path):
    for result in ("run/metrics.jsonl", "loss.png", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json"):
        assert (job_done / "runs/example" / result).stat().st_size > 0, result


@pytest.mark.long
def test_the_other_ways_to_start_it_and_the_other_jobs(job_done: Path, environment: Path):
    folder = job_done
    shell("megagap train code.toml --train.steps 7", folder, environment)
    torchrun = "python -m torch.distributed.run --standalone --nproc-per-node 2 --no-python"
    shell(f"{torchrun} megagap train code.toml --train.steps 8 --parallel.pp 2", folder, environment)
    assert [record["step"] for record in read_metrics(folder / "runs/example/run/metrics.jsonl")] == [*range(1, 9)]
    shell(with_the_command(blocks(README)["other jobs"]), folder, environment)
    sweep = "--warmup 0 --steps 1 --processes 2 --sweep parallel.tp=1,2"
    swept = shell(f"megagap benchmark-mfu code.toml {sweep}", folder, environment)
    assert "failed" not in swept and (folder / "runs/code_sweep/sweep.json").exists()


ASK = """
import gc, os, runpy, shutil, sys
import torch.distributed

command = shutil.which("megagap")
gc.freeze()
for subcommand in sys.argv[1:]:
    if not (child := os.fork()):
        os.dup2(os.open(subcommand, os.O_WRONLY | os.O_CREAT), 1)
        sys.argv = [command, subcommand, "--help"]
        try:
            runpy.run_path(command, run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
    assert os.waitpid(child, 0)[1] == 0, subcommand
"""
"""Calls the installed command with ``--help``, for each subcommand in a fork that has torch, which most would
import, and does not free it at its end."""


@pytest.mark.slow
def test_every_subcommand_is_there_and_says_how_it_was_called(environment: Path, tmp_path: Path):
    (tmp_path / "ask.py").write_text(ASK)
    shell(f"python ask.py {' '.join(SUMMARIES)}", tmp_path, environment)
    for subcommand in SUMMARIES:
        text = (tmp_path / subcommand).read_text()
        assert text.startswith(f"usage: megagap {subcommand} "), text
        assert f"\n  megagap {subcommand}" in text and "tools/" not in text and "examples/" not in text
