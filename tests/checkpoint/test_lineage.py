"""Which run and which of its starts a checkpoint on another disk is of."""

import shutil

import pytest

from megagap.checkpoint.lineage import LINEAGE, Lineage
from megagap.errors import CheckpointError


def test_a_run_keeps_the_id_that_it_drew(tmp_path):
    first = Lineage.of_run(tmp_path)
    Lineage.record_start(tmp_path, 0)
    again = Lineage.of_run(tmp_path)
    assert again.identity == first.identity and again.starts == (0,)


def test_a_run_that_uses_no_other_disks_has_no_such_file(tmp_path):
    Lineage.record_start(tmp_path, 0)
    assert not (tmp_path / LINEAGE).exists()


def test_a_directory_made_anew_and_a_copy_are_other_runs(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "elsewhere/run"
    name = Lineage.of_run(run).folder_name(run)
    assert name.startswith("run-")
    shutil.copytree(run, copy)
    assert Lineage.of_run(copy).folder_name(copy) != name
    shutil.rmtree(run)
    assert Lineage.of_run(run).folder_name(run) != name


def test_a_step_counts_until_a_later_start_begins_before_it():
    lineage = Lineage("0" * 32, (0, 40, 60))
    assert lineage.has_gone_through(1, 40)  # from which the second start went on
    assert not lineage.has_gone_through(1, 41)  # which the second start made anew
    assert lineage.has_gone_through(2, 60) and not lineage.has_gone_through(2, 61)
    assert lineage.has_gone_through(3, 1000)  # of the last start
    assert not lineage.has_gone_through(4, 10)  # of none that is known


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"identity": "x", "starts": []}', '{"identity": 1, "starts": [-1]}'])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path, text):
    (tmp_path / LINEAGE).write_text(text)
    with pytest.raises(CheckpointError, match=r"lineage\.json is damaged[^$]*remove it to resume"):
        Lineage.of_run(tmp_path)
