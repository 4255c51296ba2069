"""The loss of headless models against the formula, written out for whole sequences in float64."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megagap.parallel import cross_entropy
from megagap.parallel.context import own_tokens
from megagap.parallel.contrastive_loss import contrastive_loss
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.embedding import vocab_shard
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter

BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 150, 8, 60
"""Targets recur in a sequence."""


def case(dtype: torch.dtype, length: int = LENGTH, vocabulary: int = VOCABULARY):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, length, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randn(vocabulary, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocabulary, (BATCH, length), generator=generator)
    targets[0, :3] = targets[1, length // 2] = IGNORED_TARGET
    return x, table, targets


def parameter(table: torch.Tensor, mesh: Mesh) -> ShardedParameter:
    shard = vocab_shard("model.embed_tokens.weight", *table.shape, mesh.tp)
    weight = ShardedParameter(shard, torch.device("cpu"), table.dtype)
    with torch.no_grad():
        weight[: shard.sizes[0]] = table[shard.offsets[0] : shard.offsets[0] + shard.sizes[0]]
    return weight


def run(x, table, targets, scale=0.25):
    mesh = Mesh.single()
    x, weight = x.detach().requires_grad_(), parameter(table, mesh)
    loss, losses = contrastive_loss(x, weight, targets, torch.tensor(scale), mesh.tp, mesh.cp)
    loss.backward()
    return loss.detach(), losses, x.grad, weight.grad


def exact(x, table, targets, scale=0.25):
    x, table = (part.detach().double().requires_grad_() for part in (x, table))
    rows = []
    for h, ids in zip(x, targets, strict=True):
        counted = ids != IGNORED_TARGET
        scores = h @ table[ids.clamp(min=0)].T
        differences = scores - scores.diagonal().unsqueeze(-1)
        with_zero = torch.cat([torch.zeros(len(ids), 1, dtype=torch.float64), differences[:, counted]], 1)
        rows.append(with_zero.logsumexp(-1).where(counted, 0))
    losses = torch.stack(rows)
    loss = scale * losses.sum()
    loss.backward()
    return loss.detach(), losses.detach(), x.grad, table.grad


@pytest.fixture
def few_tokens(monkeypatch):
    """Chunks of 64 tokens, of which the last is smaller."""
    monkeypatch.setitem(cross_entropy.WORKSPACE_BYTES, "cpu", 0)


@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_those_of_the_formula(few_tokens, dtype, scale):
    inputs, rounding = case(dtype), 1e-5 if dtype == torch.float32 else 1e-12
    for got, wanted in zip(run(*inputs, scale), exact(*inputs, scale), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=rounding, atol=rounding * scale)


def test_in_bf16_scores_and_losses_are_as_in_fp32_and_gradients_are_rounded(few_tokens):
    inputs = case(torch.bfloat16)
    (loss, losses, *gradients), (wanted_loss, wanted, *wanted_gradients) = run(*inputs), exact(*inputs)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=0)
    for got, exact_gradient in zip(gradients, wanted_gradients, strict=True):
        assert (got.double() - exact_gradient).norm() < 0.01 * exact_gradient.norm()


def test_an_output_of_zeros_has_the_log_of_one_more_than_the_sequences_targets(few_tokens):
    x, table, targets = case(torch.float32)
    _, losses, *_ = run(torch.zeros_like(x), table, targets)
    for found, ids in zip(losses, targets, strict=True):
        counted = ids != IGNORED_TARGET
        assert found[counted] == pytest.approx(math.log(int(counted.sum()) + 1), rel=1e-6)
        assert not found[~counted].any()


def test_a_sequence_without_targets_has_no_loss_and_no_gradient(few_tokens):
    x, table, targets = case(torch.float32)
    targets[0] = IGNORED_TARGET
    got, alone = run(x, table, targets), run(x[1:], table, targets[1:])
    torch.testing.assert_close(got[0], alone[0])
    torch.testing.assert_close(got[3], alone[3])
    assert not got[1][0].any() and not got[2][0].any()


def test_another_factor_than_1_reaches_the_gradients():
    x, table, targets = case(torch.float32)
    *_, grad_x, grad_table = run(x, table, targets)
    mesh = Mesh.single()
    x, weight = x.requires_grad_(), parameter(table, mesh)
    loss, _ = contrastive_loss(x, weight, targets, torch.tensor(0.25), mesh.tp, mesh.cp)
    (3 * loss).backward()
    torch.testing.assert_close(x.grad, 3 * grad_x)
    torch.testing.assert_close(weight.grad, 3 * grad_table)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("length", [300, 1200])
def test_no_temporary_has_a_score_for_each_pair_of_tokens(few_tokens, length):
    inputs = case(torch.float32, length)
    with _Largest() as seen:
        run(*inputs)
    assert seen.elements <= max(64 * (length + 8), BATCH * length * HIDDEN)


def own_part(rank: int, ranks: int, cp: int, sequence_parallel: bool, vocabulary: int, length: int) -> None:
    mesh = Mesh.create(device=torch.device("cpu"), world_size=ranks, rank=rank, tp=ranks // cp, cp=cp)
    x, table, targets = case(torch.float64, length, vocabulary)
    wanted_loss, wanted, wanted_x, wanted_table = exact(x, table, targets)
    weight = parameter(table, mesh)

    def own(values: torch.Tensor, over_tp: bool = False) -> torch.Tensor:
        """This rank's tokens of [b, s, …]."""
        part = own_tokens(values.movedim(1, -1), mesh.cp).movedim(-1, 1)
        return (part.chunk(mesh.tp.size, 1)[mesh.tp.rank] if over_tp and sequence_parallel else part).contiguous()

    own_x = own(x, over_tp=True).requires_grad_()
    loss, losses = contrastive_loss(
        own_x, weight, own(targets), torch.tensor(0.25), mesh.tp, mesh.cp, sequence_parallel
    )
    loss.backward()
    sums = torch.cat([loss.detach().view(1), weight.grad.flatten()])
    if mesh.cp.group is not None:
        torch.distributed.all_reduce(sums, group=mesh.cp.group)
    torch.testing.assert_close(sums[0], wanted_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses, own(wanted), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_x.grad, own(wanted_x, over_tp=True), rtol=1e-12, atol=1e-13)
    rows, first, size = sums[1:].view_as(weight), weight.shard.offsets[0], weight.shard.sizes[0]
    torch.testing.assert_close(rows[:size], wanted_table[first : first + size], rtol=1e-12, atol=1e-13)
    assert not rows[size:].any(), "padding must get no gradient"


@pytest.mark.parametrize(
    ("ranks", "cp", "sequence_parallel", "vocabulary", "length"),
    [
        (2, 1, True, 11, 8),
        (2, 1, False, 11, 9),  # a part of a sequence that is longer than the other
        (4, 1, True, 5, 8),  # 2 rows per rank, so the last rank has only padding
        (2, 2, False, 11, 8),
        (4, 2, True, 11, 8),
        (4, 2, False, 11, 12),
    ],
)
def test_ranks_have_their_parts_of_what_one_process_has(workers, ranks, cp, sequence_parallel, vocabulary, length):
    workers.run(ranks, own_part, cp, sequence_parallel, vocabulary, length)


def test_without_gradients_none_are_computed():
    x, table, targets = case(torch.float64)
    mesh = Mesh.single()
    with torch.no_grad():
        loss, losses = contrastive_loss(x, parameter(table, mesh), targets, torch.tensor(0.25), mesh.tp, mesh.cp)
    assert not loss.requires_grad
    torch.testing.assert_close(losses, exact(x, table, targets)[1], rtol=1e-12, atol=1e-12)
