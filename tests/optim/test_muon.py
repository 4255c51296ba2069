"""Muon equals a plain one on one process, and its updates are the same bits in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagap.config import Optim, load_recipe
from megagap.errors import ConfigError
from megagap.model.init import initialise
from megagap.model.llama import sharded_parameters, stages_of_recipe
from megagap.optim.clipping import clip_divisor
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Shard, ShardedParameter, whole
from megagap.process.rendezvous import Process
from megagap.training.mesh import make_mesh
from tests.recipes import write_recipe
from tests.training_run import train_recipe

OPTIM = Optim(name="muon", lr=0.05, weight_decay=0.3, clip_grad=1.5, momentum=0.9)
SHAPES = {
    "model.embed_tokens.weight": (7, 6),
    "model.layers.0.norm.weight": (6,),
    "model.layers.0.square.weight": (6, 6),
    "model.layers.0.wide.weight": (4, 6),
    "model.layers.0.tall.weight": (9, 6),
    "model.layers.0.tall.bias": (9,),
    "lm_head.weight": (7, 6),
}


def gradient(name: str, shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = sum(name.encode()) * 100 + step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_muon(weights: dict[str, Tensor], steps: int) -> None:
    """As it is published: Jordan et al. 2024, with the scale of Liu et al. 2025."""
    others = {name: weight for name, weight in weights.items() if ".layers." not in name or weight.dim() == 1}
    embedding = [others.pop("model.embed_tokens.weight")]
    groups = [{"params": embedding, "weight_decay": 0.0}, {"params": list(others.values())}]
    adamw = torch.optim.AdamW(groups, OPTIM.lr, OPTIM.betas, OPTIM.eps, OPTIM.weight_decay)
    buffers: dict[str, Tensor] = {}
    for step in range(steps):
        for name, weight in weights.items():
            weight.grad = gradient(name, weight.shape, step)
        torch.nn.utils.clip_grad_norm_(weights.values(), OPTIM.clip_grad)
        adamw.step()
        for name, weight in weights.items():
            if ".layers." in name and weight.dim() == 2:
                buffer = buffers[name] = OPTIM.momentum * buffers.get(name, torch.zeros(())) + weight.grad
                x = weight.grad + OPTIM.momentum * buffer
                x = x / x.norm()
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                with torch.no_grad():
                    weight.mul_(1 - OPTIM.lr * OPTIM.weight_decay)
                    weight.sub_(OPTIM.lr * 0.2 * max(weight.shape) ** 0.5 * x)


def test_updates_equal_a_plain_muon_with_adamw_for_all_but_the_layers_matrices():
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}
    made = []
    for name, shape in SHAPES.items():
        parameter = ShardedParameter(whole(name, shape), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            parameter.copy_(weights[name])
        made.append(parameter)
    optimizer = DistributedOptimizer(made, OPTIM, Mesh.single())
    for step in range(4):
        optimizer.store.begin(1)
        torch.autograd.backward(made, [gradient(p.shard.name, p.shape, step) for p in made])
        optimizer.store.finish()
        divisor = clip_divisor(optimizer.store.squared_norm().sqrt(), OPTIM.clip_grad)
        optimizer.step(OPTIM.lr, divisor, torch.tensor(True))
    plain_muon(weights, 4)
    for parameter in made:
        torch.testing.assert_close(parameter.detach(), weights[parameter.shard.name].detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- layouts


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "zero 0": (2, ["optim.zero=0"]),
    "zero 1": (4, []),
    "zero 2, in 2 replicas": (4, ["optim.zero=2", "parallel.dp_replicate=2"]),
    "zero 3": (2, ["optim.zero=3"]),
    "tp2": (2, ["parallel.tp=2"]),
    "tp4, two ranks per key head": (4, ["parallel.tp=4"]),
    "tp2 dp2, zero 3, cp2": (4, ["parallel.tp=2", "parallel.cp=2", "optim.zero=3"]),
    "pp2 dp2, zb-v": (4, ["parallel.pp=2", "parallel.schedule=zb-v"]),
    "tp2 dp4 in 2 replicas": (8, ["parallel.tp=2", "parallel.dp_replicate=2"]),
}

SMALL = 600
"""Elements of a bucket: less than half of the larger matrices, which are cut."""


def updated(
    rank: int, ranks: int, recipe: Path, overrides: list[str], dtype: torch.dtype, bucket_elements: int
) -> dict[tuple[str, str], list[tuple[Shard, int, Tensor]]]:
    """Three steps, the second of which is rejected, of the same global gradients in every layout: the slices that this
    rank owns afterwards."""
    settings = load_recipe(recipe, overrides, ranks)
    mesh = make_mesh(settings, Process(rank, ranks, rank, ranks), torch.device("cpu"))
    stages = stages_of_recipe(settings, mesh)
    parameters = sharded_parameters(stages)
    initialise(parameters, settings.model, settings.train.seed)
    blocks = [stage.blocks() for stage in stages]
    optimizer = DistributedOptimizer(parameters, settings.optim, mesh, dtype, bucket_elements, blocks, seed=3)
    for step in range(3):
        for bucket in optimizer.store.buckets:
            for part in bucket.slices("gradient", bucket.own_gradient):
                shard = part.shard
                rows = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))
                own = gradient(shard.name, shard.shape, step)[rows].flatten()[part.start : part.stop]
                part.tensor.copy_(own if step != 1 else torch.full_like(own, torch.nan))
        optimizer.step(0.02, torch.tensor(2.0), torch.tensor(step != 1))
        optimizer.store.wait_for_parameters()
    found: dict[tuple[str, str], list[tuple[Shard, int, Tensor]]] = {}
    for part in optimizer.slices(owned_only=True):
        found.setdefault((part.kind, part.shard.name), []).append((part.shard, part.start, part.read().clone()))
    return found


def assembled(results: list[dict[tuple[str, str], list[tuple[Shard, int, Tensor]]]]) -> dict[tuple[str, str], Tensor]:
    """Global tensors; every element of one rank."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for result in results:
        for key, parts in result.items():
            for shard, start, values in parts:
                tensor = tensors.setdefault(key, torch.full(shard.shape, torch.nan))
                rows = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))
                flat = tensor[rows].flatten()
                assert flat[start : start + len(values)].isnan().all(), f"{key} has two owners"
                flat[start : start + len(values)] = values.float()
                tensor[rows] = flat.view(shard.sizes)
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=56)
    model = dict(shape, num_hidden_layers=4, attention_bias=True)
    return write_recipe(tmp_path_factory.mktemp("muon"), model=model, optim=dict(name="muon", lr=1e-2))


@pytest.fixture(scope="module")
def one_process(workers, recipe: Path) -> Any:
    """By dtype and settings of the moments: the reference, computed once."""
    known: dict[Any, dict[tuple[str, str], Tensor]] = {}

    def of(dtype: torch.dtype, *overrides: str) -> dict[tuple[str, str], Tensor]:
        if (dtype, overrides) not in known:
            found = workers.run(1, updated, recipe, list(overrides), dtype, 10**6)
            known[dtype, overrides] = assembled(found)
        return known[dtype, overrides]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_gradients_make_the_same_bits_in_every_layout(workers, recipe, one_process, layout):
    ranks, overrides = LAYOUTS[layout]
    found = assembled(workers.run(ranks, updated, recipe, overrides, torch.float32, SMALL))
    require_equal(found, one_process(torch.float32))
    kinds = {kind for kind, name in found if name.endswith("q_proj.weight")}
    others = {kind for kind, name in found if name.endswith(("embed_tokens.weight", "q_proj.bias", "lm_head.weight"))}
    assert kinds == {"weight", "momentum"} and others == {"weight", "exp_avg", "exp_avg_sq"}


def test_masters_and_momentum_in_bf16_are_the_same_bits_too(workers, recipe, one_process):
    moments = "optim.moments_dtype=bf16"
    overrides = ["parallel.tp=2", "optim.zero=2", moments]
    found = assembled(workers.run(4, updated, recipe, overrides, torch.bfloat16, SMALL))
    require_equal(found, one_process(torch.bfloat16, moments))
    plain = one_process(torch.bfloat16)
    momentum = found["momentum", "model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(momentum, momentum.bfloat16().float())
    torch.testing.assert_close(momentum, plain["momentum", "model.layers.0.mlp.up_proj.weight"], rtol=2e-2, atol=2e-3)


def require_equal(found: dict[tuple[str, str], Tensor], expected: dict[tuple[str, str], Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


# ---------------------------------------------------------------------------------------------------------------- runs


def run(workers: Any, ranks: int, recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    return workers.run(ranks, train_recipe, recipe, [f"run.dir={folder}", *overrides])[0]


def test_a_run_trains_like_one_process_and_goes_on_bit_for_bit_and_in_another_layout(workers, recipe, tmp_path):
    layout = ["parallel.tp=2", "optim.zero=3", "run.insight_every=2"]
    expected = run(workers, 1, recipe, tmp_path / "one", "train.steps=5")
    metrics = run(workers, 4, recipe, tmp_path / "four", "train.steps=5", "checkpoint.every=3", *layout)
    at_once = [m["loss"] for m in metrics]
    assert at_once == pytest.approx([m["loss"] for m in expected], rel=1e-4)
    start = f"checkpoint.load={tmp_path / 'four/checkpoints/step_00000003'}"
    same = run(workers, 4, recipe, tmp_path / "again", "train.steps=5", start, *layout)
    assert [m["loss"] for m in same] == at_once[3:]
    other = run(workers, 2, recipe, tmp_path / "other", "train.steps=5", start, "parallel.pp=2", "optim.zero=1")
    assert [m["loss"] for m in other] == pytest.approx(at_once[3:], rel=1e-4)


def test_moments_of_another_optimizer_are_refused_and_its_weights_may_be_taken(workers, recipe, tmp_path):
    run(workers, 1, recipe, tmp_path / "adamw", "train.steps=2", "optim.name=adamw")
    start = f"checkpoint.load={tmp_path / 'adamw'}"
    with pytest.raises(AssertionError, match=r"optim\.name was adamw, is muon"):
        run(workers, 1, recipe, tmp_path / "muon", "train.steps=4", start)
    weights = "checkpoint.load_mode=model+data"
    assert len(run(workers, 1, recipe, tmp_path / "taken", "train.steps=5", start, weights)) == 3


def test_momentum_is_refused_where_it_would_be_ignored(tmp_path):
    with pytest.raises(ConfigError, match=r'optim.momentum = 0.9 +applies only to optim.name = "muon"'):
        load_recipe(write_recipe(tmp_path), ["optim.momentum=0.9"])
