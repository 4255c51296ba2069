"""An exact hash of gradients: it tells whether two computations of a step agree in every bit.

It is the sum, mod 2^64, of each element's bit pattern times an odd number drawn for its place. Sums of integers do not
depend on their order, so each rank hashes what it owns, in any order, and the sum over the ranks is the hash of all.
Two tensors that differ in one element never have the same hash: an odd number is invertible mod 2^64. Many differences
cancel with a probability of about 2^-64.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor

from megagap.optim.gradient_store import GradientStore
from megagap.parallel.shard import Slice

CHUNK = 1 << 22
"""Elements hashed at a time: their places and products are 64-bit integers, which take several times the memory."""

_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 divided by the golden ratio, as a signed number (Knuth, The Art of Computer Programming 3, section 6.4)."""

_BITS = {4: torch.int32, 8: torch.int64}
"""Integers of the same size, by bytes."""


def gradient_hash(store: GradientStore) -> Tensor:
    """This rank's share of the hash of the reduced gradients, int64 scalar: the sum over the world is the hash.

    Places are those in the global tensors: layouts that compute the same bits have the same hash. To be called between
    ``store.finish()`` and the update.
    """
    total = torch.zeros((), dtype=torch.int64, device=store.mesh.device)
    for bucket in store.buckets:
        if bucket.is_owned:
            for part in bucket.slices("gradient", bucket.own_gradient):
                total += _hash_of_slice(part)
    return total


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
            self.value += hash_of(gradient, key=reductions << 40)
            reductions += 1

        with store.watched(add):
            yield


def hash_of(values: Tensor, key: int = 0) -> Tensor:
    """The hash of a flat tensor [n] of 32- or 64-bit elements, int64 scalar; ``key``: of its place 0."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, values.numel(), CHUNK):
        part = values[start : start + CHUNK]
        total += _weighted(part, torch.arange(start, start + part.numel(), device=values.device), key)
    return total


def _hash_of_slice(part: Slice) -> Tensor:
    shard = part.shard
    key = int.from_bytes(blake2b(shard.name.encode(), digest_size=8).digest(), "little", signed=True)
    total = torch.zeros((), dtype=torch.int64, device=part.tensor.device)
    for start in range(part.start, part.stop, CHUNK):
        stop = min(start + CHUNK, part.stop)
        places = torch.arange(start, stop, device=part.tensor.device)
        if len(shard.shape) == 2 and shard.sizes[1] != shard.shape[1]:
            rows, columns = places // shard.sizes[1], places % shard.sizes[1]
            places = (rows + shard.offsets[0]) * shard.shape[1] + columns + shard.offsets[1]
        else:
            places += shard.offsets[0] * (shard.shape[1] if len(shard.shape) == 2 else 1)
        total += _weighted(part.tensor[start - part.start : stop - part.start], places, key)
    return total


def _weighted(values: Tensor, places: Tensor, key: int) -> Tensor:
    """The sum of bit patterns times odd numbers drawn for ``places``, int64 [n]; products wrap."""
    weights = (places + key) * _MULTIPLIER
    weights ^= weights >> 32
    weights *= _MULTIPLIER
    weights |= 1
    return (weights * values.view(_BITS[values.itemsize])).sum()


def in_parts(value: Tensor) -> Tensor:
    """A hash as its four parts of 16 bits, the highest first: fp32 [4], which holds them exactly."""
    return torch.stack([(value >> shift) & 0xFFFF for shift in (48, 32, 16, 0)]).float()


def as_text(parts: Sequence[float]) -> str:
    """:func:`in_parts`, read on the host, as 16 hexadecimal digits."""
    return "".join(f"{int(part):04x}" for part in parts)
