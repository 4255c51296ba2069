"""Random bits for rounding stochastically, of each element of a tensor: the same in whatever layout it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

PARAMETER, MOMENTS = 0, 1
"""Streams of random bits: independent of each other, for the same key and update."""

WORD = 0xFFFFFFFF


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

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        """As the kernels take it."""
        return self.key, self.first, self.columns, self.pitch, self.offset

    def random_bits(self, update: Tensor, stream: int) -> Tensor:
        """Of each element, int64 [end - begin]: 16 bits of ``PARAMETER``, 32 of ``MOMENTS``: the lower half for the
        first moment, the upper for the second.

        ``update``: device scalar, the number of the update.
        """
        local = torch.arange(self.first, self.first + self.end - self.begin, device=update.device)
        element = self.offset + local // self.columns * self.pitch + local % self.columns
        halves = 2 if stream == PARAMETER else 1
        share = 4 * halves
        words = torch.stack(philox(self.key, update.long(), stream, element // share))
        word = words.gather(0, (element % share // halves)[None])[0]
        return word >> 16 * (element % 2) & 0xFFFF if stream == PARAMETER else word


def philox(key: int, step: Tensor, stream: int, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 (Salmon et al. 2011), which passes BigCrush: four words of each counter, int64, below 2³²."""
    c0, c1 = counters & WORD, counters >> 32 & WORD
    c2, c3 = step.expand_as(counters), torch.full_like(counters, stream)
    low, high = key & WORD, key >> 32 & WORD
    for _ in range(7):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrapped to 64 bits, all of which are used
        c0, c1, c2, c3 = (
            (second >> 32 & WORD) ^ c1 ^ low,
            second & WORD,
            (first >> 32 & WORD) ^ c3 ^ high,
            first & WORD,
        )
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def round_stochastically_(numbers: Tensor, random: Tensor, rounded: Tensor) -> None:
    """Set bf16 ``rounded`` to fp32 ``numbers``, up or down with probabilities such that the mean is the number itself
    (Gupta et al. 2015, section 3.1); what is not finite stays so. ``random``: 16 bits each."""
    bits = numbers.view(torch.int32) + random.to(torch.int32) & ~0xFFFF
    rounded.copy_(torch.where(numbers.isfinite(), bits.view(torch.float32), numbers))
