"""The worked examples of CONTRIBUTING.md and docs/extending.md work as they stand there.

Each is applied to a copy of the tree; its tests fail without the change to the package and pass with it. With it, most
are tried under ``-m long``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagap.ops import compiled
from tests.warm_start import python
from tests.worked_examples import PAGES, ROOT, Example, apply, read_examples, record

EXAMPLES = read_examples()
COPIED = ("megagap", "csrc", "tests", "tools", "docs", "setup.py", "pyproject.toml", ".gitignore", "CONTRIBUTING.md")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout, with the compiled kernels, outside of any repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return copy_to(tmp_path / "tree")


def copy_to(tree: Path) -> Path:
    tree.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, tree / name)
    return tree


def pytest_in(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python(), "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def arguments_of(example: Example) -> list[str]:
    """What the page gives to ``./tests/run.sh``, which would make an environment first."""
    command = example.command.split()
    assert command[0] == "./tests/run.sh" and all((ROOT / test).parent.is_dir() for test in command[1:])
    return command[1:]


def test_the_pages_have_an_example_of_each_kind():
    assert EXAMPLES.keys() == {"setting", "parameter", "schedule", "architecture", "optimizer", "kernel"}
    assert all(example.tests and example.package for example in EXAMPLES.values())


def test_the_tests_of_every_example_fail_without_its_change(tree: Path):
    for example in EXAMPLES.values():
        apply(example, "tests", tree)
    files = [file for example in EXAMPLES.values() for file in example.files("tests")]
    done = pytest_in(tree, "--continue-on-collection-errors", *files)
    failed = set(re.findall(r"^(?:FAILED|ERROR) ([\w/.]+)", done.stdout, re.MULTILINE))
    assert failed == set(files), done.stdout


@pytest.mark.parametrize(
    "name", [name if name == "setting" else pytest.param(name, marks=pytest.mark.long) for name in EXAMPLES]
)
def test_the_tests_of_an_example_pass_with_its_change(name: str, tree: Path):
    if needs_compiler(EXAMPLES[name]) and not compiled.AVAILABLE:
        pytest.skip("there is no compiler, or MEGAGAP_OPS=plain")
    apply(EXAMPLES[name], "all", tree)
    require_tests_pass(tree, EXAMPLES[name])


def needs_compiler(example: Example) -> bool:
    return any(file.startswith("csrc/") for file in example.files("package"))


def require_tests_pass(tree: Path, example: Example) -> None:
    if needs_compiler(example):
        build(tree)
    done = pytest_in(tree, *arguments_of(example))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout, done.stdout


def build(tree: Path) -> None:
    """Without optimisation and symbols for a debugger, which take most of a compiler's time."""
    compiler = tree / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0 -g0\n')
    compiler.chmod(0o700)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"MEGAGAP_BUILD": "cpu", "CXX": str(compiler)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_applied_example_is_recorded_as_the_page_has_it(name: str, tree: Path):
    """So that ``record`` can write it anew after the code around it has moved."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "before"]):
        subprocess.run(["git", *identity, *command], cwd=tree, check=True)
    apply(EXAMPLES[name], "all", tree)
    record(EXAMPLES[name], tree)
    for page in PAGES:
        assert (tree / page).read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")
    apply(EXAMPLES[name], "all", tree, "--reverse")
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=tree, capture_output=True, text=True, check=True)
    assert not changed.stdout
