"""What ``--help`` says: every setting with what it takes, and only files that exist."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from megagap.commands import SUMMARIES, call
from megagap.commands.recipe import recipes
from megagap.config import describe_settings
from megagap.config.settings import PLANNED, SECTIONS
from megagap.terminal.programs import TOOLS, CalledAs
from megagap.train import parse_arguments

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    "tests/run.sh",
    "examples/quickstart.sh",
    "examples/gaperon_mini/run.sh",
    "examples/multi_node/launch.sh",
    "tests/gpu/run_all.sh",
    ".ci/run",
)


def help_of(subcommand: str, called_as: CalledAs, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        if called_as is not CalledAs.TOOL:
            call(subcommand, called_as, ["--help"])
        elif subcommand == "train":
            parse_arguments(["--help"])
        else:
            runpy.run_path(str(ROOT / f"tools/{TOOLS[subcommand]}.py"))["main"](["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def named_files(text: str) -> set[str]:
    """The files that a help text names, without placeholders and those that its examples write."""
    written = set(re.findall(r"--(?:recipe|output) (\S+)", text))
    named = set(re.findall(r"(?<![\w./{*-])[\w./-]+\.(?:toml|md|py|sh|sbatch)\b", text)) - written
    return {name for name in named if name == "README.md" or not (Path(name).stem.isupper() or name[:5] == "runs/")}


@pytest.mark.parametrize("subcommand", [*TOOLS, "train"])
def test_help_names_only_files_that_exist(subcommand, capsys):
    missing = [name for name in named_files(help_of(subcommand, CalledAs.TOOL, capsys)) if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("subcommand", SUMMARIES)
def test_help_of_the_command_names_files_of_the_wheel_or_says_where_they_are(subcommand, capsys):
    text = help_of(subcommand, CalledAs.COMMAND, capsys)
    printed = {f"{name}.toml" for name in recipes()}
    for name in named_files(text):
        if name in printed:
            assert "megagap recipe NAME > NAME.toml" in text or f"megagap recipe {Path(name).stem} > {name}" in text
        elif name.startswith("megagap/"):
            assert (ROOT / name).is_file(), name
        else:
            assert f"{name} of megagap's repository" in text, name


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_installs_nothing(tmp_path, script, option):
    environment = {"PATH": "/usr/bin:/bin", "MEGAGAP_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [ROOT / script, option], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and not done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["tests/data", "-k", "order", "--help"], ["-q", "-h"]])
def test_help_among_the_arguments_of_pytest_runs_nothing(tmp_path, arguments):
    environment = {"PATH": "/usr/bin:/bin", "MEGAGAP_VENV": str(tmp_path / "venv")}
    done = subprocess.run([ROOT / "tests/run.sh", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "pytest arguments" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_settings_are_wrapped_to_the_terminal(width):
    assert max(map(len, describe_settings(width).splitlines())) <= width


def test_settings_take_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "66")
    assert describe_settings() == describe_settings(66)


def test_every_setting_is_there_with_its_meaning_and_default():
    text = describe_settings(120)
    for section, kind in SECTIONS.items():
        for key, field in kind.model_fields.items():
            assert f"--{section}.{key} " in text and field.description, (section, key)
            assert " ".join(field.description.split()) in " ".join(text.split())


@pytest.mark.parametrize(
    "line",
    [
        "--parallel.schedule gpipe | 1f1b | interleaved | zb-h1 | zb-v  (optional)",
        "--optim.betas '[0.9, 0.95]'  (each >= 0, < 1; default '[0.9, 0.95]')",
        "--parallel.tp N  (N >= 1; default 1)",
        "--model.head_dim N  (N >= 0, a multiple of 2; default 0)",
        "--data.workers N  (N >= 0, <= 256; default 1)",
        "--optim.lr X  (X > 0; default 0.0003)",
        "--data.document_mask true | false  (default false)",
        "--parallel.layers_per_stage '[2, 2]' | balanced  (each >= 0; optional)",
        """--data.sources '[{path = "prefix_text_document", weight = 1.0}]'  (default '[]')""",
        """--train.skip_samples '["1000:2000"]'  (default '[]')""",
        "--model.hidden_size N  (N >= 1; required)",
    ],
)
def test_a_setting_shows_its_values_bounds_and_how_lists_are_typed(line):
    assert f"  {line}\n" in describe_settings(120)


def test_planned_settings_are_marked_with_the_value_that_they_accept():
    text = describe_settings(120)
    assert "--run.wandb false  (planned: no other value yet)" in text
    for section, keys in PLANNED.items():
        for key in keys:
            assert re.search(rf"--{section}\.{key} .*\(planned: no other value yet\)", text), key
