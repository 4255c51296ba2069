"""``train.compile``: compiled layers train like plain ones, as one graph, which all layers share."""

from pathlib import Path

import pytest

from tests.parity.gradients import assembled, gradients, largest_difference
from tests.recipes import write_recipe

TOLERANCE = 1e-10

LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, dict(tp=2)),
    "tp2 without sequence parallelism": (2, dict(tp=2, sequence_parallel=False)),
    "tp2 pp2 dp2": (8, dict(tp=2, pp=2)),
    "tp4, more ranks than key/value heads": (4, dict(tp=4)),
    "dp2, document mask": (2, {}),
    "tp2, document mask": (2, dict(tp=2)),
}

MODELS = {
    "untied": {},
    "tied, biases, scaled gains": dict(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, norm_gain_scale=20.0
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, workers, tmp_path_factory):
    """A recipe, and the gradients of one process that does not compile, with and without a document mask."""
    recipe = write_recipe(tmp_path_factory.mktemp("compile"), model=MODELS[request.param])
    expected = {}
    for masked in (False, True):
        ((parts, _),) = workers.run(1, gradients, recipe, [f"data.document_mask={str(masked).lower()}"])
        expected[masked] = assembled(parts)
    return recipe, expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_of_compiled_layers_equals_that_of_one_plain_process(layout, model, workers):
    recipe, expected = model
    ranks, parallel = LAYOUTS[layout]
    overrides = [f"parallel.{name}={str(value).lower()}" for name, value in parallel.items()]
    overrides += [f"data.document_mask={str('mask' in layout).lower()}", "train.compile=true"]
    assert largest_difference(workers.run(ranks, gradients, recipe, overrides), expected["mask" in layout]) < TOLERANCE
