"""Bad input ends in one clear message (what, where, what to do), without a traceback of ours, within seconds."""

import os
import signal
import subprocess

import numpy as np
import pytest

from megagap.data.indexed import IndexedDatasetWriter
from tests.launching import SECONDS, descendants, finish, is_alive, launch, start_ranks, wait_until
from tests.recipes import write_recipe
from tests.warm_start import python


def damage_nothing(folder):
    pass


def remove_bin(folder):
    (folder / "fr_text_document.bin").unlink()


def remove_idx(folder):
    (folder / "en_text_document.idx").unlink()


def truncate_bin(folder):
    file = folder / "fr_text_document.bin"
    os.truncate(file, file.stat().st_size // 2)


def truncate_idx(folder):
    file = folder / "fr_text_document.idx"
    os.truncate(file, file.stat().st_size - 3)


def spoil_header(folder):
    file = folder / "fr_text_document.idx"
    file.write_bytes(b"not an index" + file.read_bytes()[12:])


def foreign_tokens(folder):
    with IndexedDatasetWriter(str(folder / "fr_text_document"), np.dtype("uint16")) as writer:
        for _ in range(50):
            writer.add_document(np.full(100, 60_000))


def short_source(folder):
    with IndexedDatasetWriter(str(folder / "fr_text_document"), np.dtype("uint16")) as writer:
        writer.add_document(np.arange(5))


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (remove_bin, {}, "fr_text_document.bin does not exist"),
        (remove_idx, {}, "en_text_document.idx does not exist"),
        (truncate_bin, {}, "fr_text_document.bin is"),
        (truncate_idx, {}, "data error: "),
        (spoil_header, {}, "data error: "),
        (short_source, {}, "source fr has 5 tokens"),
        (damage_nothing, {"parallel.tp": 3}, "does not divide model.num_attention_heads = 4"),
        (damage_nothing, {"parallel.pp": 6}, "a stage would have no layers"),
        (damage_nothing, {"train.sequence_length": 4096}, "exceeds model.max_position_embeddings"),
        (damage_nothing, {"checkpoint.load": "nowhere"}, "checkpoint error: "),
        (damage_nothing, {"run.dir": "/proc/none"}, "cannot be written"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_of_a_training_run(tmp_path, damage, overrides, message):
    recipe = write_recipe(tmp_path)
    damage(tmp_path)
    code, output = finish(*start_ranks(recipe, 1, *as_options(overrides)))
    assert output.count(message) == 1 and code == 2, output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("damage", "overrides", "message"),
    [
        (foreign_tokens, {}, "token id 60000 in source fr"),
        (damage_nothing, {"parallel.tp": 2, "parallel.pp": 2}, "does not divide the 2 processes"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_input_of_several_processes_is_told_once(tmp_path, damage, overrides, message):
    recipe = write_recipe(tmp_path)
    damage(tmp_path)
    code, output = finish(launch(recipe, 2, *as_options(overrides)))
    assert output.count(message) == 1 and code == 1, output
    # torchrun prints a traceback of its own; ours would name our files.
    assert 'File "' not in output.replace("torch/distributed", "").partition(message)[0]
    assert "megagap/training" not in output


def as_options(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def test_three_faults_are_all_reported(tmp_path):
    recipe = write_recipe(tmp_path)
    code, output = finish(*start_ranks(recipe, 1, "--train.steps=-1", "--optim.lrr=1", "--parallel.tp=3"))
    assert code == 2
    for part in ("faults in", "train.steps = -1", "did you mean optim.lr?", "parallel.tp = 3"):
        assert part in output


DEATHS = [
    pytest.param({}, 1, "forward", marks=pytest.mark.long),
    ({}, 0, "collective"),
    pytest.param({"tp": 2}, 1, "backward", marks=pytest.mark.long),
    ({"tp": 2}, 0, "forward"),
    ({"pp": 2}, 1, "backward"),
    pytest.param({"pp": 2}, 0, "forward", marks=pytest.mark.long),
    ({"pp": 2}, 1, "collective"),
]
"""Layout of two ranks (dp where it says nothing else), who dies, and where in a step."""


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "lost", "place"), DEATHS, ids=str)
def test_a_rank_that_dies_in_mid_step_ends_the_others_with_a_message(tmp_path, parallel, lost, place):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), parallel=parallel)
    require_that_others_say_so(start_ranks(recipe, 2, dies=(lost, place)), lost)
    report = (tmp_path / "run/logs/hang_report.txt").read_text()
    assert f"Suspected: rank {lost} gives no sign of life" in report
    assert f"rank {1 - lost} (" in report and "step 3, " in report and "wait" in report


@pytest.mark.long
def test_a_rank_that_dies_among_tp_pp_and_dp_ends_all_others_with_a_message(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), parallel=dict(tp=2, pp=2))
    require_that_others_say_so(start_ranks(recipe, 8, dies=(3, "forward")), 3)


def require_that_others_say_so(processes, lost):
    for rank, (code, output) in enumerate(map(finish, processes)):
        if rank == lost:
            assert code == -signal.SIGKILL, output
            continue
        assert code == 1, output
        assert f"distributed error: rank {rank} lost contact with another rank" in output
        assert "Traceback" not in output


@pytest.mark.slow
def test_under_torchrun_the_message_is_told_before_all_are_ended(tmp_path):
    recipe = write_recipe(tmp_path, train=dict(steps=100_000), parallel=dict(pp=2))
    process = launch(recipe, 2, dies=(0, "backward"), cold=True)
    ranks: set[int] = set()
    wait_until(lambda: ranks.update(descendants(process.pid)) or process.poll() is not None)
    code, output = finish(process)
    assert code == 1 and "distributed error: rank 1 lost contact with another rank" in output
    assert "megagap/training" not in output
    assert len(ranks) >= 2 and not any(map(is_alive, ranks))


@pytest.mark.parametrize("half_set", [{"RANK": "abc"}, {"WORLD_SIZE": "2", "RANK": "0"}], ids=str)
def test_an_environment_with_half_of_torchruns_variables_is_refused(tmp_path, half_set):
    command = [python(), "-m", "megagap.train", write_recipe(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **half_set}, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "which rank this process is: " in done.stderr and "start with torchrun" in done.stderr
