"""Initial weights by element: each value is a pure function of (seed, parameter name, global row, global column).

Every layout therefore starts from the same weights, and no rank ever holds more than its shard. The draws are
counter-based: the n-th output of SplitMix64 (Steele et al. 2014, figure 16) is a mixed multiple of n, so that any
element can be drawn alone; Box and Muller's transform (1958) turns its two halves into a normal variate.
"""

import hashlib
import math

import torch
from torch import Tensor

from megagap.config import Model
from megagap.model.shapes import is_norm_gain
from megagap.parallel.shard import Shard, ShardedParameter

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ELEMENTS_AT_A_TIME = 1 << 22
"""Elements drawn at once: bounds the float64 temporaries to a few hundred MB."""


def initialise(parameters: list[ShardedParameter], model: Model, seed: int) -> None:
    """Fill parameters: gains 1, biases 0, matrices normal with ``model.initializer_range``.

    Projections back into the residual stream (o_proj, down_proj) are scaled by 1 / sqrt(2 · layers), which keeps the
    stream's variance independent of depth (Radford et al. 2019, section 2.3); not where their outputs are normalised
    before they are added (OLMo et al. 2024, section 3.2). Padding is zero.
    """
    for parameter in parameters:
        name = parameter.shard.name
        with torch.no_grad():
            parameter.zero_()
            if is_norm_gain(name):
                parameter.fill_(1.0 / model.norm_gain_scale)
            elif not name.endswith(".bias"):
                std = model.initializer_range
                if model.norm_position == "pre" and name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * model.num_hidden_layers)
                _fill_normal(parameter, parameter.shard, std, seed)


def _fill_normal(tensor: Tensor, shard: Shard, std: float, seed: int) -> None:
    """``tensor``: [rows, columns] with padding rows last."""
    (first_row, first_column), (rows, columns) = shard.offsets, shard.sizes
    width = shard.shape[1]
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{shard.name}".encode(), digest_size=8).digest(), "little")
    column = torch.arange(first_column, first_column + columns, device=tensor.device)
    step = max(1, _ELEMENTS_AT_A_TIME // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        row = torch.arange(first_row + start, first_row + stop, device=tensor.device)
        counters = row.unsqueeze(1) * width + column
        # float64 so that devices and vector widths, which differ in the last bits, round to the same values.
        tensor[start:stop] = (standard_normal(counters, key) * std).to(tensor.dtype)


def standard_normal(counters: Tensor, key: int) -> Tensor:
    """Normal variates, float64: the draws numbered ``counters`` (int64) of the stream ``key`` (64 bits)."""
    bits = _splitmix64(counters, key)
    high, low = (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF
    radius = torch.log((high.double() + 0.5) * 2.0**-32).mul_(-2).sqrt_()
    return radius.mul_(torch.cos(low.double() * (2.0**-32 * 2 * math.pi)))


def _splitmix64(counters: Tensor, key: int) -> Tensor:
    """64 random bits each, as int64: products wrap around, as the algorithm requires."""
    z = (counters + 1) * _signed(_GAMMA) + _signed(key)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: that of int64 is arithmetic."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit value."""
    return value - (1 << 64) if value >> 63 else value
