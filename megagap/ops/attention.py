"""Scaled dot-product attention with grouped keys and values: one explicit choice of kernel per device, dtype and size.

On a GPU the choice follows measurement (docs/performance.md): on Hopper cuDNN is 1.5 times as fast as flash-attn 2, and
only flash-attn 3 matches it. On CPU, torch's kernel has a slow backward pass; for short sequences, a few matrix
products over blocks of queries are faster there. They keep the probabilities, whose memory grows with the square of
the sequence length. ``python -m megagap.ops`` prints what is chosen, also for runs that must repeat bit for bit
(``train.deterministic``): cuDNN's backward pass cannot, those of flash-attn and torch's own kernels can.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagap.ops import compiled
from megagap.ops.arithmetic import is_deterministic
from megagap.ops.optional import gpu_library

BLOCKED_FROM = 128
BLOCKED_UP_TO = {torch.bfloat16: 1024, torch.float32: 512}
"""Shortest and longest sequences that are computed in blocks on CPU, by measurement (docs/performance.md)."""

BLOCK = 128
"""Queries per block: above the diagonal, only the part within a block is computed."""

HALF_PRECISION = (torch.float16, torch.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, *, keep_scores: bool = True) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, causal; q: [b, s, h, d], k, v: [b, t, hk, d] with hk dividing h. Result as q.

    s is t, a whole sequence, or 1, its last token, which sees all others.

    ``keep_scores``: whether blocks of queries keep their probabilities for the backward pass, or compute them again.
    """
    assert q.shape[1] in (1, k.shape[1]), (q.shape, k.shape)
    kernel = KERNELS[choose(q, k, v)[0]]
    return in_blocks(q, k, v, keep_scores=keep_scores) if kernel is in_blocks else kernel(q, k, v)


def choose(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
    """The kernel for these tensors, a key of :data:`KERNELS`, and why."""
    if q.is_cuda:
        # Library kernels need head sizes that are a multiple of 8, up to 256.
        supports_heads = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        if is_hopper(q.device) and supports_heads and flash_library("flash_attn_interface", q, k, v):
            return "flash-attn 3", "it is installed, and fastest on Hopper"
        if q.dtype in HALF_PRECISION and is_hopper(q.device) and not is_deterministic():
            return "torch, cuDNN first", "faster than flash-attn 2 on Hopper"
        if supports_heads and flash_library("flash_attn", q, k, v):
            return "flash-attn 2", "it is installed"
        if q.dtype not in HALF_PRECISION and q.shape[2] != k.shape[2]:
            return "torch, keys repeated", f"no kernel supports {q.dtype} and grouped keys without storing all scores"
        if is_deterministic():
            return "torch", "its flash and memory-efficient kernels repeat bit for bit, cuDNN's does not"
        return "torch", "no library supports these tensors"
    if _use_blocked(q, k, v):
        return "blocks of queries", f"training on CPU, up to {BLOCKED_UP_TO[q.dtype]} tokens"
    return "torch", "forward only, or a sequence length at which it is as fast"


def keeps_inputs(q: Tensor, k: Tensor, v: Tensor, *, keep_scores: bool = True) -> bool:
    """Whether :func:`attention` keeps q, k and v themselves for its backward pass, and not others made of them: then
    they may be parts of one tensor, which lives as long as any of them."""
    name, _ = choose(q, k, v)
    return name != "torch, keys repeated" and not (name == "blocks of queries" and keep_scores)


def flash_library(name: str, *tensors: Tensor) -> ModuleType | None:
    """A library of flash-attn for these tensors, if its backward pass can repeat bit for bit where that is required."""
    library = gpu_library(name, *tensors)
    if library is None or (is_deterministic() and not _deterministic(library.flash_attn_func)):
        return None
    return library


def _deterministic(function: Callable[..., Any]) -> dict[str, Any]:
    """The argument with which a function of flash-attn repeats bit for bit, where it is required and there is one."""
    has_it = is_deterministic() and "deterministic" in inspect.signature(function).parameters
    return {"deterministic": True} if has_it else {}


def call_flash(function: Callable[..., Any], *arguments: Any, **options: Any) -> Tensor:
    """The result of a function of flash-attn; early releases of flash-attn 3 also return the log-sum-exp."""
    mixed = function(*arguments, **options, **_deterministic(function))
    result: Tensor = mixed[0] if isinstance(mixed, tuple) else mixed
    return result


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of compute capability 9.x."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=_is_causal(q, k),
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)


def repeat_keys(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q: themselves where they have."""
    if k.shape[2] == q.shape[2]:
        return k, v
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    return k, v


def in_blocks(q: Tensor, k: Tensor, v: Tensor, *, keep_scores: bool = True) -> Tensor:
    """The causal :func:`reference` of whole sequences as matrix products over blocks of queries."""
    mixed: Tensor = _Blocked.apply(q, k, v, keep_scores)
    return mixed


def _is_causal(q: Tensor, k: Tensor) -> bool:
    """True for a whole sequence; a single last token attends to all."""
    return q.shape[1] == k.shape[1]


def _cudnn_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Releases of torch differ in their own order; if cuDNN does not support the tensors, the next backend is used."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel([*backends, SDPBackend.MATH], set_priority=True):
        return reference(q, k, v)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference(q, *repeat_keys(q, k, v))


def _flash_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash = flash_library("flash_attn", q, k, v)
    assert flash is not None
    return call_flash(flash.flash_attn_func, q, k, v, causal=_is_causal(q, k))


def _flash_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flash = flash_library("flash_attn_interface", q, k, v)
    assert flash is not None
    return call_flash(flash.flash_attn_func, q, k, v, causal=_is_causal(q, k))


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash-attn 3": _flash_3,
    "flash-attn 2": _flash_2,
    "torch, cuDNN first": _cudnn_first,
    "torch, keys repeated": _repeated,
    "torch": reference,
    "blocks of queries": in_blocks,
}


def _use_blocked(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Only with a backward pass: for forward only, torch's kernel is as fast and keeps nothing."""
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    on_cpu = compiled.AVAILABLE and q.device.type == "cpu"
    whole = _is_causal(q, k) and BLOCKED_FROM <= q.shape[1] <= BLOCKED_UP_TO.get(q.dtype, 0)
    return on_cpu and trained and whole


class _Blocked(torch.autograd.Function):
    """Layouts: B batch, K key heads, R queries of a block times those of a group, T keys up to the block's end, D."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep_scores: bool) -> Tensor:
        length, heads = q.shape[1:3]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)  # [b, hk, t, d]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        saved = []
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            rows_BKRD, weights_BKRT = _block_weights(q, keys, start, end)
            out[:, start:end] = _from_rows(weights_BKRT @ values[:, :, :end], heads)
            if keep_scores:
                saved += [rows_BKRD, weights_BKRT]
        ctx.keeps_scores = keep_scores
        ctx.save_for_backward(k, v, *(saved if keep_scores else [q]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        k, v, *saved = ctx.saved_tensors
        length, heads, size = grad.shape[1:]
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        grad_q = torch.empty_like(grad, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(values)

        def add_block(i: int, start: int) -> None:  # its tensors are freed before those of the next block are made
            end = min(start + BLOCK, length)
            if ctx.keeps_scores:
                rows_BKRD, weights_BKRT = saved[2 * i : 2 * i + 2]
            else:
                rows_BKRD, weights_BKRT = _block_weights(saved[0], keys, start, end)
            above_BKRD = _rows(grad[:, start:end], k.shape[2])
            grad_v[:, :, :end] += weights_BKRT.transpose(2, 3) @ above_BKRD
            grad_weights = above_BKRD @ values[:, :, :end].transpose(2, 3)
            grad_scores = torch._softmax_backward_data(grad_weights, weights_BKRT, -1, weights_BKRT.dtype)
            grad_k[:, :, :end] += grad_scores.transpose(2, 3) @ rows_BKRD
            grad_q[:, start:end] = _from_rows((grad_scores @ keys[:, :, :end]) * size**-0.5, heads)

        for i, start in enumerate(range(0, length, BLOCK)):
            add_block(i, start)
        return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2), None


def _block_weights(q: Tensor, keys: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Of the queries [start, end) of q [b, s, h, d], scaled: their rows, and their probabilities over keys
    [b, hk, t, d] up to the end."""
    heads, size = q.shape[2:]
    rows_BKRD = _rows(q[:, start:end], keys.shape[1]) * size**-0.5
    scores_BKRT = rows_BKRD @ keys[:, :, :end].transpose(2, 3)
    future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
    scores_BKRT.unflatten(2, (heads // keys.shape[1], -1))[..., start:].masked_fill_(future, float("-inf"))
    return rows_BKRD, scores_BKRT.softmax(-1)


def _rows(x: Tensor, groups: int) -> Tensor:
    """[b, s, h, d] -> [b, hk, h / hk · s, d]: the heads that share keys, one after the other."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _from_rows(x: Tensor, heads: int) -> Tensor:
    """The inverse of :func:`_rows`."""
    return x.unflatten(2, (heads // x.shape[1], -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
