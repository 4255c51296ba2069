"""Initial weights depend on (seed, name, row, column) and on nothing else."""

import math

import pytest
import torch

from megagap.model.init import initialise, standard_normal
from megagap.model.llama import build_stages, build_whole, sharded_parameters
from megagap.parallel.mesh import Mesh
from megagap.parallel.placement import Placement
from megagap.parallel.shard import ShardedParameter, split
from tests.models import tiny_model

MODEL = tiny_model(num_hidden_layers=3, tie_word_embeddings=True, attention_bias=True)


def initial_weights(rank: int, ranks: int, layers_per_stage: list[int], tp: int):
    mesh = Mesh.create(
        device=torch.device("cpu"),
        world_size=ranks,
        rank=rank,
        pp=len(layers_per_stage),
        tp=tp,
        kv_sharing=max(1, tp // MODEL.num_key_value_heads),
    )
    placement = Placement.loop(layers_per_stage)
    stages = build_stages(MODEL, placement, mesh, sequence_parallel=tp > 1, dtype=torch.float32)
    initialise(sharded_parameters(stages), MODEL, seed=5)
    return [(p.shard, p.detach().clone()) for p in sharded_parameters(stages)]


@pytest.mark.parametrize(("ranks", "layers", "tp"), [(2, [3], 2), (4, [3], 4), (2, [2, 1], 1), (4, [1, 2], 2)])
def test_every_layout_starts_from_the_same_bits(workers, ranks, layers, tp):
    whole = {shard.name: value for shard, value in initial_weights(0, 1, [3], 1)}
    seen = set()
    for weights in workers.run(ranks, initial_weights, layers, tp):
        for shard, value in weights:
            expected = whole[shard.name]
            for dim, (offset, size) in enumerate(zip(shard.offsets, shard.sizes, strict=True)):
                expected = expected.narrow(dim, offset, size)
            assert torch.equal(value[: shard.sizes[0]], expected), shard
            assert not value[shard.sizes[0] :].any(), "padding must be zero"
            seen.add(shard.name)
    assert seen == whole.keys()


def test_matrices_are_normal_with_the_depth_scaled_width_gains_one_biases_zero():
    weights = {shard.name: value for shard, value in initial_weights(0, 1, [3], 1)}
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    down = weights["model.layers.2.mlp.down_proj.weight"]
    assert q.std().item() == pytest.approx(0.02, rel=0.1)
    assert down.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.1)
    assert (weights["model.norm.weight"] == 1).all()
    assert not weights["model.layers.0.self_attn.q_proj.bias"].any()


def test_matrices_whose_outputs_are_normalised_have_no_depth_scaled_width():
    model = tiny_model(num_hidden_layers=3, norm_position="post", qk_norm=True)
    stage = build_whole(model)
    initialise(stage.sharded_parameters(), model, seed=5)
    weights = {parameter.shard.name: parameter for parameter in stage.sharded_parameters()}
    assert weights["model.layers.2.mlp.down_proj.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert (weights["model.layers.1.self_attn.q_norm.weight"] == 1).all()


def test_seeds_and_names_give_different_weights():
    def draw(name: str, seed: int) -> torch.Tensor:
        parameter = ShardedParameter(split(name, (8, 8), 0, 0, 1), torch.device("cpu"), torch.float32)
        initialise([parameter], MODEL, seed)
        return parameter.detach()

    assert torch.equal(draw("a.weight", 1), draw("a.weight", 1))
    assert not torch.equal(draw("a.weight", 1), draw("b.weight", 1))
    assert not torch.equal(draw("a.weight", 1), draw("a.weight", 2))


def test_draws_are_standard_normal_and_uncorrelated():
    values = standard_normal(torch.arange(1_000_000), key=42)
    assert values.mean().abs() < 4e-3 and values.var().item() == pytest.approx(1, abs=6e-3)
    assert (values[:-1] * values[1:]).mean().abs() < 4e-3
    # Kolmogorov-Smirnov distance to the normal distribution; 1.95 / sqrt(n) at 0.1 %.
    uniform = torch.special.ndtr(values.sort().values)
    assert (uniform - torch.linspace(0, 1, len(values), dtype=torch.float64)).abs().max() < 1.95e-3


def test_the_integers_are_splitmix64s():
    """First outputs for seed 1234567 of the reference implementation (https://prng.di.unimi.it/splitmix64.c)."""
    from megagap.model.init import _splitmix64

    words = _splitmix64(torch.arange(3), key=1234567).numpy().view("uint64").tolist()
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]
