"""What a step asks of other ranks, and what it does for how many microbatches."""

import pytest
import torch

from megagap.config import load_recipe
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.training import step
from megagap.training.datasets import training_data
from megagap.training.step import compute_gradients, count_targets
from megagap.training.trainer import build_state, make_loader
from tests.recipes import write_recipe


def test_where_every_target_counts_nobody_is_asked_how_many_there_are(monkeypatch):
    mesh = Mesh.without_groups(Layout(6, tp=2), 0, torch.device("cpu"))
    targets = torch.zeros(2, 3, 5, dtype=torch.long)
    monkeypatch.setattr(step, "all_reduce", lambda *_: pytest.fail("a collective"))
    assert count_targets(targets, mesh, all_count=True) == 2 * 3 * 5 * 3


def test_targets_that_are_ignored_do_not_count():
    targets = torch.tensor([[1, IGNORED_TARGET, 2]])
    assert count_targets(targets, Mesh.single()) == 2


def test_a_step_makes_the_microbatches_that_its_batch_has(tmp_path):
    """Half a batch is not trained on as a whole one, nor a whole one as half of one."""
    settings = load_recipe(write_recipe(tmp_path), [], 1)
    state = build_state(settings, Mesh.single())
    with make_loader(settings, state.mesh, training_data(settings)) as loader:
        batch = loader.step(1)
    microbatches = len(batch.tokens)
    assert microbatches > 1
    compute_gradients(state, batch, state.program(microbatches))
    with pytest.raises(AssertionError, match="another number of microbatches"):
        compute_gradients(state, batch, state.program(microbatches - 1))
