"""Every parallel layout trains like one process: same losses, of each source too, same gradient norms."""

from functools import cache

import pytest

from tests.recipes import write_recipe
from tests.training_run import train_recipe

STEPS = 6
TOLERANCE = 1e-5

ON_ALL_MODELS = {
    "tp2": (2, dict(tp=2)),
    "tp2 without sequence parallelism": (2, dict(tp=2, sequence_parallel=False)),
    "pp2": (2, dict(pp=2)),
    "pp2, gpipe": (2, dict(pp=2, schedule="gpipe")),
    "pp4, layers that do not divide": (4, dict(pp=4)),
    "pp2, layers by hand": (2, dict(pp=2, layers_per_stage="[4,1]")),
    "dp2": (2, {}),
    "tp2 pp2": (4, dict(tp=2, pp=2)),
    "tp2 dp2": (4, dict(tp=2)),
    "pp2 dp2": (4, dict(pp=2)),
    "tp2 pp2 dp2": (8, dict(tp=2, pp=2)),
}

SAMPLE_OF_ALL_MODELS = ("tp2", "pp4, layers that do not divide", "tp2 pp2 dp2")

LAYOUTS = ON_ALL_MODELS | {
    "tp4, more ranks than key/value heads": (4, dict(tp=4)),
    "pp2 vpp2": (2, dict(pp=2, vpp=2)),
    "cp2 dp2, ring": (4, dict(cp=2)),
    "cp2 tp2, alltoall": (4, dict(cp=2, tp=2, context_mode="alltoall")),
    "cp2 pp2, allgather": (4, dict(cp=2, pp=2, context_mode="allgather")),
}

SHARDED = {
    "dp2 zero 0": (2, dict(zero=0)),
    "pp2 dp2 zero 2": (4, dict(pp=2, zero=2)),
    "tp2 dp2 zero 3": (4, dict(tp=2, zero=3)),
    "dp4 in 2 replicas, zero 3": (4, dict(dp_replicate=2, zero=3)),
}
"""What is sharded over data-parallel ranks: losses and norms of whole runs."""


SECTIONS = {"zero": "optim", "recompute": "train"}
"""Of the settings of a layout that are not in ``[parallel]``."""


def on_models(layouts, models):
    """Pairs of a model and a layout: every layout on the last model, and those that touch all of it on the others.

    Of those, but for a few, ``-m long``: the grid's sample has each value of a layout on both models.
    """
    of_the_last = [(models[-1], layout) for layout in layouts]
    others = [(model, layout) for model in models[:-1] for layout in layouts if layout in ON_ALL_MODELS]
    return of_the_last + [
        pair if pair[1] in SAMPLE_OF_ALL_MODELS else pytest.param(*pair, marks=pytest.mark.long) for pair in others
    ]


def layout_overrides(layout):
    return [f"{SECTIONS.get(name, 'parallel')}.{name}={str(value).lower()}" for name, value in layout.items()]


MODELS = ["untied", "tied"]


@pytest.fixture(scope="module")
def references(workers, tmp_path_factory):
    """By model, a recipe and its metrics from one process. Made once: pytest would make a fixture with a parameter anew
    for each test that has another parameter, too."""

    @cache
    def reference(model):
        folder = tmp_path_factory.mktemp("parity")
        recipe = write_recipe(
            folder,
            model=dict(tie_word_embeddings=model == "tied"),
            train=dict(steps=STEPS, evaluate_every=3, evaluate_samples=3, z_loss=0.001),
        )
        (metrics,) = workers.run(1, train_recipe, recipe, [f"run.dir={folder / 'one'}"])
        return recipe, metrics

    return reference


@pytest.fixture
def reference(request, references):
    return references(request.param)


@pytest.mark.parametrize(("reference", "layout"), on_models(LAYOUTS | SHARDED, MODELS), indirect=["reference"])
def test_layout_equals_one_process(layout, reference, workers, tmp_path):
    recipe, expected = reference
    ranks, parallel = (LAYOUTS | SHARDED)[layout]
    overrides = layout_overrides(parallel)
    metrics = workers.run(ranks, train_recipe, recipe, [*overrides, f"run.dir={tmp_path}"])[0]
    assert len(metrics) == len(expected) == STEPS
    for ours, theirs in zip(metrics, expected, strict=True):
        names = ("loss", "z_loss", "validation_loss")
        compared = {key for key in theirs if key == "grad_norm" or key.partition("/")[0] in names}
        assert {key: ours[key] for key in compared} == pytest.approx(
            {key: theirs[key] for key in compared}, rel=TOLERANCE
        ), ours["step"]
    assert {"loss/fr", "validation_loss/fr"} <= metrics[-1].keys()


@pytest.mark.parametrize("reference", MODELS, indirect=True)
def test_the_reference_learns(reference):
    """A parity test on a model that stands still would prove little."""
    _, metrics = reference
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
