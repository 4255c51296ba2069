"""An exact hash of gradients: it tells whether two computations of a step agree in every bit.

It is the sum, mod 2^64, of each element's bit pattern times an odd number: that of its parameter's name, times that of
its row, times that of its column. Sums of integers do not depend on their order, so each rank hashes what it owns, and
the sum over the ranks is the hash of all. An odd number is invertible mod 2^64: two gradients that differ in one
element never have the same hash. Several differences cancel with a probability of about 2^-64.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor

from megagap.optim.gradient_store import GradientStore

CHUNK = 1 << 24
"""Elements hashed at a time: their products are 64-bit integers."""

WIDTH = 4096
"""Columns of what is no matrix."""

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 divided by the golden ratio, as a signed number (Knuth, The Art of Computer Programming 3, section 6.4)."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of the same size, by bytes."""


def gradient_hash(store: GradientStore) -> Tensor:
    """This rank's share of the hash of the reduced gradients, int64 scalar: the sum over the world is the hash.

    Rows and columns are those of the global tensors: layouts that compute the same bits have the same hash. To be
    called between ``store.finish()`` and the update.
    """
    owned = [bucket for bucket in store.buckets if bucket.is_owned]
    parts = [part for bucket in owned for part in bucket.slices("gradient", bucket.own_gradient)]
    total = torch.zeros((), dtype=torch.int64, device=store.mesh.device)
    longest = max((length for part in parts for length in part.shard.shape), default=0)
    rows, columns = (_odd_numbers(longest, key, store.mesh.device) for key in (0, 1 << 32))
    for part in parts:
        shard = part.shard
        name = int.from_bytes(blake2b(shard.name.encode(), digest_size=8).digest(), "little", signed=True) | 1
        own_rows = rows[shard.offsets[0] :] if len(shard.shape) == 2 else rows
        own_columns = columns[shard.offsets[-1] : shard.offsets[-1] + shard.sizes[-1]]
        total += name * _hash_of_rows(part.tensor, part.start, own_rows, own_columns)
    return total


def hash_of(values: Tensor, key: int = 0) -> Tensor:
    """The hash of a flat tensor [n] of 16-, 32- or 64-bit elements, int64 scalar, in rows of :data:`WIDTH`.

    ``key``, below 2^31, tells several tensors apart.
    """
    rows = _odd_numbers(-(-values.numel() // WIDTH), key << 32, values.device)
    return _hash_of_rows(values, 0, rows, _odd_numbers(WIDTH, 1 << 31, values.device))


class LocalHash:
    """A hash of this rank's own gradients, before they are summed over data-parallel ranks: :attr:`value`, int64
    scalar, of all that is computed within :meth:`of`."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros((), dtype=torch.int64, device=device)

    @contextmanager
    def of(self, store: GradientStore) -> Iterator[None]:
        """Hash every gradient that ``store`` reduces within the block."""
        reductions = 0

        def add(gradient: Tensor) -> None:
            nonlocal reductions
            self.value += hash_of(gradient, key=reductions)
            reductions += 1

        with store.watched(add):
            yield


def in_parts(value: Tensor) -> Tensor:
    """A hash as its four parts of 16 bits, the highest first: fp32 [4], which holds them exactly."""
    return torch.stack([(value >> shift) & 0xFFFF for shift in (48, 32, 16, 0)]).float()


def as_text(parts: Sequence[float]) -> str:
    """:func:`in_parts`, read on the host, as 16 hexadecimal digits."""
    return "".join(f"{int(part):04x}" for part in parts)


def _hash_of_rows(values: Tensor, start: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The sum of bits × rows[r] × columns[c] of elements [start, start + n) of a matrix with as many columns.

    values: [n], flattened row by row. rows, columns: int64; products wrap.
    """
    bits, width, total = values.view(_BITS[values.itemsize]), len(columns), columns.new_zeros(())
    place, stop = start, start + len(values)
    while place < stop:
        row, column = divmod(place, width)
        if column or stop - place < width:  # a part of a row
            height, count = 1, min(width - column, stop - place)
        else:
            height = max(1, min(stop - place, CHUNK) // width)
            count = height * width
        block = bits[place - start : place - start + count].view(height, -1)
        sums = (block * columns[column : column + block.shape[1]]).sum(1)
        total += (sums * rows[row : row + height]).sum()
        place += count
    return total


def _odd_numbers(count: int, key: int, device: torch.device) -> Tensor:
    """Drawn for key, key + 1, …: int64 [count]."""
    numbers = (torch.arange(count, device=device) + key) * _MULTIPLIER
    numbers ^= numbers >> 32
    numbers *= _MULTIPLIER
    numbers |= 1
    return numbers
