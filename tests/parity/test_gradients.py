"""In every layout, every parameter's gradient is that of one process; one wrong reduction, anywhere, is seen."""

from functools import cache

import pytest

from megagap.parallel.context import places_of
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.schedule import SCHEDULES
from megagap.training.step import targets_of
from tests.parity.gradients import Mutation, assembled, gradients, largest_difference
from tests.parity.test_layouts import LAYOUTS, layout_overrides, on_models
from tests.recipes import write_recipe

TOLERANCE = 1e-10

MODELS = {
    "untied": {},
    "tied, biases, scaled gains": dict(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, norm_gain_scale=20.0
    ),
}

OLMO2 = dict(norm_position="post", qk_norm=True, attention_bias=True, norm_gain_scale=20.0)

LAYOUTS = LAYOUTS | {
    "dp2, document mask": (2, {}),
    "tp2, document mask": (2, dict(tp=2)),
    "tp4 pp2": (8, dict(tp=4, pp=2)),
    "pp2 vpp2, gpipe, balanced": (2, dict(pp=2, vpp=2, schedule="gpipe", layers_per_stage="balanced")),
    "pp2, zb-v, document mask": (2, dict(pp=2, schedule="zb-v")),
    "tp2 pp2, zb-h1": (4, dict(tp=2, pp=2, schedule="zb-h1")),
    "pp3 vpp2, ends without layers": (3, dict(pp=3, vpp=2, layers_per_stage="[0,1,2,1,1,0]")),
    "dp2 zero 0": (2, dict(zero=0)),
    "dp4 zero 2": (4, dict(zero=2)),
    "dp2 zero 3": (2, dict(zero=3)),
    "tp2 dp2 zero 2": (4, dict(tp=2, zero=2)),
    "tp4 dp2 zero 3": (8, dict(tp=4, zero=3)),
    "pp2 dp2 zero 2, gpipe": (4, dict(pp=2, schedule="gpipe", zero=2)),
    "pp2 dp2 zero 3": (4, dict(pp=2, zero=3)),
    "tp2 pp2 dp2 zero 3": (8, dict(tp=2, pp=2, zero=3)),
    "dp4 in 2 replicas": (4, dict(dp_replicate=2)),
    "dp4 in 2 replicas, zero 3": (4, dict(dp_replicate=2, zero=3)),
    "dp2 in 2 replicas, zero 3": (2, dict(dp_replicate=2, zero=3)),
    "tp2 dp4 in 2 replicas, zero 3": (8, dict(tp=2, dp_replicate=2, zero=3)),
    "cp2, ring": (2, dict(cp=2)),
    "cp2, alltoall": (2, dict(cp=2, context_mode="alltoall")),
    "cp2, allgather": (2, dict(cp=2, context_mode="allgather")),
    "cp4, ring": (4, dict(cp=4)),
    "cp4, alltoall, more ranks than key/value heads": (4, dict(cp=4, context_mode="alltoall")),
    "cp4, allgather": (4, dict(cp=4, context_mode="allgather")),
    "cp4, ring, document mask": (4, dict(cp=4)),
    "cp2, alltoall, document mask": (2, dict(cp=2, context_mode="alltoall")),
    "cp2, allgather, document mask": (2, dict(cp=2, context_mode="allgather")),
    "cp2 tp2, ring": (4, dict(cp=2, tp=2)),
    "cp2 tp2, alltoall, without sequence parallelism": (
        4,
        dict(cp=2, tp=2, context_mode="alltoall", sequence_parallel=False),
    ),
    "cp2 tp4, allgather": (8, dict(cp=2, tp=4, context_mode="allgather")),
    "cp2 pp2 dp2, alltoall, document mask": (8, dict(cp=2, pp=2, context_mode="alltoall")),
}
"""Of the schedules, those that reach every mechanism: :data:`PIPELINES` has all of them."""

PIPELINES = {
    f"pp{pp} vpp{vpp}, {schedule}{mask}": (pp, dict(pp=pp, vpp=vpp, schedule=schedule, layers_per_stage="balanced"))
    for pp in (2, 3, 4)
    for vpp in (1, 2)
    for schedule in SCHEDULES
    for mask in ("", ", document mask")
    if vpp in SCHEDULES[schedule].chunks
}
"""Of 6 layers; with 4 microbatches, which 3 stages do not divide."""


@pytest.fixture(scope="module")
def models(workers, tmp_path_factory):
    """By name, a recipe, and the gradients of one process with and without a document mask. Made once: pytest would
    make a fixture with a parameter anew for each test that has another parameter, too."""
    shapes = MODELS | {"OLMo 2": OLMO2}
    return cache(lambda name: reference(workers, tmp_path_factory.mktemp("gradients"), shapes[name]))


@pytest.fixture
def model(request, models):
    return models(request.param)


@pytest.fixture(scope="module", params=MODELS)
def six_layers(request, workers, tmp_path_factory):
    """The same of six layers."""
    return reference(workers, tmp_path_factory.mktemp("six_layers"), MODELS[request.param] | {"num_hidden_layers": 6})


def reference(workers, folder, model):
    recipe = write_recipe(folder, model=model, train=dict(z_loss=0.01))
    expected = {}
    for masked in (False, True):
        ((parts, calls),) = workers.run(1, gradients, recipe, [f"data.document_mask={str(masked).lower()}"])
        assert not calls
        expected[masked] = assembled(parts)
    return recipe, expected


def run(workers, recipe, layout, mutation=None, recompute="none"):
    ranks, parallel = (LAYOUTS | PIPELINES)[layout]
    overrides = layout_overrides(parallel)
    overrides += [f"data.document_mask={str('mask' in layout).lower()}", f"train.recompute={recompute}"]
    return workers.run(ranks, gradients, recipe, overrides, mutation)


@pytest.mark.parametrize(("model", "layout"), on_models(LAYOUTS, list(MODELS)), indirect=["model"])
def test_every_gradient_equals_that_of_one_process(layout, model, workers):
    recipe, expected = model
    assert largest_difference(run(workers, recipe, layout), expected["mask" in layout]) < TOLERANCE


@pytest.mark.parametrize("model", ["tied, biases, scaled gains"], indirect=True)
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    "layout",
    ["tp2", "tp2 without sequence parallelism", "pp2", "tp2 pp2 dp2", "tp2, document mask"],
)
def test_every_gradient_equals_that_of_one_process_that_keeps_all(layout, recompute, model, workers):
    recipe, expected = model
    results = run(workers, recipe, layout, recompute=recompute)
    assert largest_difference(results, expected["mask" in layout]) < TOLERANCE


OLMO2_LAYOUTS = {
    "tp2": "none",
    "tp2 without sequence parallelism": "selective",
    "tp4, more ranks than key/value heads": "none",
    "tp2 pp2, zb-h1": "full",
    "cp2 tp2, ring": "full",
    "dp2 zero 3": "full",
    "cp2 pp2 dp2, alltoall, document mask": "none",
}
"""With what is computed again: where its mechanisms meet. The rest takes longer."""


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        *OLMO2_LAYOUTS.items(),
        *(pytest.param(layout, "none", marks=pytest.mark.long) for layout in LAYOUTS if layout not in OLMO2_LAYOUTS),
    ],
)
@pytest.mark.parametrize("model", ["OLMo 2"], indirect=True)
def test_every_gradient_of_an_olmo2_equals_that_of_one_process(layout, recompute, model, workers):
    recipe, expected = model
    results = run(workers, recipe, layout, recompute=recompute)
    assert largest_difference(results, expected["mask" in layout]) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_gradient_of_every_schedule_equals_that_of_one_process(pipeline, six_layers, workers):
    recipe, expected = six_layers
    assert largest_difference(run(workers, recipe, pipeline), expected["mask" in pipeline]) < TOLERANCE


def without_targets_on_a_rank(rank, ranks, recipe, overrides):
    """The gradients where the second of two context-parallel ranks, or who has its tokens, has no target."""

    def none_there(tokens, positions):
        targets = targets_of(tokens, positions)
        places = places_of(1, 2, targets.shape[-1], targets.device)
        return targets.index_fill(-1, places, IGNORED_TARGET)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megagap.training.step.targets_of", none_there)
        return gradients(rank, ranks, recipe, overrides)


@pytest.mark.parametrize("mode", ["ring", "alltoall", "allgather"])
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_a_context_parallel_rank_without_any_target_does_no_harm(mode, model, workers):
    recipe, _ = model
    overrides = ["data.document_mask=true"]
    ((parts, _),) = workers.run(1, without_targets_on_a_rank, recipe, overrides)
    cp = ["parallel.cp=2", f"parallel.context_mode={mode}"]
    results = workers.run(2, without_targets_on_a_rank, recipe, overrides + cp)
    assert largest_difference(results, assembled(parts)) < TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("model", ["tied, biases, scaled gains"], indirect=True)
def test_every_reduction_that_is_dropped_or_doubled_is_seen(model, workers):
    """In layouts that together reach every call site of a collective between the batch and the gradients."""
    recipe, expected = model
    seen: set[str] = set()
    missed = []
    for layout in (
        "tp2 pp2 dp2",
        "tp2 without sequence parallelism",
        "tp4, more ranks than key/value heads",
        "dp2, document mask",
        "dp2 zero 0",
        "dp4 in 2 replicas, zero 3",
        "cp2, ring",
        "cp2, alltoall",
        "cp2, allgather",
    ):
        counts = [calls for _, calls in run(workers, recipe, layout)]
        most = {site: max(calls[site] for calls in counts) for site in set().union(*counts)}
        for site in sorted(set(most) - seen):
            for mutation in mutations(site, most[site]):
                difference = largest_difference(run(workers, recipe, layout, mutation), expected["mask" in layout])
                if difference <= 1000 * TOLERANCE:  # not a number: wrong parameters overflowed
                    missed.append((layout, mutation, difference))
        seen |= set(most)
    assert not missed
    assert seen == SITES


@pytest.mark.parametrize("model", ["OLMo 2"], indirect=True)
def test_every_sum_of_the_norms_of_queries_and_keys_that_is_dropped_or_doubled_is_seen(model, workers):
    recipe, expected = model
    for part in ("forward", "backward"):
        for how in ("drop", "double"):
            mutation = Mutation(f"projection_norm._Summed.{part}: all_reduce over tp", 0, how)
            found = run(workers, recipe, "tp2", mutation)
            assert all(calls[mutation.site] for _, calls in found)
            assert not largest_difference(found, expected[False]) <= 1000 * TOLERANCE, mutation


def mutations(site, calls):
    """Of the first and the last call of a site."""
    # The last gather at stage 3 is of a gain, of which the backward pass has kept the product with its scale.
    last = calls - 2 if ".start_gather:" in site else calls - 1
    chosen = sorted({0, last})
    # Any number that is the same on all ranks may be subtracted before exponentials are taken.
    ways = ("drop",) if " MAX " in site else ("drop", "double")
    return [Mutation(site, call, how) for call in chosen for how in ways]


SITES = {
    "context._Gathered.backward: reduce_scatter_async over cp",
    "context._Ring.backward: pass_on_async over cp",
    "context._Ring.forward: pass_on_async over cp",
    "context._ToHeads.backward: all_to_all_async over cp",
    "context._ToHeads.forward: all_to_all_async over cp",
    "context._ToTokens.backward: all_to_all_async over cp",
    "context._ToTokens.forward: all_to_all_async over cp",
    "context._gather_in_order: all_gather_async over cp",
    "cross_entropy._over_vocabulary: all_reduce over tp",
    "cross_entropy._over_vocabulary: all_reduce MAX over tp",
    "gradient_store.Bucket.start_gather: all_gather_flat_async over shard",
    "gradient_store.Bucket.start_reduction: all_reduce_async over data",
    "gradient_store.Bucket.start_reduction: reduce_scatter_flat_async over shard",
    "gradient_store.Bucket.sum_over_replicas: all_reduce_async over embedding",
    "gradient_store.Bucket.sum_over_replicas: all_reduce_async over kv",
    "gradient_store.Bucket.sum_over_replicas: all_reduce_async over tp",
    "gradient_store.Bucket.sum_over_replicate: all_reduce_async over replicate",
    "step.count_targets: all_reduce over data",
    "tensor._ColumnProducts.backward: all_gather_async over tp",
    "tensor._ColumnProducts.backward: all_reduce_async over tp",
    "tensor._ColumnProducts.backward: reduce_scatter_async over tp",
    "tensor._ColumnProducts.forward: all_gather_async over tp",
    "tensor._Leave.backward: all_gather_async over tp",
    "tensor._Leave.forward: all_reduce_async over tp",
    "tensor._Leave.forward: reduce_scatter_async over tp",
    "tensor._LinearCrossEntropy.forward: all_gather_async over tp",
    "tensor._LinearCrossEntropy.forward: all_reduce_async over tp",
    "tensor._LinearCrossEntropy.forward: reduce_scatter_async over tp",
    "tensor._RowProduct.backward: all_gather_async over tp",
    "tensor._RowProduct.forward: all_reduce_async over tp",
    "tensor._RowProduct.forward: reduce_scatter_async over tp",
}
"""A collective that is added to the step is to be added here, once it is reached by the layouts above."""
