import importlib
import math

import pytest
import torch

from megagap.ops import attention, compiled

_file = importlib.import_module("megagap.ops.attention")
reference, in_blocks, use_blocked = _file.reference, _file.in_blocks, _file._use_blocked
BLOCK, BLOCKED_FROM, BLOCKED_UP_TO = _file.BLOCK, _file.BLOCKED_FROM, _file.BLOCKED_UP_TO
needs_kernels = pytest.mark.skipif(not compiled.AVAILABLE, reason="needs the compiled kernels")


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("queries", [1, 7])
def test_attention_equals_the_formula_in_float64(heads, queries):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads[0], 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 7, heads[1], 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mixed = attention(q, k, v)
    for head in range(heads[0]):
        shared = head * heads[1] // heads[0]
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / math.sqrt(8)
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)[-queries:]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        torch.testing.assert_close(mixed[:, :, head], weights @ v[:, :, shared])


def results(function, q, k, v, grad):
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    out = function(q, k, v)
    out.backward(grad)
    return out.detach(), q.grad, k.grad, v.grad


@needs_kernels
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 37])
def test_blocks_of_queries_give_values_and_gradients_of_torchs_attention(heads, length):
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, length, heads[0], 8, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, length, heads[1], 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for got, wanted in zip(results(in_blocks, q, k, v, grad), results(reference, q, k, v, grad), strict=True):
        torch.testing.assert_close(got, wanted)


def eager(q, k, v):
    """As transformers computes it without SDPA: scores in the inputs' dtype, softmax in fp32."""
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)


@needs_kernels
def test_in_bf16_blocks_are_as_accurate_as_eager_attention():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 300, n, 32, generator=generator).bfloat16() for n in (4, 2, 2, 4)]
    exact = results(reference, *(x.double() for x in inputs))
    for got, other, true in zip(results(in_blocks, *inputs), results(eager, *inputs), exact, strict=True):
        errors = [float((part.double() - true).square().mean().sqrt()) for part in (got, other)]
        assert errors[0] <= 1.05 * errors[1]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_used_with_a_backward_pass_in_a_range_of_lengths_only(dtype):
    def inputs(length):
        return [torch.randn(1, length, 1, 2).to(dtype).requires_grad_() for _ in range(3)]

    longest = BLOCKED_UP_TO[dtype]
    assert use_blocked(*inputs(BLOCKED_FROM)) and use_blocked(*inputs(longest))
    for length in (BLOCKED_FROM - 1, longest + 1):
        assert not use_blocked(*inputs(length))
    assert not use_blocked(*(part.detach() for part in inputs(BLOCKED_FROM)))
    with torch.no_grad():
        assert not use_blocked(*inputs(BLOCKED_FROM))
    assert torch.equal(attention(*(x := inputs(BLOCKED_FROM))), in_blocks(*x))


def test_without_compiled_kernels_or_with_plain_operations_torchs_attention_is_used(monkeypatch):
    monkeypatch.setattr(compiled, "AVAILABLE", False)
    q, k, v = (torch.randn(1, BLOCKED_FROM, 2, 8).bfloat16().requires_grad_() for _ in range(3))
    assert not use_blocked(q, k, v)
