"""RMSNorm (Zhang & Sennrich 2019), as ``transformers``' LlamaRMSNorm computes it."""

from typing import Any

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.optional import gpu_library


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """``weight · x / sqrt(mean(x²) + eps)`` over the last dimension, [..., h] with weight [h].

    Normalised in fp32 and rounded to x's dtype before the product with the weight. The gradient of the weight does
    not depend on the number of threads.
    """
    if compiled.AVAILABLE and _fits(x, weight):
        y: Tensor = torch.ops.megagap.rms_norm(x, weight, eps)[0]
        return y
    if (apex := gpu_library("apex.normalization.fused_layer_norm", x, weight)) is not None:
        y = apex.fused_rms_norm_affine(x, weight, weight.shape, eps)  # rounds once, after the product
        return y
    return reference(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() >= 1
        and weight.shape == x.shape[-1:]
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.megagap.rms_norm_backward(grad, x, weight, rstd)
    return grad_x, grad_weight, None


def _shapes(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward_shapes(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::rms_norm", _shapes)
    torch.library.register_fake("megagap::rms_norm_backward", _backward_shapes)
    torch.library.register_autograd("megagap::rms_norm", _backward, setup_context=_setup_context)
