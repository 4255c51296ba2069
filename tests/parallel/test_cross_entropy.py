"""The output projection and its loss, in chunks of tokens. Over several ranks: tests/parallel/test_tensor.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megagap.parallel import cross_entropy
from megagap.parallel.cross_entropy import IGNORED_TARGET, chunk_tokens, linear_cross_entropy
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import ShardedParameter, whole
from megagap.planning.recording import Memory

BATCH, LENGTH, HIDDEN, VOCABULARY = 2, 150, 8, 500


def case(dtype: torch.dtype, vocabulary: int = VOCABULARY, length: int = LENGTH):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, length, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = ShardedParameter(whole("lm_head.weight", (vocabulary, HIDDEN)), torch.device("cpu"), dtype)
    with torch.no_grad():
        weight.copy_(torch.randn(vocabulary, HIDDEN, generator=generator))
    targets = torch.randint(vocabulary, (BATCH, length), generator=generator)
    targets[0, :3] = IGNORED_TARGET
    return x, weight, targets


def run(x, weight, targets, scale=0.25, z_loss=0.0):
    x, weight.grad = x.detach().requires_grad_(), None
    tp = Mesh.single().tp
    loss, losses, z_losses = linear_cross_entropy(x, weight, targets, torch.tensor(scale), tp, z_loss=z_loss)
    loss.backward()
    return loss.detach(), losses, z_losses, x.grad, weight.grad


def exact(x, weight, targets, scale=0.25, z_loss=0.0):
    x, weight = (part.detach().double().requires_grad_() for part in (x, weight))
    logits = x @ weight.T
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED_TARGET
    ).view(targets.shape)
    z_losses = z_loss * logits.logsumexp(-1).square() * (targets != IGNORED_TARGET)
    loss = scale * (losses + z_losses).sum()
    loss.backward()
    return loss.detach(), losses.detach(), z_losses.detach(), x.grad, weight.grad


@pytest.fixture
def few_tokens(monkeypatch):
    """Several parts, of which the last is smaller."""
    monkeypatch.setitem(cross_entropy.WORKSPACE_BYTES, "cpu", 0)
    assert chunk_tokens(VOCABULARY, 4, "cpu") == 64


@pytest.mark.parametrize(("scale", "z_loss"), [(1.0, 0.0), (0.25, 0.0), (1024.0, 0.0), (0.25, 0.01)])
def test_losses_and_gradients_equal_those_of_float64_whatever_the_scale(few_tokens, scale, z_loss):
    inputs = case(torch.float32)
    for got, wanted in zip(run(*inputs, scale, z_loss), exact(*inputs, scale, z_loss), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * scale)


def test_in_bf16_chunks_lose_no_more_than_the_whole(few_tokens, monkeypatch):
    inputs = case(torch.bfloat16)
    wanted = exact(*inputs)
    in_parts = run(*inputs)
    monkeypatch.setitem(cross_entropy.WORKSPACE_BYTES, "cpu", 2**30)
    at_once = run(*inputs)
    for part, together, true in zip(in_parts, at_once, wanted, strict=True):
        errors = [float((got.double() - true).square().sum()) for got in (part, together)]
        assert errors[0] <= 1.1 * errors[1] + 1e-12


def test_gradients_of_several_micro_batches_add_up(few_tokens):
    x, weight, targets = case(torch.float32)
    together = run(x, weight, targets)[-1]
    weight.grad = None
    for sequence in range(BATCH):
        part = slice(sequence, sequence + 1)
        loss, *_ = linear_cross_entropy(x[part], weight, targets[part], torch.tensor(0.25), Mesh.single().tp)
        loss.backward()
    torch.testing.assert_close(weight.grad, together)


def test_a_loss_that_is_multiplied_afterwards_has_multiplied_gradients(few_tokens):
    x, weight, targets = case(torch.float32)
    *_, grad_x, grad_weight = run(x, weight, targets)
    x, weight.grad = x.detach().requires_grad_(), None
    loss, *_ = linear_cross_entropy(x, weight, targets, torch.tensor(0.25), Mesh.single().tp)
    (3 * loss).backward()
    torch.testing.assert_close(x.grad, 3 * grad_x)
    torch.testing.assert_close(weight.grad, 3 * grad_weight)


def test_without_gradients_none_are_computed(few_tokens):
    x, weight, targets = case(torch.float32)
    with torch.no_grad(), _Largest() as seen:
        loss, losses, _ = linear_cross_entropy(x, weight, targets, torch.tensor(0.25), Mesh.single().tp)
    assert not loss.requires_grad
    torch.testing.assert_close(losses.double(), exact(x, weight, targets)[1], rtol=1e-5, atol=1e-5)
    assert "aten.mm.out" not in seen.operations


@pytest.mark.parametrize(("vocabulary", "length"), [(500, 150), (4000, 150), (500, 1200), (4000, 1200)])
def test_no_temporary_grows_with_tokens_times_vocabulary(monkeypatch, vocabulary, length):
    monkeypatch.setitem(cross_entropy.WORKSPACE_BYTES, "cpu", 64 * 1024)
    x, weight, targets = case(torch.float32, vocabulary, length)
    with _Largest() as seen:
        run(x, weight, targets)
    at_hand = chunk_tokens(vocabulary, 4, "cpu") * vocabulary
    assert at_hand * 4 <= max(64 * 1024, 64 * vocabulary * 4)
    assert seen.largest <= max(at_hand, x.numel(), weight.numel())


def test_the_logits_of_one_chunk_only_are_live(few_tokens):
    inputs = case(torch.float32, vocabulary=8000)
    with _Live() as live:
        run(*inputs)
    logits = chunk_tokens(8000, 4, "cpu") * 8000 * 4
    assert logits <= live.memory.peak < 1.6 * logits


class _Live(TorchDispatchMode):
    """Follows the storages that operations make until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.memory.see(tensor)
        return result


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.operations = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.add(str(function))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result
