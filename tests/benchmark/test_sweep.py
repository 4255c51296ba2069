"""A sweep measures every combination once, in processes of its own, and says what became of each.

The tool that it starts is a script without torch: what it measures does not matter here.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from megagap.benchmark import sweep as module
from megagap.benchmark.sweep import DONE, FAILED, REFUSED, Sweep, notes, parse_sweep, reason_of, run_sweep, split_values
from megagap.errors import ConfigError
from megagap.files import Lock
from tests.launching import is_alive, wait_until
from tests.recipes import write_recipe

TOOL = """
import json, os, sys
from pathlib import Path
arguments = sys.argv[1:]
folder = Path(arguments[arguments.index("--output") + 1])
with open({calls!r}, "a") as calls:
    calls.write(" ".join(arguments) + "\\n")
batch = int(next(a for a in arguments if a.startswith("--train.micro_batch_size=")).partition("=")[2])
if batch == 4 and not Path({cured!r}).exists():
    print("Traceback (most recent call last):\\ntorch.OutOfMemoryError: CUDA out of memory", file=sys.stderr)
    sys.exit(1)
if batch == 8:
    os.kill(os.getpid(), 9)
shares = {{"full": 0.5, "causal": 0.4}}
report = {{"tokens_per_second": 100.0 * batch, "step_seconds": [1.0], "memory_bytes": 2**30, "measured_peaks": [1.0]}}
report["mfu"] = {{"datasheet": None, "measured": shares}}
(folder / "benchmark.json").write_text(json.dumps(report))
"""


class Tried:
    """A sweep of micro_batch_size with the script as its tool."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.cured, self.tool = folder / "calls", folder / "cured", folder / "tool.py"
        self.tool.write_text(TOOL.format(calls=str(self.calls), cured=str(self.cured)))
        values = {"train.micro_batch_size": ["1", "2", "3", "4", "8"]}
        self.sweep = Sweep(write_recipe(folder), ["train.seed=3"], values, 1, 0, 1, None, folder / "out")

    def run(self) -> list[module.Outcome]:
        with patch.object(module, "MEASURE", (str(self.tool),)):
            return run_sweep(self.sweep)

    def called(self) -> list[str]:
        """The micro batch sizes that were started, since the last time."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return [line.rpartition("=")[2] for line in lines]


@pytest.fixture
def tried(tmp_path) -> Tried:
    return Tried(tmp_path)


def test_combinations_are_ranked_and_failures_recorded_with_their_reasons(tried):
    outcomes = tried.run()
    found = [(outcome.settings["train.micro_batch_size"], outcome.status) for outcome in outcomes]
    assert found == [("2", DONE), ("1", DONE), ("4", FAILED), ("8", FAILED), ("3", REFUSED)]
    reasons = [outcome.reason for outcome in outcomes[2:]]
    assert reasons[0] == "torch.OutOfMemoryError: CUDA out of memory"
    assert reasons[1] == "ended by SIGKILL: out of memory?"
    assert "does not divide train.global_batch_size = 8" in reasons[2]
    written = json.loads((tried.sweep.output / "sweep.json").read_text())
    assert [result["status"] for result in written["results"]] == [DONE, DONE, FAILED, FAILED, REFUSED]
    assert written["results"][0]["tokens_per_second"] == 200.0
    assert any("output.log" in line for line in notes(outcomes))


def test_the_same_sweep_again_measures_only_what_failed(tried):
    tried.run()
    assert tried.called() == ["1", "2", "4", "8"]
    tried.cured.touch()
    outcomes = tried.run()
    assert tried.called() == ["4", "8"]
    assert [outcome.is_from_before for outcome in outcomes[:3]] == [False, True, True]
    assert outcomes[0].settings["train.micro_batch_size"] == "4"


@pytest.mark.parametrize("change", ["settings", "steps", "versions", "hardware"])
def test_what_changes_the_measurement_is_measured_again(tried, monkeypatch, change):
    tried.run()
    tried.called()
    if change == "settings":
        tried.sweep = replace(tried.sweep, overrides=["train.seed=4"])
    elif change == "steps":
        tried.sweep = replace(tried.sweep, steps=2)
    else:
        before = module._surroundings
        monkeypatch.setattr(module, "_surroundings", lambda sweep: {**before(sweep), change: "other"})
    tried.run()
    assert tried.called() == ["1", "2", "4", "8"]


def test_an_incomplete_result_is_measured_again(tried):
    outcomes = tried.run()
    tried.called()
    (outcomes[0].folder / "benchmark.json").write_text("{")
    tried.run()
    assert tried.called() == ["2", "4", "8"]


def test_a_sweep_of_which_nothing_can_be_started_is_refused_before_it_writes(tried):
    tried.sweep = replace(tried.sweep, values={"train.micro_batch_size": ["3", "5"]})
    with pytest.raises(ConfigError, match=r"no combination can be started; the first one:\n1 fault in .*recipe\.toml"):
        tried.run()
    tried.sweep = replace(tried.sweep, recipe=Path("none.toml"))
    with pytest.raises(ConfigError, match=r"^config error: cannot read the recipe none\.toml"):
        tried.run()
    assert not tried.sweep.output.exists() and not tried.called()


def test_a_checkpoint_that_is_missing_is_the_refusal_of_one_combination(tried, tmp_path):
    recipe = tmp_path / "without_model.toml"
    text = tried.sweep.recipe.read_text()
    recipe.write_text(text[: text.index("[model]")] + text[text.index("[parallel]") :])
    values = {
        "checkpoint.load": [str(tmp_path / "none")],
        "train.micro_batch_size": ["1"],
        "model.preset": ["tiny", ""],
    }
    tried.sweep = replace(tried.sweep, recipe=recipe, overrides=["checkpoint.load_mode=model"], values=values)
    outcomes = tried.run()
    assert [outcome.status for outcome in outcomes] == [DONE, REFUSED]
    assert outcomes[1].reason.startswith(f"checkpoint error: {tmp_path / 'none'} does not exist")


def test_two_sweeps_do_not_write_into_one_folder(tried):
    tried.sweep.output.mkdir()
    lock = Lock(tried.sweep.output / "lock")
    with pytest.raises(ConfigError, match=r"another sweep writes into .*out: process \d+ on "):
        tried.run()
    lock.release()
    assert tried.run()[0].status == DONE


def test_an_interrupted_sweep_keeps_what_it_measured(tried, monkeypatch, capsys):
    measure = module._measure
    monkeypatch.setattr(
        module,
        "_measure",
        lambda sweep, combination, *rest: (
            interrupt() if combination["train.micro_batch_size"] == "4" else measure(sweep, combination, *rest)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        tried.run()
    assert "2 of 5 combinations left; rerun the same command" in capsys.readouterr().err
    monkeypatch.undo()
    tried.called()
    assert len(tried.run()) == 5 and tried.called() == ["4", "8"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is asked to end it")
def test_a_measurement_ends_with_the_sweep_that_started_it():
    script = (
        "import subprocess, sys, time; from megagap.process.parent import end_with_starter\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print(subprocess.Popen(child, preexec_fn=end_with_starter).pid, flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    assert is_alive(pid)
    starter.kill()
    starter.communicate()
    wait_until(lambda: not is_alive(pid))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2", ["1", "2"]),
        ("[2,2],[1,3]", ["[2,2]", "[1,3]"]),
        ("fp32, bf16-mixed", ["fp32", "bf16-mixed"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("[0.9,0.95]", ["[0.9,0.95]"]),
    ],
)
def test_values_are_separated_by_commas_outside_of_brackets_and_quotes(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["parallel.tp"], r"--sweep parallel\.tp: must be section\.key=V1,V2, such as parallel\.tp=1,2"),
        (["recipe.toml"], "other options come before --sweep"),
        (["parallel.tp="], "a value is missing"),
        (["parallel.tp=1,,2"], "a value is missing"),
        (["parallel.tp=1,2,1"], "1 is given twice"),
        (["parallel.tp=1", "parallel.tp=2"], "parallel.tp is given twice"),
        (["parallel.tpp=1,2"], "unknown; did you mean parallel.tp?"),
        (["nothing.at_all=1"], "unknown"),
        (["parallel.tp=1,two"], "parallel.tp = two  must be a whole number"),
        (["parallel.tp=0"], "parallel.tp = 0  must be at least 1"),
        (
            ["train.precision=fp32,fp8"],
            'train.precision = fp8  must be one of "fp32", "bf16-mixed", "bf16-pure", "fp16-mixed"',
        ),
        (["run.wandb=false,true"], "run.wandb = true  not yet supported"),
    ],
)
def test_faulty_items_are_named_with_what_is_right(items, message):
    with pytest.raises(ConfigError, match=message):
        parse_sweep(items)


def test_good_items_are_taken_as_typed():
    items = ["parallel.tp=1,2", "parallel.layers_per_stage=[2,2],[1,3]", "train.precision=fp32,bf16-mixed"]
    assert parse_sweep(items) == {
        "parallel.tp": ["1", "2"],
        "parallel.layers_per_stage": ["[2,2]", "[1,3]"],
        "train.precision": ["fp32", "bf16-mixed"],
    }


@pytest.mark.parametrize(
    ("output", "code", "reason"),
    [
        (
            "noise\ndata error: x.bin is cut short\n  copy it again.\nmore",
            2,
            "data error: x.bin is cut short\n  copy it again.",
        ),
        ("rank 1: distributed error: lost rank 0", 1, "distributed error: lost rank 0"),
        (
            "[rank0]: RuntimeError: not enough memory\ntorch.x.ChildFailedError: \n",
            1,
            "RuntimeError: not enough memory",
        ),
        ("Root Cause\n  exitcode  : -9 (pid: 1)\n", 1, "ended by SIGKILL: out of memory?"),
        ("", -11, "ended by SIGSEGV"),
        ("something\n\n", 3, "exit code 3: something"),
        ("", 3, "exit code 3"),
    ],
)
def test_the_reason_of_a_failure_is_found_in_what_was_printed(output, code, reason):
    assert reason_of(output, code) == reason
