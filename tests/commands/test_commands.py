"""The command ``megagap``: its subcommands, ``tools/*.py`` that call them too, and how each starts and ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagap.commands import (
    SUMMARIES,
    MissingPackageError,
    UsageError,
    call,
    dispatch,
    help_text,
    missing_packages,
    requirement,
)
from megagap.errors import ConfigError
from megagap.terminal import programs
from megagap.terminal.programs import TOOLS, CalledAs, typed
from tests.launching import SECONDS

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = ("gather-text", "train-tokenizer", "preprocess", "merge", "inspect", "plot", "draw-schedule", "recipe")


def program(subcommand: str, called_as: CalledAs) -> list[str]:
    if called_as is CalledAs.MODULE:
        return [sys.executable, "-m", "megagap", subcommand]
    if subcommand == "train":
        return [sys.executable, "-m", "megagap.train"]
    return [sys.executable, str(ROOT / f"tools/{TOOLS[subcommand]}.py")]


STARTS = [(name, CalledAs.MODULE) for name in SUMMARIES if name != "recipe"]
STARTS += [(name, CalledAs.TOOL) for name in SUMMARIES if name != "recipe"]


def test_every_subcommand_is_listed_and_every_tool_is_one():
    assert {*TOOLS, "train", "recipe"} == set(SUMMARIES)
    for name, summary in SUMMARIES.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", help_text(CalledAs.COMMAND), re.MULTILINE)
    for tool in TOOLS.values():
        assert (ROOT / f"tools/{tool}.py").is_file()


def help_of(subcommand: str, called_as: CalledAs, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        call(subcommand, called_as, ["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("subcommand", [name for name in SUMMARIES if name != "recipe"])
def test_help_names_each_program_as_it_was_called(subcommand, capsys):
    command = help_of(subcommand, CalledAs.COMMAND, capsys)
    assert command.startswith(f"usage: megagap {subcommand} ") and f"\n  megagap {subcommand} " in command
    assert "tools/" not in command and "megagap.train" not in command and "examples/recipes" not in command
    from_checkout = help_of(subcommand, CalledAs.TOOL, capsys)
    own = CalledAs.TOOL.program(subcommand)
    assert from_checkout.startswith(f"usage: {own} ") and f"\n  {own} " in from_checkout
    assert not re.search(rf"megagap ({'|'.join(SUMMARIES)})\b", from_checkout)
    module = help_of(subcommand, CalledAs.MODULE, capsys)
    assert module.startswith(f"usage: python -m megagap {subcommand} ")


def test_help_says_where_its_recipes_and_pages_are(capsys):
    text = help_of("evaluate", CalledAs.COMMAND, capsys)
    assert "--data code.toml" in text and "megagap recipe NAME > NAME.toml" in text
    assert "docs/evaluation.md of megagap's repository" in text


@pytest.mark.parametrize("subcommand", ["", *WITHOUT_TORCH])
def test_help_does_not_import_torch_where_the_tool_needs_none(subcommand):
    script = (
        "import sys; from megagap.commands import dispatch, CalledAs\n"
        "try: dispatch(sys.argv[1:], CalledAs.COMMAND)\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    arguments = [subcommand, "--help"] if subcommand else ["--help"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    imported = set(done.stderr.split())
    assert done.stdout.startswith("usage: megagap") and "torch" not in imported
    if not subcommand:
        assert not imported & {"numpy", "pydantic", "rich", "tqdm"}


@pytest.mark.parametrize(
    ("typed_name", "meant"),
    [
        ("preproces", "preprocess"),
        ("Preprocess", "preprocess"),
        ("preprocess_data", "preprocess"),
        ("tools/merge_datasets.py", "merge"),
        ("train_tokenizer", "train-tokenizer"),
        ("trian", "train"),
        ("benchmark_mfu", "benchmark-mfu"),
        ("plott", "plot"),
    ],
)
def test_an_unknown_subcommand_is_answered_with_the_nearest(typed_name, meant):
    with pytest.raises(UsageError) as error:
        dispatch([typed_name, "--help"], CalledAs.COMMAND)
    assert str(error.value) == (
        f"usage error: there is no subcommand {typed_name!r}; did you mean {meant}? (megagap --help lists them)"
    )


@pytest.mark.parametrize("arguments", [["zzzz"], [], ["--nonsense"], [""], ["-x", "train"], ["é\udce9"], ["%s", "{}"]])
def test_a_call_without_a_subcommand_ends_with_one_line_and_2(arguments, tmp_path):
    given = [os.fsencode(argument) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "megagap", *given], cwd=tmp_path, env=with_package(), capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"usage error: [^\n]*python -m megagap --help lists them\n", done.stderr), done.stderr


def with_package(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"} | more


@pytest.mark.parametrize(("subcommand", "called_as"), STARTS, ids=lambda value: getattr(value, "name", value))
def test_ctrl_c_while_libraries_are_imported_leaves_no_traceback(subcommand, called_as, tmp_path):
    """Every library of some size is played by one whose import never ends."""
    slow = f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'reached').touch()\ntime.sleep({SECONDS})\n"
    for name in ("torch", "numpy", "pydantic", "rich", "tqdm"):
        (tmp_path / f"{name}.py").write_text(slow)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [*program(subcommand, called_as), "--help"], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "reached").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGINT and said == ""


def signalled_in_gather(name, tmp_path):
    """``megagap gather-text``, which gets the signal of this name in the place of its work."""
    script = (
        "import os, signal, sys; from functools import partial; import megagap.gather\n"
        f"megagap.gather.gather = lambda *_: os.kill(os.getpid(), signal.{name})\n"
        "from megagap.commands import CalledAs, dispatch, run\n"
        "run(partial(dispatch, sys.argv[1:], CalledAs.COMMAND))"
    )
    arguments = ["gather-text", "--output", str(tmp_path)]
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def test_ctrl_c_after_the_imports_is_answered_as_before(tmp_path):
    done = signalled_in_gather("SIGINT", tmp_path)
    assert done.returncode == 130 and done.stderr == "interrupted\n"


def test_a_notice_ends_a_command_that_does_not_train(tmp_path):
    assert signalled_in_gather("SIGUSR1", tmp_path).returncode == -signal.SIGUSR1


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "plotext", None)
    with pytest.raises(MissingPackageError) as error, missing_packages("megagap plot"):
        import plotext  # noqa: F401
    assert "megagap plot needs plotext" in str(error.value) and "pip install 'megagap[tools]'" in str(error.value)
    assert requirement("safetensors") == "safetensors>=0.4" and requirement("tomli_w") == "tomli_w>=1.0"
    assert requirement("pyarrow") == "megagap[parquet]"
    assert requirement("torchvision") is requirement("megagap") is requirement("") is None


def test_a_module_of_megagap_that_is_missing_stays_a_bug():
    with pytest.raises(ModuleNotFoundError), missing_packages("megagap plot"):
        import megagap.nonsense  # noqa: F401


def test_messages_name_the_tool_as_this_installation_has_it(monkeypatch, tmp_path):
    assert typed("inspect") == "python tools/inspect_data.py"
    monkeypatch.setattr(programs, "CHECKOUT", tmp_path)
    assert typed("inspect") == "megagap inspect" and typed("convert") == "megagap convert"


def test_a_recipe_is_printed_for_the_folder_that_it_is_saved_in(capsys):
    dispatch(["recipe"], CalledAs.COMMAND)
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    folder = ROOT / "examples/recipes"
    assert sorted(listed) == sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.toml"))
    dispatch(["recipe", "code"], CalledAs.COMMAND)
    printed = capsys.readouterr().out
    assert 'path = "runs/example/code_text_document"' in printed and "../" not in printed
    with pytest.raises(ConfigError, match="there is no recipe 'codex'; there are 100m-one-gpu, code, "):
        dispatch(["recipe", "codex"], CalledAs.COMMAND)
