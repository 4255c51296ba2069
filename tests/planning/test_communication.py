"""What data-parallel ranks send in a step, by arithmetic, is what real processes do."""

from collections import Counter

import pytest
import torch

from megagap.config import load_recipe
from megagap.model.llama import sharded_parameters, stages_of_recipe
from megagap.optim.buckets import BUCKET_ELEMENTS
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.mesh import Mesh
from megagap.planning.communication import data_parallel_traffic
from megagap.planning.memory import stored_parameters
from megagap.training.mesh import make_layout
from tests.parity.gradients import gradients
from tests.recipes import write_recipe

COLLECTIVES = {
    "reduce_scatter_flat_async": "reduce-scatter",
    "all_gather_flat_async": "all-gather",
    "all_reduce_async": "all-reduce",
}

LAYOUTS = {
    "dp2 zero 3": (2, []),
    "dp4 in 2 replicas, zero 3": (4, ["parallel.dp_replicate=2"]),
    "pp2 dp2 zero 3, gpipe": (4, ["parallel.pp=2", "parallel.schedule=gpipe"]),
    "pp2 dp2 zero 3, zb-h1": (4, ["parallel.pp=2", "parallel.schedule=zb-h1"]),
    "pp2 dp2 zero 3, zb-v": (4, ["parallel.pp=2", "parallel.schedule=zb-v", "model.num_hidden_layers=4"]),
    "tp2 dp2 zero 3": (4, ["parallel.tp=2"]),
}


def calls_of_a_step(rank, ranks, recipe, overrides):
    return gradients(rank, ranks, recipe, overrides, bucket_elements=BUCKET_ELEMENTS)[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_calls_of_a_step_are_those_that_real_processes_make(workers, tmp_path, layout):
    ranks, overrides = LAYOUTS[layout]
    overrides = [*overrides, "optim.zero=3"]
    recipe = write_recipe(tmp_path)
    settings = load_recipe(recipe, overrides, ranks)
    for rank, calls in enumerate(workers.run(ranks, calls_of_a_step, recipe, overrides)):
        made: Counter[tuple[str, str]] = Counter()
        for site, number in calls.items():
            if site.startswith("gradient_store"):
                name, axis = site.split(": ")[1].split(" over ")
                made[COLLECTIVES[name], axis] += number
        stage = rank // (ranks // settings.parallel.pp)
        expected = {(t.collective, t.axis): t.calls for t in data_parallel_traffic(settings, ranks, stage)}
        assert made == expected


def settings_of(tmp_path, ranks, *overrides):
    return load_recipe(write_recipe(tmp_path), [*overrides, "train.precision=bf16-mixed"], ranks)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (0, {("all-reduce", "gradients"): 4 * 1}),
        (1, {("reduce-scatter", "gradients"): 4 * 1, ("all-gather", "parameters"): 2 * 1}),
        (2, {("reduce-scatter", "gradients"): 4 * 2, ("all-gather", "parameters"): 2 * 1}),
    ],
)
def test_the_volume_is_that_of_the_stage(tmp_path, zero, expected):
    """2 microbatches; bytes per parameter of the whole tensors."""
    settings = settings_of(tmp_path, 4, f"optim.zero={zero}", "train.global_batch_size=8", "train.micro_batch_size=1")
    elements = stored_parameters(settings, 4, 0).elements
    traffic = data_parallel_traffic(settings, 4)
    assert {(t.collective, t.tensors): t.bytes / elements for t in traffic} == expected
    rounds = {"all-reduce": 2, "reduce-scatter": 1, "all-gather": 1}
    assert all(t.sent_bytes == rounds[t.collective] * t.bytes * 3 // 4 for t in traffic)


def test_replicas_sum_slices_only(tmp_path):
    settings = settings_of(tmp_path, 8, "parallel.dp_replicate=4", "train.global_batch_size=16")
    elements = stored_parameters(settings, 8, 0).elements
    (summed,) = [t for t in data_parallel_traffic(settings, 8) if t.axis == "replicate"]
    assert (summed.collective, summed.ranks, summed.bytes) == ("all-reduce", 4, 4 * elements // 2)


def test_one_process_sends_nothing(tmp_path):
    for zero in range(4):
        assert data_parallel_traffic(settings_of(tmp_path, 1, f"optim.zero={zero}"), 1) == []


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, ["optim.zero=0"]),
        (8, ["parallel.tp=2", "parallel.dp_replicate=2"]),
        (8, ["parallel.tp=4", "optim.zero=3"]),  # two ranks share each key/value head
        (8, ["parallel.pp=2", "parallel.cp=2"]),
    ],
    ids=str,
)
def test_what_is_exchanged_for_whole_matrices_is_the_mean_of_what_each_rank_gives(tmp_path, ranks, overrides):
    settings = settings_of(tmp_path, ranks, "optim.name=muon", *overrides)
    layout = make_layout(settings, ranks)
    for stage in range(settings.parallel.pp):
        given: Counter[str] = Counter()
        members = [rank for rank in range(ranks) if layout.coordinates(rank)["pp"] == stage]
        for rank in members:
            mesh = Mesh.without_groups(layout, rank, torch.device("meta"))
            stages = stages_of_recipe(settings, mesh)
            blocks = [each.blocks() for each in stages]
            optimizer = DistributedOptimizer(sharded_parameters(stages), settings.optim, mesh, blocks=blocks)
            for exchange in (each for round_ in optimizer.rounds.values() for each in round_.exchanges):
                given[exchange.axis.name] += sum(piece.size for _, _, piece in exchange.given)
        found = {t.axis: t for t in data_parallel_traffic(settings, ranks, stage) if t.tensors == "updates"}
        assert found and all(t.calls == (1 if t.axis in ("data", "replicate") else 2) for t in found.values())
        for axis, traffic in found.items():
            assert traffic.bytes == pytest.approx(2 * given[axis] / len(members), abs=2), axis


def test_adamw_exchanges_nothing_for_matrices(tmp_path):
    assert all(t.tensors != "updates" for t in data_parallel_traffic(settings_of(tmp_path, 8, "parallel.tp=2"), 8))
