"""Parts of a softmax, merged, are the whole; and so are their backward passes."""

import math

import pytest
import torch

from megagap.ops.attention_block import CAUSAL, NONE, PLAIN, ROWS, TORCH_CPU, Mask, Merged, attend, attend_backward


def tensors(queries, keys, heads=(4, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, queries, heads[0], 8, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, keys, heads[1], 8, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, grad


def formula(q, k, v, seen=None):
    """The result, by autograd's rules, with ``seen`` [b, s, t]; no key at all gives 0."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1])
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("bhst,bthd->bshd", weights, v), scores.logsumexp(-1)


def of_autograd(q, k, v, grad, seen=None):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, log_sum = formula(q, k, v, seen)
    out.backward(grad)
    return out.detach(), log_sum.detach(), q.grad, k.grad, v.grad


def of_kernel(kernel, q, k, v, grad, mask):
    out, log_sum = kernel.forward(q, k, v, mask)
    return out, log_sum, *kernel.backward(grad, q, k, v, out, log_sum, mask)


@pytest.mark.parametrize("kernel", [PLAIN, TORCH_CPU], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("queries", "keys", "mask"), [(7, 7, CAUSAL), (ROWS + 9, ROWS + 9, CAUSAL), (5, 12, NONE)])
def test_a_kernel_gives_the_formulas_result_log_sum_exp_and_gradients(kernel, heads, queries, keys, mask):
    q, k, v, grad = tensors(queries, keys, heads)
    seen = torch.ones(1, queries, keys, dtype=torch.bool).tril() if mask.causal else None
    for got, wanted in zip(of_kernel(kernel, q, k, v, grad, mask), of_autograd(q, k, v, grad, seen), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_query_that_sees_no_key_has_a_result_of_0_and_gives_and_gets_no_gradient():
    q, k, v, grad = tensors(4, 6)
    of_queries, of_keys = torch.tensor([[1, 1, 2, 3]] * 2), torch.tensor([[1, 1, 1, 3, 3, 3]] * 2)
    out, log_sum, *grads = of_kernel(PLAIN, q, k, v, grad, Mask(documents=(of_queries, of_keys)))
    assert not out[:, 2].any() and torch.isneginf(log_sum[:, :, 2]).all()
    # Its log-sum-exp over other keys is finite.
    finite = log_sum.nan_to_num(neginf=0.5)
    grads = PLAIN.backward(grad, q, k, v, out, finite, Mask(documents=(of_queries, of_keys)))
    assert not grads[0][:, 2].any()
    others = [x[:, [0, 1, 3]] for x in (q, grad)]
    seen = of_queries[:, [0, 1, 3], None] == of_keys[:, None]
    _, _, grad_q, grad_k, grad_v = of_autograd(others[0], k, v, others[1], seen)
    for got, wanted in zip((grads[0][:, [0, 1, 3]], grads[1], grads[2]), (grad_q, grad_k, grad_v), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_block_of_which_no_query_sees_a_key_changes_nothing_when_it_is_merged():
    q, k, v, grad = tensors(4, 4)
    out, log_sum = attend(q, k, v, CAUSAL)
    merged = Merged(out.clone(), log_sum.clone())
    ones = torch.ones(2, 4, dtype=torch.int64)
    nothing = Mask(documents=(ones, 2 * ones))
    merged.add(*attend(q, k, v, nothing))
    assert torch.equal(merged.out, out) and torch.equal(merged.log_sum, log_sum)
    assert all(not part.any() for part in attend_backward(grad, q, k, v, out, log_sum, nothing))


def test_two_parts_of_the_keys_merged_are_the_whole_forward_and_backward():
    q, k, v, grad = tensors(6, 10)
    out, log_sum, grad_q, grad_k, grad_v = of_autograd(q, k, v, grad)
    merged = Merged(*attend(q, k[:, :3], v[:, :3]))
    merged.add(*attend(q, k[:, 3:], v[:, 3:]))
    torch.testing.assert_close((merged.out, merged.log_sum), (out, log_sum))
    first, second = (
        attend_backward(grad, q, k[:, part], v[:, part], out, log_sum) for part in (slice(0, 3), slice(3, 10))
    )
    torch.testing.assert_close(first[0] + second[0], grad_q)
    torch.testing.assert_close(torch.cat([first[1], second[1]], 1), grad_k)
    torch.testing.assert_close(torch.cat([first[2], second[2]], 1), grad_v)


def test_in_bf16_the_log_sum_exp_is_fp32_and_the_result_as_q():
    q, k, v, _ = tensors(5, 9, dtype=torch.bfloat16)
    for kernel in (PLAIN, TORCH_CPU):
        out, log_sum = kernel.forward(q, k, v, NONE)
        assert (out.dtype, log_sum.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out.double(), formula(*(x.double() for x in (q, k, v)))[0], atol=0.02, rtol=0.02)
