"""The gradient store: what overwrites, what is reduced when, and what a forward pass waits for."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagap.config import load_recipe
from megagap.model.llama import build_stages
from megagap.optim.gradient_store import GradientStore
from megagap.parallel.embedding import lookup
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter, whole
from tests.recipes import write_recipe


def parameter(name: str, *shape: int) -> ShardedParameter:
    made = ShardedParameter(whole(name, shape), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        made.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))
    return made


def poisoned(parameters: list[ShardedParameter], dtype: torch.dtype = torch.float32) -> GradientStore:
    """A store in the middle of a run, whose gradients of the step before are not numbers."""
    store = GradientStore(parameters, Mesh.single(), dtype)
    store.begin(1)
    torch.autograd.backward(parameters, [torch.full_like(p, float("nan")) for p in parameters])
    store.finish()
    assert store.squared_norm().isnan()
    return store


def gradient_of(parameter: ShardedParameter) -> torch.Tensor:
    return parameter.sink.gradient  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_gradient_of_a_step_overwrites_and_the_next_ones_add(dtype):
    weight, gain, table = parameter("w", 3, 4), parameter("gain", 4), parameter("table", 7, 4)
    store = poisoned([table, weight, gain], dtype)
    store.begin(2)
    left, right, ids = torch.ones(5, 3, dtype=dtype), torch.ones(5, 4, dtype=dtype), torch.tensor([1, 1, 6])
    for _ in range(2):
        weight.sink.add_product(left, right)
        table.sink.add_rows(ids, right[:3])
        torch.autograd.backward(gain, torch.ones(4, dtype=dtype))
    store.finish()
    assert torch.equal(gradient_of(weight), torch.full((3, 4), 10.0))
    assert torch.equal(gradient_of(table)[:, 0], torch.tensor([0.0, 4, 0, 0, 0, 0, 2]))
    assert torch.equal(gradient_of(gain), torch.full((4,), 2.0))


def test_a_parameter_without_a_gradient_in_a_step_has_one_of_zero():
    used, unused = parameter("used", 2), parameter("unused", 3)
    store = poisoned([used, unused])
    store.begin(1)
    torch.autograd.backward(used, torch.ones(2))
    store.finish()
    assert store.squared_norm().item() == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_has_the_gradient_of_torchs_embedding(dtype):
    table, plain = parameter("t", 6, 4), parameter("t", 6, 4).detach().requires_grad_()
    store = GradientStore([table], Mesh.single(), dtype)
    ids, grad = torch.tensor([[1, 5, 1], [0, 1, 2]]), torch.randn(2, 3, 4).to(dtype)
    store.begin(1)
    lookup(ids, table).backward(grad)
    F.embedding(ids, plain).backward(grad.float())
    torch.testing.assert_close(gradient_of(table), plain.grad)


def test_no_gradient_of_the_tables_size_is_made():
    table = parameter("t", 1000, 4)
    store = GradientStore([table], Mesh.single(), torch.bfloat16)
    store.begin(1)
    y = lookup(torch.tensor([1, 2]), table)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                own = result.untyped_storage().data_ptr() == gradient_of(table).untyped_storage().data_ptr()
                assert own or result.numel() < 1000, function
            return result

    with Watch():
        y.backward(torch.ones_like(y))


def test_calls_out_of_order_are_refused():
    store = GradientStore([parameter("w", 2)], Mesh.single(), torch.float32)
    store.begin(1)
    with pytest.raises(AssertionError, match=r"finish\(\) comes first"):
        store.squared_norm()
    store.finish()
    with pytest.raises(AssertionError, match=r"begin\(\) comes first"):
        store.finish()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("store"))


def small_stage(recipe, mesh, *, tied=False):
    settings = load_recipe(recipe, [f"model.tie_word_embeddings={str(tied).lower()}"], mesh.world.size)
    (stage,) = build_stages(settings.model, settings.placement, mesh, sequence_parallel=False, dtype=torch.float32)
    return stage


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_come_in_the_order_of_the_forward_pass(recipe, tied):
    names = [p.shard.name for p in small_stage(recipe, Mesh.single(), tied=tied).sharded_parameters()]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == (["model.layers.4.mlp.down_proj.weight", "model.norm.weight"] if tied else
                          ["model.norm.weight", "lm_head.weight"])  # fmt: skip
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers")]
    assert layers == sorted(layers)


def waits(rank, ranks, recipe):
    """For each block of a forward pass after an update, the buckets that are still being gathered as it starts."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    stage = small_stage(recipe, mesh)
    store = GradientStore(stage.sharded_parameters(), mesh, torch.float32, bucket_elements=1)
    store.wait_as_used(stage.blocks())
    store.gather_parameters()
    pending = []
    for block, parameters, _ in stage.blocks():
        mine = {id(p) for p in parameters}

        def look(*_, mine=mine):
            late = [b for b in store.buckets if b._gathering is not None]
            own = [b for b in late if any(id(place.parameter) in mine for place in b.places)]
            pending.append((len(own), len(late)))

        block.register_forward_pre_hook(look)
    with torch.no_grad():
        stage(torch.zeros(1, 8, dtype=torch.long), 8)
    return pending


def test_a_forward_pass_waits_for_each_blocks_parameters_as_it_comes_to_them(recipe, workers):
    for pending in workers.run(2, waits, recipe):
        own, left = zip(*pending, strict=True)
        assert set(own) == {0}
        assert left[0] > 10 and list(left) == sorted(left, reverse=True) and left[-1] == 0


def test_a_bucket_is_complete_when_all_microbatches_have_added_to_it():
    weight, gain = parameter("w", 3, 4), parameter("gain", 4)
    store = GradientStore([weight, gain], Mesh.single(), torch.float32, bucket_elements=1)
    store.begin(2)
    for microbatch in range(2):
        torch.autograd.backward(gain, torch.ones(4))
        assert [bucket.is_complete for bucket in store.buckets] == [microbatch == 1, False]
    for _ in range(2):
        weight.sink.add_product(torch.ones(5, 3), torch.ones(5, 4))
        weight.sink.finished()
    assert all(bucket.is_complete for bucket in store.buckets)


def resident(rank, ranks, recipe, tied):
    """In a step of two microbatches at stage 3: the names that are there as each block starts, forward and backward;
    and after the step, the elements of parameters and of gradients that have memory."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    stage = small_stage(recipe, mesh, tied=tied)
    for p in stage.sharded_parameters():
        torch.nn.init.normal_(p, std=0.02)
    store = GradientStore(stage.sharded_parameters(), mesh, torch.float32, zero=3, blocks=[stage.blocks()])
    seen = []

    def there():
        assert sum(bucket.is_open for bucket in store.buckets) <= 3
        return {place.parameter.shard.name for b in store.buckets if b.is_resident for place in b.places}

    for block in stage.blocks():
        block.module.register_forward_pre_hook(lambda *_: seen.append(there()))
    store.begin(2)
    tokens = torch.randint(0, 64, (1, 8))
    for _ in range(2):
        loss, *_ = stage.loss(stage(tokens, 8), tokens, torch.ones(()))
        loss.backward()
        seen.append(there())
    store.finish()
    left = sum(b.values.untyped_storage().nbytes() for b in store.buckets), [b.gradients for b in store.buckets]
    return seen, left, [[p.shard.name for p in block.parameters] for block in stage.blocks()]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_at_stage_3_the_parameters_of_two_blocks_are_there_and_none_after_the_step(recipe, workers, tied):
    for seen, (bytes_left, gradients), blocks in workers.run(2, resident, recipe, tied):
        assert bytes_left == 0 and set(gradients) == {None}
        forward = [set(block) for block in blocks]
        following = [*forward[1:], set()]
        expected = [now | soon for now, soon in zip(forward, following, strict=True)]
        assert seen == 2 * [*expected, forward[1]]


def slices_at_stage_3(rank, ranks, recipe):
    """Each bucket's slice of the values, where memory that nobody has written to is filled with NaN."""
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank)
    stage = small_stage(recipe, mesh)
    for p in stage.sharded_parameters():
        torch.nn.init.normal_(p, std=0.02)
    torch.use_deterministic_algorithms(True)
    try:
        store = GradientStore(stage.sharded_parameters(), mesh, torch.float32, zero=3, blocks=[stage.blocks()])
    finally:
        torch.use_deterministic_algorithms(False)
    return [bucket.own_values for bucket in store.buckets]


def test_padding_is_zero_so_that_replicas_of_a_slice_are_equal_in_every_bit(recipe, workers):
    for slices in workers.run(2, slices_at_stage_3, recipe):
        assert slices and all(values.isfinite().all() for values in slices)
