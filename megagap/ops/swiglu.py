"""SwiGLU's elementwise part (Shazeer 2020)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.ops import compiled


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``, elementwise [..., h], in the dtype of the inputs; compiled, it is rounded once.

    The inputs may be halves of one packed projection; compiled, their gradients are.
    """
    if compiled.supports(gate, up) and gate.shape == up.shape and gate.dim():
        y: Tensor = torch.ops.megagap.swiglu(gate, up)
        return y
    return reference(gate, up)


def reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


# ------------------------------------------------------------------------------- autograd and shapes of the kernels


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.ops.megagap.swiglu_backward(grad, *ctx.saved_tensors).chunk(2, -1)
    return grad_gate, grad_up


def _shapes(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward_shapes(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::swiglu", _shapes)
    torch.library.register_fake("megagap::swiglu_backward", _backward_shapes)
    torch.library.register_autograd("megagap::swiglu", _backward, setup_context=_setup_context)
