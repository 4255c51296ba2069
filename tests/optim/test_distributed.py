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
from megagap.parallel.shard import Block, ShardedParameter, whole

SHAPES = {"model.embed_tokens.weight": (7, 5), "a.weight": (3, 5), "norm.weight": (5,), "b.weight": (4, 4)}
OPTIM = Optim(lr=0.05, weight_decay=0.3, clip_grad=1.5)


MODES = {"zero 0": (0, 1), "zero 1": (1, 1), "zero 2": (2, 1), "zero 3": (3, 1), "2 replicas, zero 1": (1, 2)}


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


def train(rank: int, ranks: int, bucket_elements: int, steps: int = 3, mode: str = "zero 1") -> dict[str, torch.Tensor]:
    """Two microbatches of made-up gradients per step and rank; returns the final parameters by name."""
    zero, replicate = MODES[mode]
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, dp_replicate=replicate)
    made = parameters()
    optim = OPTIM.model_copy(update={"zero": zero})
    blocks = [[Block(torch.nn.Identity(), made, made)]]
    optimizer = DistributedOptimizer(made, optim, mesh, bucket_elements=bucket_elements, blocks=blocks)
    for step in range(steps):
        optimizer.store.begin(2)
        optimizer.store.wait_for_parameters()
        for microbatch in range(2):
            torch.autograd.backward(made, [gradient(step, rank, microbatch, p.shape) for p in made])
        optimizer.store.finish()
        norm = all_reduce(optimizer.store.squared_norm(), mesh.world).sqrt()
        optimizer.step(OPTIM.lr, clip_divisor(norm, OPTIM.clip_grad), torch.tensor(True))
    for bucket in optimizer.store.buckets:
        bucket.start_gather()
    optimizer.store.wait_for_parameters()
    return {p.shard.name: p.detach().clone() for p in made}


def train_in_mode(
    rank: int,
    ranks: int,
    mode: str,
    dtype: torch.dtype,
    accept: bool = True,
    moments: str = "fp32",
    rounding: str | None = None,
) -> dict[tuple[str, str], torch.Tensor]:
    """One step of the same gradients; the parts that this rank owns, by kind and name: elements elsewhere are NaN."""
    zero, replicate = MODES[mode]
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, dp_replicate=replicate)
    made = parameters()
    blocks = [[Block(torch.nn.Identity(), made[:2], made[:2]), Block(torch.nn.Identity(), made[2:], made[2:])]]
    optim = OPTIM.model_copy(update={"zero": zero, "moments_dtype": moments, "rounding": rounding})
    gradients = dtype if rounding else None
    optimizer = DistributedOptimizer(
        made, optim, mesh, dtype, bucket_elements=20, blocks=blocks, gradient_dtype=gradients
    )
    optimizer.store.begin(1)
    # Multiples of 1/8, whose sums are exact: in whatever order.
    torch.autograd.backward(made, [(8 * gradient(0, rank, 0, p.shape)).round().to(dtype) / 8 for p in made])
    optimizer.store.finish()
    norm = all_reduce(optimizer.store.squared_norm(), mesh.world).sqrt()
    optimizer.step(OPTIM.lr, torch.full_like(norm, 2.0), torch.tensor(accept))
    found: dict[tuple[str, str], torch.Tensor] = {("norm", ""): norm}
    for part in optimizer.slices(owned_only=True):
        whole = found.setdefault((part.kind, part.shard.name), torch.full((part.shard.numel,), torch.nan))
        whole[part.start : part.stop] = part.read()
        assert part.kind == "weight" or part.dtype == (torch.bfloat16 if moments == "bf16" else torch.float32)
    return found


@pytest.mark.parametrize(
    ("dtype", "moments", "rounding"),
    [
        (torch.float32, "fp32", None),
        (torch.bfloat16, "fp32", None),
        (torch.bfloat16, "bf16", None),
        (torch.bfloat16, "bf16", "stochastic"),
        (torch.bfloat16, "bf16", "kahan"),
    ],
)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "zero 1"])
def test_masters_and_moments_are_the_same_bits_in_every_mode_and_every_element_has_one_owner(
    workers, mode, dtype, moments, rounding
):
    found, expected = (
        assembled(workers.run(4, train_in_mode, each, dtype, True, moments, rounding)) for each in (mode, "zero 1")
    )
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("mode", MODES)
def test_a_rejected_step_changes_nothing_in_any_mode(workers, mode):
    initial = {p.shard.name: p.detach().flatten() for p in parameters()}
    for (kind, name), value in assembled(workers.run(4, train_in_mode, mode, torch.float32, False)).items():
        assert kind == "norm" or torch.equal(value, initial[name] if kind == "weight" else 0 * initial[name])


def assembled(results: list[dict[tuple[str, str], torch.Tensor]]) -> dict[tuple[str, str], torch.Tensor]:
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for key in {key for result in results for key in result}:
        parts = torch.stack([result[key] for result in results if key in result])
        if key[0] != "norm":
            assert ((~parts.isnan()).sum(0) == 1).all(), f"{key}: every element has one owner"
        whole[key] = parts.nansum(0) if key[0] != "norm" else parts[0]
    return whole


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


@pytest.mark.parametrize("mode", MODES)
def test_after_50_updates_every_mode_is_within_1e_6_of_torch_adamw(workers, mode):
    expected = reference(4, steps=50)
    for values in workers.run(4, train, 20, 50, mode):
        for name, value in values.items():
            assert (value - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def test_a_rejected_step_changes_nothing():
    mesh = Mesh.single()
    made = parameters()
    optimizer = DistributedOptimizer(made, OPTIM, mesh)
    before = {s.kind + s.shard.name: s.read().clone() for s in optimizer.slices(owned_only=True)}
    optimizer.store.begin(1)
    torch.autograd.backward(made, [torch.full(p.shape, float("nan")) for p in made])
    optimizer.store.finish()
    optimizer.step(OPTIM.lr, torch.tensor(float("nan")), torch.tensor(False))
    assert optimizer.updates == 0
    for s in optimizer.slices(owned_only=True):
        assert torch.equal(s.read(), before[s.kind + s.shard.name])


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
            assert part.dtype == torch.float32
            moved = initial[part.shard.name].flatten()[part.start : part.stop] - part.read()
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
    loss, *_ = linear_cross_entropy(F.embedding(tokens, weight), weight, targets, torch.ones(()), Mesh.single().tp)
    loss.backward()
    (bucket,) = optimizer.store.buckets
    assert bucket.is_complete
    F.cross_entropy((F.embedding(tokens, plain) @ plain.T)[0], targets[0], reduction="sum").backward()
    torch.testing.assert_close(weight.sink.gradient, plain.grad)


def test_a_loss_that_is_not_the_root_of_the_backward_pass_is_an_error():
    weight = ShardedParameter(whole("lm_head.weight", (6, 4)), torch.device("cpu"), torch.float32)
    DistributedOptimizer([weight], OPTIM, Mesh.single()).store.begin(1)
    x = torch.randn(1, 3, 4, requires_grad=True)
    loss, *_ = linear_cross_entropy(x, weight, torch.zeros(1, 3, dtype=torch.long), torch.ones(()), Mesh.single().tp)
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
