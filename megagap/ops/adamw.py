"""AdamW's update of a flat buffer (Loshchilov & Hutter 2019, algorithm 2) in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.random_bits import MOMENTS, PARAMETER, Segment, round_stochastically_
from megagap.ops.remainder import join, split_
from megagap.ops.wide import wide


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
    stochastic: Sequence[Segment] | None = None,
    remainder: Tensor | None = None,
) -> None:
    """One update in place, with ``grad / divisor``; all flat, contiguous and of one size.

    parameter: fp32; or bf16 with the ``remainder``, int16, of an fp32 master (``remainder.py``); or bf16 without.
    Moments: both fp32, or both bf16. grad: fp32 or bf16. What is bf16, but for a parameter with a remainder, is rounded
    to the nearest or, in the segments of ``stochastic``, up or down at random (Gupta et al. 2015, section 3.1). What is
    in none of them is padding, and stays as it is. ``divisor``, ``reject`` and ``updates`` (their number, this
    one included) are fp32 device scalars; where ``reject`` is 1 nothing changes, without a host sync on GPU.
    """
    if compiled.supports(parameter) and parameter.dtype != torch.float16:
        numbers = (divisor, reject, updates, lr, *betas, eps, weight_decay)
        if stochastic is None:
            torch.ops.megagap.adamw_(parameter, exp_avg, exp_avg_sq, grad, *numbers, None, remainder)
            return
        for segment in stochastic:
            part = slice(segment.begin, segment.end)
            state = (x[part] for x in (parameter, exp_avg, exp_avg_sq, grad))
            rest = None if remainder is None else remainder[part]
            torch.ops.megagap.adamw_(*state, *numbers, segment.place, rest)
        return
    master, average, square, grad = (wide(x) for x in (join(parameter, remainder), exp_avg, exp_avg_sq, grad))
    torch._fused_adamw_(
        [master],
        [grad],
        [average],
        [square],
        [],
        [updates],
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
    is_rounded = remainder is None and parameter is not master
    if remainder is not None or (is_rounded and stochastic is None):
        split_(master, parameter, remainder)
    if stochastic is None and exp_avg is not average:
        exp_avg.copy_(average)
        exp_avg_sq.copy_(square)
    for segment in stochastic or ():
        part = slice(segment.begin, segment.end)
        if is_rounded:
            round_stochastically_(master[part], segment.random_bits(updates, PARAMETER), parameter[part])
        if exp_avg is not average:
            random = segment.random_bits(updates, MOMENTS)
            round_stochastically_(average[part], random & 0xFFFF, exp_avg[part])
            round_stochastically_(square[part], random >> 16, exp_avg_sq[part])


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
    rounding: Sequence[int] | None,
    remainder: Tensor | None = None,
) -> None:
    return None


if compiled.AVAILABLE:
    torch.library.register_fake("megagap::adamw_", _no_shapes)
