"""The run directory belongs to all ranks of one run."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megagap.errors import DistributedError
from megagap.observe import run_directory
from megagap.observe.run_directory import RunDirectory
from megagap.parallel.mesh import DistributedCommunicator, Mesh
from tests.recipes import write_recipe


def open_directory(rank: int, ranks: int, recipe: Path, shared: bool) -> str:
    """The message of the refusal, or nothing. Not shared: every rank has a directory of its own."""
    folder = recipe.parent / ("run" if shared else f"run{rank}")
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    run = RunDirectory(folder, is_writer=rank == 0)
    run.open()
    try:
        with patch.object(run_directory, "LOCK_SECONDS", 0.5):
            run.require_shared(DistributedCommunicator(mesh))
    except DistributedError as error:
        return str(error)
    finally:
        run.close()
    return ""


def test_a_directory_that_all_ranks_see_is_accepted(workers, tmp_path):
    assert workers.run(2, open_directory, write_recipe(tmp_path), True) == ["", ""]


def test_a_directory_that_is_not_shared_is_refused_by_every_rank(workers, tmp_path):
    for answer in workers.run(2, open_directory, write_recipe(tmp_path), False):
        assert "is not shared" in answer


@pytest.mark.parametrize(("variables", "expected"), [({"OMP_NUM_THREADS": "3"}, True), ({}, False)])
def test_threads_are_the_users_choice_where_there_is_no_torchrun(monkeypatch, variables, expected):
    from megagap.training.launch import _threads_are_chosen

    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _threads_are_chosen() is expected
