"""AdamW's update of a flat buffer (Loshchilov & Hutter 2019, algorithm 2) in one pass over memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from megagap.ops import compiled
from megagap.ops.remainder import join, split_


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a flat buffer that are a part of one parameter, for rounding them stochastically.

    The random bits are a function of key, update number and an element's index in the global tensor, so that they do
    not depend on how tensors are cut, put into buffers and spread over ranks.
    """

    begin: int
    end: int
    """Elements [begin, end) of the buffer."""
    key: int
    """Of the seed and the parameter's name, 64 bits; see :meth:`of`."""
    first: int
    """Index of the first of them in the rank's rectangle of the global tensor, flattened row by row."""
    columns: int
    """Of the rectangle; with several dimensions, elements of a row of the first."""
    pitch: int
    """The same of the global tensor."""
    offset: int
    """Index of the rectangle's first element in the global tensor, flattened row by row."""

    @classmethod
    def of(
        cls,
        seed: int,
        name: str,
        shape: Sequence[int],
        offsets: Sequence[int],
        sizes: Sequence[int],
        *,
        first: int,
        begin: int,
        end: int,
    ) -> "Segment":
        """Of elements [first, first + end - begin) of a rank's rectangle of a tensor of one or two dimensions."""
        assert 1 <= len(shape) == len(offsets) == len(sizes) <= 2, (name, shape)
        key = int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little", signed=True)
        pitch = shape[1] if len(shape) == 2 else 1
        columns = sizes[1] if len(shape) == 2 else 1
        offset = offsets[0] * pitch + (offsets[1] if len(shape) == 2 else 0)
        return cls(begin, end, key, first, columns, pitch, offset)


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
    stochastic: Sequence[Segment] = (),
    remainder: Tensor | None = None,
) -> None:
    """One update in place, with ``grad / divisor``; all flat, contiguous and of one size.

    parameter: fp32; or bf16 with the ``remainder``, int16, of an fp32 master (``remainder.py``); or bf16 without, then
    rounded to the nearest, or stochastically (Gupta et al. 2015, section 3.1) in the segments of ``stochastic``, if
    there are any; what is in none is padding, and stays as it is. Moments: fp32. ``divisor``, ``reject`` and
    ``updates`` (their number, this one included) are fp32 device scalars; where ``reject`` is 1 nothing changes,
    without a host sync on GPU.
    """
    if compiled.supports(parameter) and parameter.dtype != torch.float16:
        numbers = (divisor, reject, updates, lr, *betas, eps, weight_decay)
        if not stochastic:
            torch.ops.megagap.adamw_(parameter, exp_avg, exp_avg_sq, grad, *numbers, None, remainder)
        for segment in stochastic:
            state = (x[segment.begin : segment.end] for x in (parameter, exp_avg, exp_avg_sq, grad))
            place = (segment.key, segment.first, segment.columns, segment.pitch, segment.offset)
            torch.ops.megagap.adamw_(*state, *numbers, place)
        return
    assert not stochastic, "stochastic rounding needs the compiled kernel"
    master = join(parameter, remainder)
    torch._fused_adamw_(
        [master],
        [grad],
        [exp_avg],
        [exp_avg_sq],
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
    if remainder is not None:
        split_(master, parameter, remainder)


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
