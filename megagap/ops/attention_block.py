"""Attention of some queries to some keys, as a part of a larger softmax: result, log-sum-exp and backward pass.

Parts over different keys are merged by their log-sum-exp (Milakov and Gimelshein 2018; Dao et al. 2022, section 3.1).
The backward pass of a part needs the result and the log-sum-exp of the whole softmax only: the weights are then those
of the whole.

Layouts: q, out and their gradients [b, s, h, d]; k, v [b, t, hk, d] with hk dividing h; log-sum-exp [b, h, s], in fp32
or, of float64, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagap.ops.arithmetic import is_deterministic
from megagap.ops.attention import HALF_PRECISION, flash_library, is_hopper, repeat_keys
from megagap.ops.optional import gpu_library
from megagap.ops.wide import wide

ROWS = 128
"""Queries whose scores the plain kernel computes at a time."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees."""

    causal: bool = False
    """Query i sees keys up to i only; there are as many keys as queries."""
    documents: tuple[Tensor, Tensor] | None = None
    """Numbers of the documents that queries and keys belong to, int64 [b, s] and [b, t]: it sees keys of its own."""


NONE = Mask()
CAUSAL = Mask(causal=True)


@dataclass(frozen=True)
class Kernel:
    """One implementation."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Mask], tuple[Tensor, Tensor]]
    """q, k, v, mask -> out in the dtype of q, log-sum-exp."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Mask], tuple[Tensor, Tensor, Tensor]]
    """Gradient of the result, q, k, v, the whole softmax's result and log-sum-exp, mask -> gradients of q, k, v."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask = NONE) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ / sqrt(d)) v over these keys, and its log-sum-exp. Where a query sees no key, 0 and -inf."""
    return choose(q, k, v, mask).forward(q, k, v, mask)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask = NONE
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradient of q, and the gradients of k and v from these queries.

    ``out`` and ``log_sum``: of the whole softmax, of which these keys are a part.
    """
    return choose(q, k, v, mask).backward(grad, q, k, v, out, log_sum, mask)


def choose(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Kernel:
    """The kernel for these tensors."""
    if mask.documents is not None:
        return PLAIN
    if not q.is_cuda:
        return TORCH_CPU
    if q.dtype in HALF_PRECISION and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        if is_hopper(q.device) and not is_deterministic():
            return TORCH_CUDNN
        if flash_library("flash_attn", q, k, v) and _flash_functions() is not None:
            return FLASH_2
        return TORCH_FLASH
    return PLAIN if q.dtype == torch.float64 else TORCH_EFFICIENT


class Merged:
    """The softmax over all keys seen so far, by its parts."""

    def __init__(self, out: Tensor, log_sum: Tensor) -> None:
        """The first part, of all queries."""
        self.out, self.log_sum = out.to(log_sum.dtype), log_sum

    def add(self, out: Tensor, log_sum: Tensor, start: int = 0) -> None:
        """A part of the queries from ``start`` on, each of which has seen a key before."""
        before = self.log_sum[:, :, start:]
        after = torch.logaddexp(before, log_sum)
        rows = self.out[:, start:]
        rows.mul_(_by_query(before - after)).add_(out * _by_query(log_sum - after))
        if start:
            self.log_sum[:, :, start:] = after
        else:
            self.log_sum = after


def _by_query(difference: Tensor) -> Tensor:
    """Factors [b, s, h, 1] from differences of logarithms [b, h, s]."""
    return difference.exp().transpose(1, 2).unsqueeze(-1)


# -------------------------------------------------------------------------------- plain: any device and dtype


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    keys, values = _grouped_keys(k), _grouped_keys(v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    log_sum = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=keys.dtype, device=q.device)
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[1]))
        scores = _scores(_grouped(q[:, rows], k.shape[2]), keys, rows, mask)
        sums = scores.logsumexp(-1)
        out[:, rows] = _ungrouped(_weights(scores, sums) @ values).to(q.dtype)
        log_sum[:, :, rows] = sums.flatten(1, 2)
    return out, log_sum


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values, scale = _grouped_keys(k), _grouped_keys(v), q.shape[-1] ** -0.5
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[1]))
        queries, above, result = (_grouped(x[:, rows], k.shape[2]) for x in (q, grad, out))
        sums = log_sum[:, :, rows].unflatten(1, queries.shape[1:3])
        weights = _weights(_scores(queries, keys, rows, mask), sums)
        grad_values += (weights.mT @ above).sum(2, keepdim=True)
        grad_scores = weights * (above @ values.mT - (above * result).sum(-1, keepdim=True)) * scale
        grad_q[:, rows] = _ungrouped(grad_scores @ keys).to(q.dtype)
        grad_keys += (grad_scores.mT @ queries).sum(2, keepdim=True)
    grad_k, grad_v = (x.squeeze(2).transpose(1, 2).to(k.dtype) for x in (grad_keys, grad_values))
    return grad_q, grad_k, grad_v


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Of queries [b, s, h, d]: [b, hk, h / hk, s, d], at least in fp32."""
    return wide(x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4))


def _ungrouped(x: Tensor) -> Tensor:
    """The inverse of :func:`_grouped`, but for the dtype."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _grouped_keys(x: Tensor) -> Tensor:
    """Of keys or values [b, t, hk, d]: [b, hk, 1, t, d], at least in fp32."""
    return wide(x.transpose(1, 2).unsqueeze(2))


def _scores(queries: Tensor, keys: Tensor, rows: slice, mask: Mask) -> Tensor:
    """Of some rows of the queries: [b, hk, h / hk, rows, t], with -inf where a key is not seen."""
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.mT
    if mask.causal:
        places = torch.arange(keys.shape[-2], device=keys.device)
        scores.masked_fill_(places > places[rows, None], float("-inf"))
    if mask.documents is not None:
        of_queries, of_keys = mask.documents
        other = of_queries[:, rows, None] != of_keys[:, None]
        scores.masked_fill_(other[:, None, None], float("-inf"))
    return scores


def _weights(scores: Tensor, sums: Tensor) -> Tensor:
    """0, not NaN, where no key is seen."""
    return (scores - sums.masked_fill(sums == float("-inf"), 0).unsqueeze(-1)).exp_()


PLAIN = Kernel("plain", _plain, _plain_backward)


# -------------------------------------------------------------------------------- torch's own kernels


def _torch_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = operation(*_heads_first(q, k, v), is_causal=mask.causal)
    return out.transpose(1, 2), log_sum


def _torch_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = operation(*_heads_first(grad, q, k, v, out), log_sum, 0.0, mask.causal)
    return _heads_last(grads)


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_flash_attention
    out, log_sum, *_ = operation(*_heads_first(q, *repeat_keys(q, k, v)), 0.0, mask.causal, False)
    return out.transpose(1, 2), log_sum[:, :, : q.shape[1]]


def _torch_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_flash_attention_backward
    tensors = _heads_first(grad, q, *repeat_keys(q, k, v), out)
    # Nothing is dropped: the state of the random generator is not read, nor are the borders of ragged sequences.
    nothing = torch.empty(0, dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[1], k.shape[1])
    grads = operation(*tensors, log_sum.contiguous(), *lengths, 0.0, mask.causal, nothing, nothing)
    return _summed_over_groups(k, _heads_last(grads))


def _torch_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, log_sum, *_ = operation(*_heads_first(q, *repeat_keys(q, k, v)), None, True, 0.0, mask.causal, False)
    return out.transpose(1, 2), log_sum.squeeze(-1)


def _torch_cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    tensors = _heads_first(grad, q, *repeat_keys(q, k, v), out)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    lengths = (None, None, q.shape[1], k.shape[1])
    sums = log_sum.contiguous().unsqueeze(-1)
    grads = operation(*tensors, sums, nothing, nothing, None, *lengths, 0.0, mask.causal)
    return _summed_over_groups(k, _heads_last(grads))


def _torch_efficient(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    out, log_sum, *_ = operation(*_heads_first(q, *repeat_keys(q, k, v)), None, True, 0.0, mask.causal)
    return out.transpose(1, 2), log_sum[:, :, : q.shape[1]]  # it is padded to a multiple of 32


def _torch_efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    operation = torch.ops.aten._scaled_dot_product_efficient_attention_backward
    grad, q_, k_, v_, out = _heads_first(grad, q, *repeat_keys(q, k, v), out)
    nothing = torch.zeros((), dtype=torch.int64, device=q.device)
    padded = torch.nn.functional.pad(log_sum, (0, -log_sum.shape[-1] % 32), value=float("inf"))
    wanted = [True, True, True, False]
    grads = operation(grad, q_, k_, v_, None, out, padded, nothing, nothing, 0.0, wanted, mask.causal)
    return _summed_over_groups(k, _heads_last(grads[:3]))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _heads_last(grads: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
    return grad_q, grad_k, grad_v


def _summed_over_groups(k: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """With the gradients of the heads that share keys and values added up."""
    grad_q, *others = grads
    grad_k, grad_v = (x.unflatten(2, (k.shape[2], -1)).sum(3) if x.shape[2] != k.shape[2] else x for x in others)
    return grad_q, grad_k, grad_v


TORCH_CPU = Kernel("torch, CPU", _torch_cpu, _torch_cpu_backward)
TORCH_FLASH = Kernel("torch, flash", _torch_flash, _torch_flash_backward)
TORCH_CUDNN = Kernel("torch, cuDNN", _torch_cudnn, _torch_cudnn_backward)
TORCH_EFFICIENT = Kernel("torch, memory-efficient", _torch_efficient, _torch_efficient_backward)


# -------------------------------------------------------------------------------- flash-attn 2


def _flash_functions() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Of the installed flash-attn 2, which wraps its kernels in two functions from release 2.6 on."""
    library = gpu_library("flash_attn.flash_attn_interface")
    names = ("_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward")
    found = [getattr(library, name, None) for name in names]
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _flash_2(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    functions = _flash_functions()
    assert functions is not None
    options = dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False)
    out, log_sum, *_ = functions[0](q, k, v, 0.0, q.shape[-1] ** -0.5, mask.causal, **options)
    return out, log_sum


def _flash_2_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    functions = _flash_functions()
    assert functions is not None
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    options = dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
    functions[1](
        *(x.contiguous() for x in (grad, q, k, v, out, log_sum)),
        *grads,
        0.0,
        q.shape[-1] ** -0.5,
        mask.causal,
        **options,
        deterministic=is_deterministic(),
    )
    return grads


FLASH_2 = Kernel("flash-attn 2", _flash_2, _flash_2_backward)
