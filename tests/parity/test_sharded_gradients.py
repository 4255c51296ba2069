"""Stages 2 and 3 of ``optim.zero`` beside what else happens around a layer: split backward passes, recomputation."""

from unittest.mock import patch

import pytest
from torch.utils.checkpoint import checkpoint

from megagap.model.llama import Layer
from megagap.parallel.placement import Placement
from tests.parallel.test_pipeline import v_shaped
from tests.parity.gradients import assembled, gradients, largest_difference
from tests.parity.test_gradients import TOLERANCE
from tests.recipes import write_recipe

TIED = dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def model(workers, tmp_path_factory):
    """A recipe, and the gradients of one process."""
    recipe = write_recipe(tmp_path_factory.mktemp("sharded"), model=TIED)
    ((parts, _),) = workers.run(1, gradients, recipe, [])
    return recipe, assembled(parts)


def split_backwards(rank, ranks, recipe, zero, recompute):
    """Two stages in a V, whose weight gradients are computed after everything else."""
    overrides = ["parallel.pp=2", f"optim.zero={zero}", f"train.recompute={recompute}"]
    return gradients(rank, ranks, recipe, overrides, placement=Placement.v_shape([1, 1, 2, 1]), order=v_shaped)


@pytest.mark.parametrize(("zero", "recompute"), [(2, "none"), (3, "none"), (3, "selective"), (3, "full")])
def test_weight_gradients_may_come_later_than_those_of_the_input(workers, model, zero, recompute):
    """When the gains that make their inputs again are no longer there."""
    recipe, expected = model
    assert largest_difference(workers.run(4, split_backwards, recipe, zero, recompute), expected) < TOLERANCE


def recomputed(rank, ranks, recipe, inside, reentrant):
    """Each layer's forward pass is computed again in its backward pass: within its module, or with it."""
    name = "forward" if inside else "__call__"
    plain = getattr(Layer, name)

    def again(layer, *arguments, **named):
        return checkpoint(plain, layer, *arguments, use_reentrant=reentrant, **named)

    with patch.object(Layer, name, again):
        return gradients(rank, ranks, recipe, ["optim.zero=3"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_a_layer_that_is_computed_again_in_its_backward_pass_has_its_parameters(workers, model, inside, reentrant):
    recipe, expected = model
    assert largest_difference(workers.run(2, recomputed, recipe, inside, reentrant), expected) < TOLERANCE
