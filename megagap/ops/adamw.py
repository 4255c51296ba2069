"""AdamW's update of a flat buffer (Loshchilov & Hutter 2019, algorithm 2) in one pass over memory."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megagap.ops import compiled


def adamw_(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    divisor: Tensor,
    reject: Tensor,
    updates: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    """One update in place, with ``grad / divisor``; all flat, contiguous and of one size.

    parameter: fp32, or bf16 without another master, then rounded to the nearest, or with ``seed`` stochastically
    (Gupta et al. 2015, section 3.1). Moments: fp32. ``divisor``, ``reject`` and ``updates`` (their number, this one
    included) are fp32 device scalars; where ``reject`` is 1 nothing changes, without a host sync on GPU. ``rounded``:
    bf16, set to the updated fp32 parameter in the same pass.
    """
    if compiled.supports(parameter) and parameter.dtype != torch.float16:
        updates += 1 - reject
        torch.ops.megagap.adamw_(
            parameter, exp_avg, exp_avg_sq, grad, divisor, reject, updates, lr, *betas, eps, weight_decay, seed, rounded
        )
        return
    assert seed is None, "stochastic rounding needs the compiled kernel"
    adamw(
        [parameter],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [updates],
        fused=True,
        grad_scale=divisor,
        found_inf=reject,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    if rounded is not None:
        rounded.copy_(parameter)


def _no_shapes(
    parameter: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    seed: int | None,
    rounded: Tensor | None = None,
) -> None:
    return None


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::adamw_", _no_shapes)
