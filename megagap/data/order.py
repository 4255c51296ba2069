"""The building blocks of sample orders: keyed stateless permutations, windows, and splits of documents."""

import hashlib
import json
from itertools import accumulate, pairwise
from math import inf, isqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megagap.errors import DataError

Index = TypeVar("Index", int, NDArray[np.int64])

MASK = 2**64 - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""The odd number nearest to 2^64 / φ."""
ROUNDS = 8


def stable_key(*parts: str | int) -> int:
    """A 64-bit key of ``parts``, the same on every machine and in every process (unlike ``hash``)."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "little")


def permute(index: Index, length: int, key: int) -> Index:
    """Where the permutation of [0, length) chosen by ``key`` sends ``index``; an int or an int64 array.

    A Feistel network on Z_a × Z_b with a·b just above ``length``, walked until it falls into [0, length)
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002: generalised Feistel with cycle walking).
    """
    a = isqrt(length - 1) + 1 if length > 1 else 1
    b = -(-length // a)
    subkeys = [_mix(key + (i + 1) * GOLDEN_GAMMA & MASK) for i in range(ROUNDS)]
    if not isinstance(index, np.ndarray):
        assert 0 <= index < length, (index, length)
        place: int = _feistel(index, a, b, subkeys)
        while place >= length:
            place = _feistel(place, a, b, subkeys)
        return place
    assert not index.size or (index.min() >= 0 and index.max() < length), length
    places: NDArray[np.uint64] = _feistel(index.astype(np.uint64), a, b, subkeys)
    while (outside := np.flatnonzero(places >= length)).size:
        places[outside] = _feistel(places[outside], a, b, subkeys)
    return places.astype(np.int64)


def _feistel(x: Any, a: int, b: int, subkeys: list[int]) -> Any:
    """A permutation of [0, a·b), keyed by ``subkeys``; an int, or uint64 as an array."""
    left, right = x // b, x % b
    for i, subkey in enumerate(subkeys):
        if i % 2:
            right = (right + _mix(left + subkey & MASK) % b) % b
        else:
            left = (left + _mix(right + subkey & MASK) % a) % a
    return left * b + right


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014; Stafford's variant 13): a bijection of 64 bits.

    Masking to 64 bits is for ints; of a uint64 array it changes nothing.
    """
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def window_count(tokens: int, sequence_length: int) -> int:
    """Whole windows of ``sequence_length + 1`` tokens in a source of ``tokens`` tokens, overlapping by one."""
    return max(tokens - 1, 0) // sequence_length


def split_shares(split: str) -> list[float]:
    """The shares of training, validation and test, adding up to 1, of a text such as ``"98,1,1"``. Raises DataError."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    total = sum(shares)
    if len(shares) != 3 or min(shares) < 0 or not 0 < total < inf:
        raise DataError(f'the split {split!r} cannot be used: give three shares such as "98,1,1"')
    return [share / total for share in shares]


def split_ranges(split: str, documents: int) -> list[tuple[int, int]]:
    """The documents [start, stop) of training, validation and test, rounded as Megatron does."""
    bounds = [round(bound * documents) for bound in accumulate(split_shares(split), initial=0.0)]
    return list(pairwise(bounds))
