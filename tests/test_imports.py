"""Imports point one way: a lower room never imports a higher one."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megagap"

# Rooms from the bottom up; rooms of one level may import each other, but not in a circle (checked by importing them).
LEVELS = [
    {"errors", "files", "run_files", "terminal", "timeline", "token_formats"},
    {"ops", "parallel"},
    {"config", "tokenizer"},
    {"model", "data", "optim", "observe", "checkpoint"},
    {"preprocess", "gather"},
    {"curate"},
    {"training", "resume", "process", "inference", "poison"},
    {"benchmark", "replay"},
    {"planning"},
    {"train"},
    {"commands"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Rooms of the package that a module imports anywhere in it, type-checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("megagap.")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_a_higher_room(path):
    if path.parent == PACKAGE and path.stem == "__init__":
        assert not imports(path)
        return
    for imported in imports(path):
        if imported != "_C":
            assert LEVEL[imported] <= LEVEL[room(path)], f"{room(path)} must not import {imported}"


@pytest.mark.parametrize(
    ("who", "forbidden"),
    [
        ("parallel", {"model"}),
        ("data", {"parallel", "config"}),
        ("model", {"data", "optim", "checkpoint", "observe"}),
        ("optim", {"data", "model", "checkpoint", "observe"}),
    ],
)
def test_rooms_that_must_not_know_each_other(who, forbidden):
    for path in (PACKAGE / who).rglob("*.py"):
        assert not imports(path) & forbidden, path


def test_settings_are_read_without_torch():
    """Placement and schedules, which they read, are arithmetic: an error in a recipe need not wait for torch."""
    program = "import sys, megagap.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_the_data_room_does_not_know_torch_distributed():
    for path in (PACKAGE / "data").rglob("*.py"):
        assert "distributed" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("megagap.checkpoint", ["load_model"]),
        ("megagap.config", ["load_recipe"]),
        ("megagap.data.indexed", ["IndexedDataset", "IndexedDatasetWriter"]),
        ("megagap.data.tokenizer", ["load_tokenizer"]),
        ("megagap.ops", ["rms_norm", "rotary"]),
        ("megagap.tokenizer", ["load_tokenizer"]),
    ],
)
def test_what_other_programs_import_stays_where_it_is(module, names):
    for name in names:
        assert callable(getattr(importlib.import_module(module), name))
