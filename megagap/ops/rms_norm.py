"""RMSNorm (Zhang & Sennrich 2019) as in ``transformers``' LlamaRMSNorm, alone or after a residual addition."""

from typing import Any

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.optional import gpu_library
from megagap.ops.wide import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, gain_scale: float = 1.0) -> Tensor:
    """``gain · x / sqrt(mean(x²) + eps)`` over the last dimension, gain = gain_scale · weight; [..., h], weight [h].

    Normalised in fp32 and rounded to x's dtype before the product with the gain, which is rounded to it, too. On CPU
    the result is that of ``transformers`` bit for bit. The gradient of the weight does not depend on the number of
    threads. With ``gain_scale`` 20 and weights about 1 / 20, gains in bf16 move at an eighth of the usual updates.
    """
    if compiled.supports(x, weight) and weight.shape == x.shape[-1:]:
        y: Tensor = torch.ops.megagap.rms_norm(x, weight, eps, gain_scale)[0]
        return y
    # Apex's functions cannot be traced; torch.compile fuses the plain form.
    if not torch.compiler.is_compiling() and (apex := gpu_library("apex.normalization.fused_layer_norm", x, weight)):
        gain = weight if gain_scale == 1 else weight * gain_scale
        y = apex.fused_rms_norm_affine(x, gain, gain.shape, eps)  # rounds once, after the product
        return y
    return reference(x, weight, eps, gain_scale)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5, gain_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` of ``x + residual``, which is rounded to their dtype; both are returned, the norm first."""
    if compiled.supports(x, residual, weight) and weight.shape == x.shape[-1:] and x.shape == residual.shape:
        y, total, _ = torch.ops.megagap.add_rms_norm(x, residual, weight, eps, gain_scale)
        return y, total
    total = x + residual
    return rms_norm(total, weight, eps, gain_scale), total


def reference(x: Tensor, weight: Tensor, eps: float = 1e-5, gain_scale: float = 1.0) -> Tensor:
    values = wide(x)
    normalised = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    gain = weight if gain_scale == 1 else (wide(weight) * gain_scale).to(weight.dtype)
    return gain * normalised.to(x.dtype)


# ------------------------------------------------------------------------------- autograd and shapes of the kernels


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.gain_scale = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # of rstd it would be a tensor of zeros in each call
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.megagap.rms_norm_backward(grad, x, weight, rstd, ctx.gain_scale)
    return grad_x, grad_weight, None, None


def _setup_context_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, weight, _, ctx.gain_scale = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, rstd)


def _backward_add(
    ctx: Any, grad: Tensor | None, grad_total: Tensor | None, _: None
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    total, weight, rstd = ctx.saved_tensors
    grad, grad_total = (torch.zeros_like(total) if one is None else one for one in (grad, grad_total))
    grad_x, grad_weight = torch.ops.megagap.add_rms_norm_backward(grad, grad_total, total, weight, rstd, ctx.gain_scale)
    return grad_x, grad_x, grad_weight, None, None


def _rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _shapes(x: Tensor, weight: Tensor, eps: float, gain_scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _rstd(x)


def _shapes_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gain_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _rstd(x)


def _backward_shapes(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, gain_scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _backward_shapes_add(
    grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, gain_scale: float
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::rms_norm", _shapes)
    torch.library.register_fake("megagap::rms_norm_backward", _backward_shapes)
    torch.library.register_autograd("megagap::rms_norm", _backward, setup_context=_setup_context)
    torch.library.register_fake("megagap::add_rms_norm", _shapes_add)
    torch.library.register_fake("megagap::add_rms_norm_backward", _backward_shapes_add)
    torch.library.register_autograd("megagap::add_rms_norm", _backward_add, setup_context=_setup_context_add)
