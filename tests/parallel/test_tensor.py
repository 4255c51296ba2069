"""Tensor-parallel layers over real processes equal their plain PyTorch counterparts in float64."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import CellType, CodeType, FunctionType
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagap.config import load_recipe
from megagap.model.llama import build_stages
from megagap.ops import compiled
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.gradient_store import GradientStore
from megagap.parallel import cross_entropy
from megagap.parallel.collectives import Pending, all_gather_async
from megagap.parallel.cross_entropy import IGNORED_TARGET, linear_cross_entropy
from megagap.parallel.embedding import VocabParallelEmbedding, vocab_logits, vocab_shard
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import pack
from megagap.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    column_parallel,
)
from tests.recipes import write_recipe

BATCH, LENGTH, HIDDEN, INNER = 2, 8, 6, 12
VOCABULARY = 10


def mesh(rank: int, ranks: int) -> Mesh:
    return Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, tp=ranks)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(parameter, value: torch.Tensor) -> None:
    shard = parameter.shard
    for dim, (offset, size) in enumerate(zip(shard.offsets, shard.sizes, strict=True)):
        value = value.narrow(dim, offset, size)
    with torch.no_grad():
        parameter[: shard.sizes[0]] = value


def column_then_row(rank: int, ranks: int, sequence_parallel: bool) -> None:
    tp = TensorParallel(mesh(rank, ranks), sequence_parallel, torch.float64)
    column = ColumnParallelLinear("a", HIDDEN, INNER, tp, bias=True)
    row = RowParallelLinear("b", INNER, HIDDEN, tp, bias=True)
    weights = [
        random(INNER, HIDDEN, seed=1),
        random(INNER, seed=2),
        random(HIDDEN, INNER, seed=3),
        random(HIDDEN, seed=4),
    ]
    parameters = [column.weight, column.bias, row.weight, row.bias]
    for parameter, value in zip(parameters, weights, strict=True):
        fill(parameter, value)
    x, grad = random(BATCH, LENGTH, HIDDEN, seed=5), random(BATCH, LENGTH, HIDDEN, seed=6)
    part = (lambda t: t.chunk(ranks, 1)[rank]) if sequence_parallel else (lambda t: t)
    whole = (lambda t: all_gather_async(t, tp.mesh.tp, 1).wait()) if sequence_parallel else (lambda t: t)

    own_x = part(x).clone().requires_grad_()
    y = row(F.silu(column(own_x)))
    y.backward(part(grad))

    references = [value.clone().requires_grad_() for value in weights]
    reference_x = x.clone().requires_grad_()
    expected = F.silu(reference_x @ references[0].T + references[1]) @ references[2].T + references[3]
    expected.backward(grad)

    torch.testing.assert_close(whole(y.detach()), expected.detach())
    torch.testing.assert_close(whole(own_x.grad), reference_x.grad)
    width = INNER // ranks
    mine = slice(rank * width, (rank + 1) * width)
    torch.testing.assert_close(column.weight.grad, references[0].grad[mine])
    torch.testing.assert_close(column.bias.grad, references[1].grad[mine])
    torch.testing.assert_close(row.weight.grad, references[2].grad[:, mine])
    bias_grad = row.bias.grad
    if row.bias.shard.partial_gradient:
        torch.distributed.all_reduce(bias_grad)
    torch.testing.assert_close(bias_grad, references[3].grad)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_column_and_row_parallel_linear_equal_plain_linear(workers, ranks, sequence_parallel):
    workers.run(ranks, column_then_row, sequence_parallel)


def own(parameter) -> slice:
    return slice(parameter.shard.offsets[0], parameter.shard.offsets[0] + parameter.shard.sizes[0])


def embedding_and_cross_entropy(rank: int, ranks: int, vocabulary: int) -> None:
    tp = TensorParallel(mesh(rank, ranks), False, torch.float64)
    embedding = VocabParallelEmbedding(vocab_shard("e", vocabulary, HIDDEN, tp.mesh.tp), tp)
    head = tp.parameter(vocab_shard("h", vocabulary, HIDDEN, tp.mesh.tp))
    table, projection = random(vocabulary, HIDDEN, seed=1), 3 * random(vocabulary, HIDDEN, seed=2)
    fill(embedding.weight, table)
    fill(head, projection)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)
    targets = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=generator)
    targets[0, :3] = IGNORED_TARGET

    x = embedding(tokens)
    # Several chunks, equally many on every rank, although the last ranks have fewer or no real columns.
    with (
        patch.dict(cross_entropy.MIN_CHUNK_TOKENS, cpu=1),
        patch.dict(cross_entropy.WORKSPACE_BYTES, cpu=5 * 8 * head.shape[0]),
    ):
        loss, losses, z_losses = linear_cross_entropy(x, head, targets, torch.tensor(0.5), tp.mesh.tp, z_loss=0.01)
    loss.backward()

    table, projection = table.requires_grad_(), projection.requires_grad_()
    expected_x = F.embedding(tokens, table)
    logits, ids = (expected_x @ projection.T).flatten(0, 1), targets.flatten()
    expected = F.cross_entropy(logits, ids, reduction="sum", ignore_index=IGNORED_TARGET)
    expected_z = 0.01 * logits.logsumexp(-1)[ids != IGNORED_TARGET].square().sum()
    (0.5 * (expected + expected_z)).backward()

    torch.testing.assert_close(x.detach(), expected_x.detach())
    torch.testing.assert_close(loss.detach(), 0.5 * (expected + expected_z).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.sum(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(z_losses.sum(), expected_z.detach(), rtol=1e-12, atol=0)
    assert not losses[0, :3].any() and not z_losses[0, :3].any()
    torch.testing.assert_close(vocab_logits(x.detach(), head), (expected_x @ projection.T).detach()[..., own(head)])
    for parameter, reference in ((embedding.weight, table.grad), (head, projection.grad)):
        start, rows = parameter.shard.offsets[0], parameter.shard.sizes[0]
        torch.testing.assert_close(parameter.grad[:rows], reference[start : start + rows], rtol=1e-12, atol=1e-13)
        assert not parameter.grad[rows:].any(), "padding must get no gradient"


@pytest.mark.parametrize(("ranks", "vocabulary"), [(1, 11), (2, 11), (4, 13), (4, 5)])
def test_vocab_parallel_embedding_and_loss_equal_plain_ones_whatever_the_padding(workers, ranks, vocabulary):
    """4 ranks and 5 entries: 2 rows per rank, so the last rank has only padding."""
    workers.run(ranks, embedding_and_cross_entropy, vocabulary)


def deferred(rank: int, ranks: int, sequence_parallel: bool) -> None:
    tp = TensorParallel(mesh(rank, ranks), sequence_parallel, torch.float64)
    inner = 5 * ranks
    column, row = ColumnParallelLinear("a", HIDDEN, inner, tp), RowParallelLinear("b", inner, HIDDEN, tp)
    fill(column.weight, random(inner, HIDDEN, seed=1))
    fill(row.weight, random(HIDDEN, inner, seed=2))
    length = tp.sequence_part(LENGTH)
    x = random(BATCH, length, HIDDEN, seed=3 + rank * sequence_parallel).requires_grad_()
    grad = random(BATCH, length, HIDDEN, seed=5 + rank * sequence_parallel)

    def gradients() -> list[torch.Tensor | None]:
        return [x.grad, column.weight.grad, row.weight.grad]

    row(F.silu(column(x))).backward(grad)
    immediate = gradients()
    x.grad = column.weight.grad = row.weight.grad = None
    with tp.queue.deferring() as jobs:
        row(F.silu(column(x))).backward(grad)
    assert torch.equal(x.grad, immediate[0]) and gradients()[1:] == [None, None]
    for job in jobs:
        job()
    assert all(map(torch.equal, gradients(), immediate))
    held = [cell.cell_contents for job in jobs for cell in _cells(job)]
    if sequence_parallel:  # a job holds its rank's part of the residual stream or of its gradient, not all of it
        assert not any(isinstance(tensor, torch.Tensor) and tensor.shape == (BATCH, LENGTH, HIDDEN) for tensor in held)


def _cells(function: FunctionType) -> Iterator[CellType]:
    """What a function holds, itself or by the functions that it holds."""
    for cell in function.__closure__ or ():
        yield cell
        if isinstance(cell.cell_contents, FunctionType):
            yield from _cells(cell.cell_contents)


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_deferred_weight_gradients_equal_immediate_ones(workers, ranks, sequence_parallel):
    workers.run(ranks, deferred, sequence_parallel)


# ------------------------------------------------------------------------------- what is kept, and what is copied


def saved_bytes(rank: int, ranks: int, recipe: Path, overrides: list[str]) -> tuple[float, int]:
    """Bytes that a layer saves for its backward pass, and of the largest tensor of the whole stage that is saved.

    Each storage counts once; parameters, of which nothing is saved but a reference, do not.
    """
    settings = load_recipe(recipe, overrides, ranks)
    tensor_parallel = mesh(rank, ranks)
    (stage,) = build_stages(
        settings.model, settings.placement, tensor_parallel, sequence_parallel=True, dtype=torch.float32
    )
    optimizer = DistributedOptimizer(stage.sharded_parameters(), settings.optim, tensor_parallel, torch.float32)
    optimizer.store.begin(1)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    found: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(2, settings.train.sequence_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        embedded = stage.embed_tokens(tokens)
        outside = dict(found)
        layer, update = stage.layers[0](embedded, torch.zeros_like(embedded), *stage.rotary_tables(tokens.shape[1]))
        inside = sum(size for storage, size in found.items() if storage not in outside)
        loss, *_ = stage.loss(stage.norm(layer, update)[0], tokens, torch.ones(()))
    loss.backward()
    del optimizer
    return inside, max(found.values())


@pytest.mark.skipif(not compiled.AVAILABLE, reason="plain torch keeps more than the kernels")
def test_with_sequence_parallelism_two_ranks_save_half_of_what_one_does_and_nothing_of_vocabulary_size(
    workers, tmp_path
):
    """Sequences are short, so that no scores of attention are kept, of which there are half as many in any case."""
    vocabulary, few_tokens = 30_000, 8
    model = dict(hidden_size=256, num_attention_heads=8, num_key_value_heads=4, intermediate_size=704)
    recipe = write_recipe(tmp_path, model=model | dict(vocab_size=vocabulary), train=dict(sequence_length=64))
    (one,) = workers.run(1, saved_bytes, recipe, [])
    two = workers.run(2, saved_bytes, recipe, ["parallel.tp=2"])
    for layer, largest in (one, *two):
        assert layer > 0 and largest < 4 * vocabulary * few_tokens
    for layer, _ in two:
        assert layer < 0.52 * one[0]


class _Copies(TorchDispatchMode):
    """Elements that operations copy without computing, without what gloo itself copies while it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_copy = function._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat")
        if is_copy and not any(code is Pending.wait.__code__ for code in _calling()):
            self.elements += result.numel()
        return result


def _calling() -> Iterator[CodeType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def copied_elements(rank: int, ranks: int, sequence_parallel: bool, hidden: int) -> int:
    tp = TensorParallel(mesh(rank, ranks), sequence_parallel, torch.float64)
    column, row = ColumnParallelLinear("a", hidden, INNER, tp), RowParallelLinear("b", INNER, hidden, tp)
    embedding = VocabParallelEmbedding(vocab_shard("e", VOCABULARY, hidden, tp.mesh.tp), tp)
    head = tp.parameter(vocab_shard("h", VOCABULARY, hidden, tp.mesh.tp))
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    with _Copies() as copies:
        y = row(*column_parallel(embedding(tokens), column))
        loss, *_ = linear_cross_entropy(y, head, tokens, torch.tensor(1.0), tp.mesh.tp, sequence_parallel)
        loss.backward()
    return copies.elements


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_activations_of_several_sequences_are_not_copied_around_collectives(workers, sequence_parallel):
    """The loss in plain torch copies logits and numbers of a token; the smallest activation is larger."""
    for copied in workers.run(2, copied_elements, sequence_parallel, 64):
        assert copied < BATCH * LENGTH // 2 * 64


class _Order(TorchDispatchMode):
    """Matrix products and the starts of collectives, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d::"):
            assert not any(argument is False for argument in args), "it is asynchronous unless told otherwise"
            self.names.append("gather" if "allgather" in name else "scatter" if "scatter" in name else "reduce")
        elif name == "aten::mm":
            self.names.append("product")
        return function(*args, **(kwargs or {}))


def order_of_backward(rank: int, ranks: int, sequence_parallel: bool) -> list[str]:
    tp = TensorParallel(mesh(rank, ranks), sequence_parallel, torch.float64)
    column = ColumnParallelLinear("a", HIDDEN, INNER, tp)
    y = column(random(1, tp.sequence_part(LENGTH), HIDDEN, seed=1).requires_grad_())
    with _Order() as order:
        y.backward(torch.ones_like(y))
    return order.names


def test_collectives_of_a_backward_pass_run_beside_its_products(workers):
    """First the input's gradient, while the input is gathered; then the weight's, while the first is summed."""
    expected = {True: ["gather", "product", "scatter", "product"], False: ["product", "reduce", "product"]}
    for sequence_parallel, names in expected.items():
        assert workers.run(2, order_of_backward, sequence_parallel) == [names, names]


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name in ("aten::mm", "aten::addmm")
        return function(*args, **(kwargs or {}))


def in_a_store(packs: bool, deferring: bool) -> tuple[list[torch.Tensor], int]:
    """Two microbatches through three layers with one input: results and gradients, and how many products it took."""
    tp = TensorParallel(Mesh.single(), False, torch.float64)
    widths = [4, 3, 2]
    layers = [
        ColumnParallelLinear(name, HIDDEN, width, tp, bias=True) for name, width in zip("abc", widths, strict=True)
    ]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    for seed, parameter in enumerate(parameters):
        fill(parameter, random(*parameter.shape, seed=seed))
    if packs:
        pack(*(layer.weight for layer in layers))
    store = GradientStore(parameters, tp.mesh, torch.float64)
    x, grads = random(BATCH, LENGTH, HIDDEN, seed=7), random(BATCH, LENGTH, sum(widths), seed=8).split(widths, -1)
    store.begin(2)
    results = []
    with _Products() as products:
        for _ in range(2):
            x = x.detach().requires_grad_()
            results += column_parallel(x, *layers)
            with tp.queue.deferring() if deferring else nullcontext([]) as jobs:
                torch.autograd.backward(results[-3:], grads)
            with torch.no_grad():
                for job in jobs:
                    job()
            results.append(x.grad)
    store.finish()
    gradients = [parameter.sink.gradient.clone() for parameter in parameters]
    return [*(result.detach() for result in results), *gradients], products.number


@pytest.mark.parametrize("deferring", [False, True])
def test_packed_weights_are_multiplied_as_one_with_the_results_of_several(deferring):
    packed, few = in_a_store(True, deferring)
    apart, many = in_a_store(False, deferring)
    assert (few, many) == (2 * 3, 2 * 9)
    torch.testing.assert_close(packed, apart, rtol=1e-13, atol=1e-13)


def test_gradients_that_are_apart_are_added_to_packed_weights_one_by_one():
    tp = TensorParallel(Mesh.single(), False, torch.float64)
    layers = [ColumnParallelLinear(name, HIDDEN, 4, tp) for name in "ab"]
    weights = [layer.weight for layer in layers]
    pack(*weights)
    store = GradientStore(weights, tp.mesh, torch.float64)
    store.begin(1)
    x, grads = random(LENGTH, HIDDEN, seed=1), [random(LENGTH, 4, seed=seed) for seed in (2, 3)]
    torch.autograd.backward(column_parallel(x, *layers), grads)
    store.finish()
    for weight, grad in zip(weights, grads, strict=True):
        torch.testing.assert_close(weight.sink.gradient, grad.T @ x)
