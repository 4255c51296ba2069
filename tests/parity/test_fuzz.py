"""The fuzzer finds a wrong collective, reduces it to what it takes to see it, and finds nothing in what is right."""

import json
import runpy
import subprocess
from itertools import count
from pathlib import Path

import pytest

from megagap.config import load_recipe
from tests.parity import fuzz
from tests.parity.cases import DIMENSIONS, is_valid, ranks_of, simplest, write_case
from tests.parity.comparison import Comparison, Finding
from tests.parity.fuzz import Fuzzer, Outcome, save
from tests.parity.gradients import Mutation
from tests.warm_start import python

ROOT = Path(__file__).parents[2]

LARGE = {
    "parallel.tp": 2,
    "parallel.pp": 2,
    "dp": 2,
    "parallel.schedule": "1f1b",
    "model.vocab_size": 127,
    "model.num_hidden_layers": 3,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.attention_bias": True,
    "microbatches": 2,
    "train.sequence_length": 16,
}


@pytest.mark.slow
def test_a_short_run_finds_nothing(workers):
    fuzzer = Fuzzer(Comparison(workers), seed=14)
    outcomes = list(fuzzer.outcomes(10, count()))
    assert not [(outcome.number, outcome.case, outcome.finding) for outcome in outcomes if outcome.finding]
    assert fuzzer.refused > 0


def test_a_seed_and_a_number_determine_a_case():
    class Nothing(Comparison):
        def check(self, recipe, ranks, trains=True):
            return None

    def cases(seed):
        fuzzer = Fuzzer(Nothing(None), seed)
        return [fuzzer.run(number).case for number in (0, 1, 5)]

    assert cases(1) == cases(1) != cases(2)
    assert all(map(is_valid, cases(1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "how", "remains"),
    [
        ("gradient_store.Bucket.start_reduction: reduce_scatter_flat_async over shard", "double", {"dp": 2}),
        ("cross_entropy._over_vocabulary: all_reduce over tp", "drop", {"parallel.tp": 2}),
    ],
)
def test_a_planted_bug_is_found_and_reduced_to_the_dimension_it_takes(workers, tmp_path, site, how, remains):
    case = simplest() | LARGE
    assert is_valid(case)
    fuzzer = Fuzzer(Comparison(workers, Mutation(site, 0, how)), seed=0)
    finding = fuzzer.finding(case)
    assert finding is not None and finding.kind == "gradients"

    outcome = Outcome(0, case, finding, 0.0)
    smallest = fuzzer.reduce(outcome, 600, lambda simpler: None)
    layout = {name: smallest[name] for name in ("parallel.tp", "parallel.pp", "dp")}
    assert layout == {"parallel.tp": 1, "parallel.pp": 1, "dp": 1} | remains
    # Two ranks need two heads and nothing else.
    changed = {name for name, value in smallest.items() if value != simplest()[name]} - set(remains)
    assert changed <= {"model.num_attention_heads"}

    record = save(outcome, smallest, tmp_path / "found")
    settings = load_recipe(record["recipe"], world_size=record["ranks"])
    assert settings.model.vocab_size == 17 and record["command"] in (tmp_path / "found/finding.txt").read_text()


def test_settings_that_end_in_a_traceback_are_a_finding(monkeypatch):
    def broken(case):
        raise ZeroDivisionError("in a rule")

    monkeypatch.setattr(fuzz, "is_valid", broken)
    outcome = Fuzzer(Comparison(None), seed=0).run(0)
    assert outcome.finding.kind == "crash" and "ZeroDivisionError" in outcome.finding.text


@pytest.mark.slow
def test_what_breaks_as_it_runs_is_a_crash_and_the_next_case_goes_on(workers, tmp_path, monkeypatch):
    recipe = write_case(tmp_path, simplest())
    comparison = Comparison(workers)
    monkeypatch.setattr("tests.parity.comparison.gradients", fails)
    finding = comparison.check(recipe, 1)
    assert finding.kind == "crash" and "RuntimeError: planted" in finding.text
    monkeypatch.undo()
    assert comparison.check(recipe, 1) is None


def fails(*_):
    raise RuntimeError("planted")


@pytest.mark.slow
def test_the_tool_replays_a_case_and_says_what_it_did(tmp_path):
    command = [python(), ROOT / "tools/fuzz_layouts.py", "--seed", "3", "--case", "2", "--json"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["seed"] == 3 and report["cases"] == 1 and report["findings"] == []
    assert "seed 3 case 2: equal" in done.stderr
    assert all(sum(report["coverage"][dimension.name].values()) == 1 for dimension in DIMENSIONS)


def test_a_finding_ends_the_tool_with_1(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "tools/fuzz_layouts.py"))["main"]
    monkeypatch.setattr(Comparison, "check", lambda self, recipe, ranks, trains=True: Finding("gradients", "differs"))
    with pytest.raises(SystemExit) as end:
        main(["--seed", "1", "--case", "0", "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert end.value.code == 1 and "GRADIENTS" in output
    # Whatever fails everywhere is reduced to the simplest case.
    assert load_recipe(tmp_path / "seed_1_case_0/recipe.toml").model.num_hidden_layers == 1
    assert f"--recipe {tmp_path}/seed_1_case_0/recipe.toml --ranks {ranks_of(simplest())}" in output


@pytest.mark.parametrize(
    "arguments", [["--seconds", "-1"], ["--recipe", "x.toml"], ["--ranks", "2"], ["--seconds", "nan"], ["--case=-1"]]
)
def test_arguments_without_a_meaning_are_refused(arguments, capsys):
    main = runpy.run_path(str(ROOT / "tools/fuzz_layouts.py"))["main"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err
