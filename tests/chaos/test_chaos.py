"""A run survives what ``tools/chaos.py`` does to it, and the tool finds what would not be survived."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import save_checkpoint
from megagap.parallel.shard import Slice, whole
from tests.chaos.campaign import layouts_of
from tests.chaos.checks import RELATIVE, Witness, differences, fault_of, faults_at_rest
from tests.chaos.events import DISK_KINDS, LAUNCHER_KINDS, RANK_KINDS, draw
from tests.chaos.flaws import VARIABLE
from tests.chaos.start import Start
from tests.chaos.subject import AUDITED, PHASES, phase_of
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_six_events_are_survived(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=30), checkpoint=dict(every=2, keep=2))
    command = [python(), str(ROOT / "tools/chaos.py"), str(recipe), "--kills", "6", "--seed", "1415", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["events"] == 6 and report["findings"] == [] and len(report["kinds"]) == 6
    assert report["saved_messages"] > 6
    assert report["runs"] == report["runs_bit_equal"] + report["runs_in_several_layouts"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("flaw", "found"),
    [
        ("said_early", "said that step_"),
        ("points_early", "which is not there"),
        ("forgets_moments", "weights differ by"),
    ],
)
def test_one_kill_while_a_file_is_written_shows_a_planted_flaw(tmp_path, flaw, found):
    recipe = write_recipe(tmp_path, train=dict(steps=12), checkpoint=dict(every=2, keep=2))
    options = ["--kills", "1", "--seed", "11", "--only", "kill rank", "--json"]
    assert draw(11, 0, 5, has_disk=True, only=["kill rank"]).phase == "writing"
    command = [python(), str(ROOT / "tools/chaos.py"), str(recipe), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {VARIABLE: flaw})
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(found in finding for finding in json.loads(done.stdout)["findings"]), done.stdout


def test_a_seed_and_a_number_determine_an_event():
    def events(seed):
        return [draw(seed, number, 5, has_disk=True) for number in range(200)]

    assert events(1) == events(1) != events(2)
    assert {event.kind for event in events(1)} == {*RANK_KINDS, *LAUNCHER_KINDS, *DISK_KINDS}
    assert {event.phase for event in events(1)} == {"step", "start-up", *PHASES}


def test_layouts_are_the_recipes_own_and_others_that_it_can_be_resumed_in(tmp_path):
    first, *others = layouts_of(write_recipe(tmp_path, parallel=dict(pp=2)), [])
    assert first.ranks == 2 and first.overrides == ()
    assert {layout.ranks for layout in others} == {1, 2, 4}
    assert any("parallel.tp=2" in layout.overrides for layout in others)


def phases_of_training(rank, ranks, recipe):
    """Run in a process of its own: an audit hook cannot be removed again."""
    seen: set[str | None] | None = set()

    def hook(event, arguments):
        if seen is not None and event in AUDITED:
            seen.add(phase_of(event, arguments))

    sys.addaudithook(hook)
    train_recipe(rank, ranks, recipe, [])
    found, seen = seen, None
    return found - {None}


def test_every_phase_of_a_save_is_recognised_by_what_a_run_does_to_the_file_system(workers, tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=4), checkpoint=dict(every=1, keep=1))
    assert workers.run(1, phases_of_training, recipe) == [set(PHASES)]


def write(folder: Path, value: float = 1.0) -> Path:
    tensor = torch.full((4, 3), value)
    save_checkpoint(folder, [Slice("weight", whole("w", (4, 3)), 0, 12, tensor.view(-1))], {"step": 1})
    return folder


@pytest.mark.parametrize("name", ["index.json", "rank_00000.safetensors"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_seen(tmp_path, name, how):
    folder = write(tmp_path / "step_00000001")
    assert fault_of(folder) is None
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    if how == "truncate":
        del content[-1:]
    (folder / name).unlink()
    if how != "remove":
        (folder / name).write_bytes(content)
    assert fault_of(folder) is not None


def test_what_a_run_leaves_half_written_under_a_final_name_is_found(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    write(checkpoints / "step_00000001")
    (tmp_path / "status.json").write_text('{"state": "running"}\n')
    assert faults_at_rest(tmp_path, set()) == []
    (tmp_path / "status.json").write_text('{"state": "run')
    assert "status.json is half written" in faults_at_rest(tmp_path, set())[0]
    (tmp_path / "status.json").unlink()
    (checkpoints / "latest").write_text("step_00000002\n")
    assert faults_at_rest(tmp_path, set()) == ["latest names 'step_00000002', which is not there"]
    (checkpoints / "step_00000002").mkdir()
    assert any("step_00000002 has its final name" in fault for fault in faults_at_rest(tmp_path, set()))


def test_an_event_that_speaks_of_a_checkpoint_too_early_is_found(tmp_path):
    with Witness(tmp_path, keep=2) as witness:
        for step in (1, 2):
            write(tmp_path / f"checkpoints/step_{step:08}")
            append_event(tmp_path, step)
        witness.look()
        assert witness.findings == []
        append_event(tmp_path, 3)
        witness.look()
    assert "said that step_00000003 was saved" in witness.findings[0] and witness.saved == 3


def test_a_checkpoint_that_newer_ones_have_replaced_is_no_finding(tmp_path):
    witness = Witness(tmp_path, keep=2)
    for step in (2, 3):
        write(tmp_path / f"checkpoints/step_{step:08}")
    append_event(tmp_path, 1)
    witness.look()
    assert witness.findings == [] and witness.saved == 1


def append_event(run: Path, step: int) -> None:
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "checkpoint", "folder": f"step_{step:08}"}) + "\n")


def finished(run: Path, value: float = 1.0, loss: float = 2.0, samples: int = 8, steps: int = 2) -> Path:
    write(run / "checkpoints/step_00000002", value)
    numbers = dict(loss=loss, grad_norm=1.0, lr=0.1, consumed_tokens=9, consumed_samples=samples)
    lines = [json.dumps({"step": step + 1} | numbers) for step in range(steps)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    return run


@pytest.mark.parametrize(
    ("changed", "found_in_one_layout", "found_in_several"),
    [
        ({}, False, False),
        ({"value": 1 + 1e-6}, True, False),
        ({"loss": 2 * (1 + RELATIVE / 2)}, True, False),
        ({"loss": 2 * (1 + RELATIVE * 2)}, True, True),
        ({"loss": float("nan")}, True, True),
        ({"samples": 9}, True, True),
        ({"steps": 1}, True, True),
        ({"steps": 3}, True, True),
    ],
)
def test_a_run_that_differs_from_the_undisturbed_one_is_found(tmp_path, changed, found_in_one_layout, found_in_several):
    run, reference = finished(tmp_path / "run", **changed), finished(tmp_path / "reference")
    assert bool(differences(run, reference, same_layout=True)[0]) == found_in_one_layout
    assert bool(differences(run, reference, same_layout=False)[0]) == found_in_several


def test_processes_that_hang_are_seen_and_ended(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000))
    start = Start(tmp_path / "start", recipe, 2, [], "::0", torchrun=False)
    assert start.wait(lambda: (tmp_path / "run/events.jsonl").exists(), 300)
    start.signal_rank(1, signal.SIGSTOP)
    assert not start.wait_for_end(0.5) and len(start.left()) == 2
    start.kill()
    assert start.left() == [] and start.has_ended


def test_only_writing_is_a_phase():
    partial = "/run/checkpoints/partial_step_00000002/rank_00000.safetensors"
    assert phase_of("open", (partial, "r", os.O_RDONLY)) is None
    assert phase_of("open", (partial, "w", os.O_WRONLY | os.O_CREAT)) == "writing"
    assert phase_of("open", (3, "w", os.O_WRONLY)) is None
