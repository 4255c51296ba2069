"""The distributed optimizer equals torch.optim.AdamW with clip_grad_norm_, whatever the ranks and buckets."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from megagap.config import Optim
from megagap.optim.clipping import clip_divisor, squared_norm
from megagap.optim.distributed import DistributedOptimizer
from megagap.parallel.collectives import all_reduce
from megagap.parallel.cross_entropy import linear_cross_entropy
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter, whole

SHAPES = {"model.embed_tokens.weight": (7, 5), "a.weight": (3, 5), "norm.weight": (5,), "b.weight": (4, 4)}
OPTIM = Optim(lr=0.05, weight_decay=0.3, clip_grad=1.5)


def parameters() -> list[ShardedParameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, shape in SHAPES.items():
        parameter = ShardedParameter(whole(name, shape), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            parameter.copy_(torch.randn(shape, generator=generator))
        made.append(parameter)
    return made


def gradient(step: int, rank: int, microbatch: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + microbatch))


def train(rank: int, ranks: int, bucket_elements: int, steps: int = 3) -> dict[str, torch.Tensor]:
    """Two microbatches of made-up gradients per step and rank; returns the final parameters by name."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    made = parameters()
    optimizer = DistributedOptimizer(made, OPTIM, mesh, bucket_elements=bucket_elements)
    for step in range(steps):
        optimizer.store.begin(2)
        optimizer.store.wait_for_parameters()
        for microbatch in range(2):
            torch.autograd.backward(made, [gradient(step, rank, microbatch, p.shape) for p in made])
        optimizer.store.finish()
        norm = all_reduce(optimizer.store.squared_norm(), mesh.world).sqrt()
        optimizer.step(OPTIM.lr, clip_divisor(norm, OPTIM.clip_grad), torch.tensor(True))
    optimizer.store.wait_for_parameters()
    return {p.shard.name: p.detach().clone() for p in made}


def reference(ranks: int, steps: int = 3) -> dict[str, torch.Tensor]:
    made = {p.shard.name: torch.nn.Parameter(p.detach().clone()) for p in parameters()}
    embedding = [made["model.embed_tokens.weight"]]
    rest = [p for name, p in made.items() if "embed" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.0}, {"params": rest, "weight_decay": OPTIM.weight_decay}],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
    )
    for step in range(steps):
        for p in made.values():
            p.grad = sum(gradient(step, rank, m, p.shape) for rank in range(ranks) for m in range(2))
        torch.nn.utils.clip_grad_norm_(made.values(), OPTIM.clip_grad)
        optimizer.step()
    return {name: p.detach() for name, p in made.items()}


@pytest.mark.parametrize("bucket_elements", [1, 20, 10_000])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_updates_equal_torch_adamw_with_clipping(workers, ranks, bucket_elements):
    expected = reference(ranks)
    for values in workers.run(ranks, train, bucket_elements):
        for name, value in values.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def test_a_rejected_step_changes_nothing():
    mesh = Mesh.single()
    made = parameters()
    optimizer = DistributedOptimizer(made, OPTIM, mesh)
    before = {s.kind + s.shard.name: s.tensor.clone() for s in optimizer.slices(owned_only=True)}
    optimizer.store.begin(1)
    torch.autograd.backward(made, [torch.full(p.shape, float("nan")) for p in made])
    optimizer.store.finish()
    optimizer.step(OPTIM.lr, torch.tensor(float("nan")), torch.tensor(False))
    assert optimizer.updates == 0
    for s in optimizer.slices(owned_only=True):
        assert torch.equal(s.tensor, before[s.kind + s.shard.name])


def test_bf16_parameters_follow_fp32_masters():
    """An update far below bf16's resolution is not lost: it accumulates in the master."""
    made = parameters()
    initial = {p.shard.name: p.detach().clone() for p in made}
    optim = Optim(lr=1e-5, weight_decay=0.0, clip_grad=0)
    optimizer = DistributedOptimizer(made, optim, Mesh.single(), torch.bfloat16)
    assert all(torch.equal(p, initial[p.shard.name].bfloat16()) for p in made)
    for _ in range(3):
        optimizer.store.begin(1)
        torch.autograd.backward(made, [torch.ones_like(p) for p in made])
        optimizer.store.finish()
        optimizer.step(optim.lr, torch.tensor(1.0), torch.tensor(True))
    for part in optimizer.slices(owned_only=True):
        if part.kind == "weight":
            assert part.tensor.dtype == torch.float32
            moved = initial[part.shard.name].flatten()[part.start : part.stop] - part.tensor
            torch.testing.assert_close(moved, torch.full_like(moved, 3e-5), rtol=2e-2, atol=0)


def padded_slices(rank: int, ranks: int) -> list[tuple[str, str, int, int]]:
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    optimizer = DistributedOptimizer(parameters(), OPTIM, mesh, bucket_elements=20)
    return [(s.kind, s.shard.name, s.start, s.stop) for s in optimizer.slices(owned_only=True)]


def test_slices_of_all_ranks_cover_every_element_once(workers):
    covered: dict[tuple[str, str], list[int]] = {}
    for slices in workers.run(4, padded_slices):
        for kind, name, start, stop in slices:
            covered.setdefault((kind, name), []).extend(range(start, stop))
    assert set(covered) == {(k, n) for k in ("weight", "exp_avg", "exp_avg_sq") for n in SHAPES}
    for (_, name), elements in covered.items():
        assert sorted(elements) == list(range(torch.Size(SHAPES[name]).numel()))


def test_the_gradient_norm_of_millions_of_elements_is_exact_to_six_digits():
    gradient = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert squared_norm([gradient[:2_000_000], gradient[2_000_000:]]).item() == pytest.approx(
        gradient.double().square().sum().item(), rel=1e-6
    )


def test_products_go_to_the_sink_and_the_rest_by_autograd_once_each():
    """A tied weight: the loss adds its products directly, the embedding leaves its gradient to autograd."""
    weight = ShardedParameter(whole("model.embed_tokens.weight", (6, 4)), torch.device("cpu"), torch.float32)
    weight.uses = 2
    with torch.no_grad():
        weight.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    plain = weight.detach().clone().requires_grad_()
    optimizer = DistributedOptimizer([weight], OPTIM, Mesh.single())
    tokens, targets = torch.tensor([[1, 5, 2]]), torch.tensor([[5, 2, 0]])
    optimizer.store.begin(1)
    loss, _ = linear_cross_entropy(F.embedding(tokens, weight), weight, targets, torch.ones(()), Mesh.single().tp)
    loss.backward()
    (bucket,) = optimizer.store.buckets
    assert bucket.is_complete
    F.cross_entropy((F.embedding(tokens, plain) @ plain.T)[0], targets[0], reduction="sum").backward()
    torch.testing.assert_close(weight.sink.gradient, plain.grad)


def test_a_loss_that_is_not_the_root_of_the_backward_pass_is_an_error():
    weight = ShardedParameter(whole("lm_head.weight", (6, 4)), torch.device("cpu"), torch.float32)
    DistributedOptimizer([weight], OPTIM, Mesh.single()).store.begin(1)
    x = torch.randn(1, 3, 4, requires_grad=True)
    loss, _ = linear_cross_entropy(x, weight, torch.zeros(1, 3, dtype=torch.long), torch.ones(()), Mesh.single().tp)
    with pytest.raises(AssertionError, match="root of the backward pass"):
        (2 * loss).backward()


def test_an_optimizer_that_is_no_longer_used_is_freed():
    """With its buckets and the process groups of its mesh, although autograd calls it."""
    made = parameters()
    optimizer = DistributedOptimizer(made, OPTIM, Mesh.single())
    optimizer.store.begin(1)
    torch.autograd.backward(made, [gradient(0, 0, 0, parameter.shape) for parameter in made])
    found = weakref.ref(optimizer)
    del optimizer, made
    gc.collect()
    assert found() is None
