"""fp32 numbers kept as bf16 and a 16-bit remainder: together exact, for half of a master's memory.

The bits of a number are ``(bf16 << 16) + remainder``, the remainder a signed 16-bit integer, so that bf16 is the number
rounded to nearest. Numbers half way between two round away from zero: an even bf16 number is the nearest-even one of
65,537 numbers, one more than a remainder can tell apart.
"""

import torch
from torch import Tensor


def join(values: Tensor, remainder: Tensor | None) -> Tensor:
    """The fp32 numbers of which ``split_`` made bf16 ``values`` and an int16 ``remainder`` of one shape; ``values``
    itself where there is no remainder."""
    if remainder is None:
        return values
    return (values.view(torch.int16).to(torch.int32) * 2**16 + remainder).view(torch.float32)


def split_(numbers: Tensor, values: Tensor, remainder: Tensor | None) -> None:
    """Store ``numbers`` of the same shape, any dtype and device: in ``values`` alone where there is no remainder.

    All fp32 numbers keep their bits, but for NaN: each becomes the same one, since in bf16 some would be numbers.
    """
    if remainder is None:
        values.copy_(numbers)
        return
    wide = numbers.detach().to(values.device, torch.float32).contiguous()
    bits = wide.masked_fill(wide.isnan(), torch.nan).view(torch.int32)
    remainder.copy_(bits)  # its lower 16 bits
    values.view(torch.int16).copy_((bits - remainder) >> 16)
