"""Tensor-parallel layers over real processes equal their plain PyTorch counterparts in float64."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from megagap.parallel import cross_entropy
from megagap.parallel.collectives import all_gather
from megagap.parallel.cross_entropy import IGNORED_TARGET, linear_cross_entropy
from megagap.parallel.mesh import Mesh
from megagap.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    WeightGradientQueue,
    linear,
    vocab_logits,
    vocab_shard,
)

BATCH, LENGTH, HIDDEN, INNER = 2, 8, 6, 12


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
    whole = (lambda t: all_gather(t, tp.mesh.tp, 1)) if sequence_parallel else (lambda t: t)

    own_x = part(x).clone().requires_grad_()
    y = row(F.silu(column(tp.enter(own_x))))
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
        loss, losses = linear_cross_entropy(tp.enter(x), head, targets, torch.tensor(0.5), tp.mesh.tp)
    loss.backward()

    table, projection = table.requires_grad_(), projection.requires_grad_()
    expected_x = F.embedding(tokens, table)
    expected = F.cross_entropy(
        (expected_x @ projection.T).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED_TARGET
    )
    (0.5 * expected).backward()

    torch.testing.assert_close(x.detach(), expected_x.detach())
    torch.testing.assert_close(loss.detach(), 0.5 * expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.sum(), expected.detach(), rtol=1e-12, atol=0)
    assert not losses[0, :3].any()
    torch.testing.assert_close(vocab_logits(x.detach(), head), (expected_x @ projection.T).detach()[..., own(head)])
    for parameter, reference in ((embedding.weight, table.grad), (head, projection.grad)):
        start, rows = parameter.shard.offsets[0], parameter.shard.sizes[0]
        torch.testing.assert_close(parameter.grad[:rows], reference[start : start + rows], rtol=1e-12, atol=1e-13)
        assert not parameter.grad[rows:].any(), "padding must get no gradient"


@pytest.mark.parametrize(("ranks", "vocabulary"), [(1, 11), (2, 11), (4, 13), (4, 5)])
def test_vocab_parallel_embedding_and_loss_equal_plain_ones_whatever_the_padding(workers, ranks, vocabulary):
    """4 ranks and 5 entries: 2 rows per rank, so the last rank has only padding."""
    workers.run(ranks, embedding_and_cross_entropy, vocabulary)


def test_deferred_weight_gradients_equal_immediate_ones():
    queue = WeightGradientQueue()
    x = random(2, 3, 4, seed=1).requires_grad_()
    weight = random(5, 4, seed=2).requires_grad_()
    grad = random(2, 3, 5, seed=3)
    arrived = []
    weight.register_post_accumulate_grad_hook(lambda w: arrived.append(w.grad))

    linear(x, weight, None, queue).backward(grad)
    immediate, input_gradient = arrived.pop(), x.grad
    weight.grad = x.grad = None
    with queue.deferring() as jobs:
        linear(x, weight, None, queue).backward(grad)
    assert arrived in ([], [None]) and torch.equal(x.grad, input_gradient)
    arrived.clear()
    for job in jobs:
        job()
    assert torch.equal(arrived.pop(), immediate)
