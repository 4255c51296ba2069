"""A second pass over a pair: its documents in a shuffled order, without repeated ones, in bounded memory.

Duplicates are documents of the same token ids, found by 128-bit checksums; the first of each stays. The order is that
of a 64-bit key for each document, a hash of the seed and its number. Documents are first dealt out to buckets by their
keys, in file order, then each bucket is sorted in memory. So all reading and writing is sequential, and memory is some
five times a bucket, which is the larger of 64 MB and 1/200 of the file; and one byte per document, and for duplicates
some 50 bytes for each of at most 16 million documents at a time.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megagap.data.format import BLOCK
from megagap.data.order import stable_key
from megagap.data.partial import PARTS, PartialPair, Position, partial_path
from megagap.files import allow_more_open_files

BUCKET_BYTES = 64 << 20
MOST_BUCKETS = 200
"""Of two open files each; where the system allows fewer, there are fewer and larger ones."""
SPARED_FILES = 16
"""Of the files that a process may open, left for others."""
DOCUMENTS_AT_A_TIME = 1 << 24
"""Documents whose checksums are compared in memory."""
STEM = "arranged-"


def arrange(prefix: str, dtype: np.dtype[Any], seed: int | None, dedup: bool) -> tuple[Position, int]:
    """Write the documents of the partial pair anew; what the new partial pair holds, and how many were duplicates.

    The old one stays until :func:`take_over`. ``seed`` None keeps the order. May raise OSError.
    """
    lengths_path, tokens_path = partial_path(prefix, "lengths"), partial_path(prefix, "tokens")
    count = os.path.getsize(lengths_path) // 4
    kept = _first_of_each(prefix, dtype, count) if dedup else np.ones(count, bool)
    origins = _origins(prefix, count)
    with PartialPair(prefix, dtype, stem=STEM, has_origins=origins is not None) as pair:
        if seed is None:
            for first, lengths, tokens in _documents(lengths_path, tokens_path, dtype):
                keep = kept[first : first + len(lengths)]
                came_from = None if origins is None else origins[first : first + len(lengths)][keep]
                pair.add_documents(tokens[np.repeat(keep, lengths)], lengths[keep], came_from)
        else:
            _shuffle(prefix, pair, kept, origins, stable_key("documents", seed))
        return pair.sync(), int(count - np.count_nonzero(kept))


def _origins(prefix: str, count: int) -> NDArray[np.int64] | None:
    """[count] The numbers of the documents' records, memory-mapped; None where they are not known."""
    path = partial_path(prefix, "origins")
    if not path.exists():
        return None
    return np.memmap(path, "<i8", "r", shape=(count,)) if count else np.zeros(0, np.int64)


def take_over(prefix: str) -> None:
    """Replace the old partial pair with the new one; continues where it was interrupted."""
    for part in PARTS:
        if (new := partial_path(prefix, STEM + part)).exists():
            os.replace(new, partial_path(prefix, part))


def _documents(
    lengths_path: Path, tokens_path: Path, dtype: np.dtype[Any]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[Any]]]:
    """The documents in blocks of a few MB: the number of the first, their lengths, their tokens."""
    first = 0
    with open(lengths_path, "rb") as lengths_file, open(tokens_path, "rb") as tokens_file:
        while block := lengths_file.read(4 * (BLOCK >> 8)):
            lengths = np.frombuffer(block, "<i4").astype(np.int64)
            # Of documents of all lengths, a block holds about as many tokens.
            cuts = np.flatnonzero(np.diff(np.cumsum(lengths) // BLOCK)) + 1
            for part in np.split(lengths, cuts):
                yield first, part, np.fromfile(tokens_file, dtype, int(part.sum()))
                first += len(part)


def _first_of_each(prefix: str, dtype: np.dtype[Any], count: int) -> NDArray[np.bool_]:
    """[count] Which documents are the first of their content."""
    path = partial_path(prefix, "checksums")
    with open(path, "wb", buffering=1 << 20) as file:
        for _, lengths, tokens in _documents(partial_path(prefix, "lengths"), partial_path(prefix, "tokens"), dtype):
            data, stops = tokens.view(np.uint8).data, (np.cumsum(lengths) * dtype.itemsize).tolist()
            for start, stop in zip([0, *stops], stops, strict=False):
                file.write(xxhash.xxh3_128_digest(data[start:stop]))
    kept = np.ones(count, bool)
    parts = -(-count // DOCUMENTS_AT_A_TIME)
    for part in range(parts):
        numbers, checksums = [], []
        with open(path, "rb") as file:
            first = 0
            while block := file.read(16 * BLOCK):
                pairs = np.frombuffer(block, "<u8").reshape(-1, 2)
                ours = np.flatnonzero(pairs[:, 0] % parts == part)
                numbers.append(ours + first)
                checksums.append(pairs[ours])
                first += len(pairs)
        ours, sums = np.concatenate(numbers), np.concatenate(checksums)
        order = np.lexsort((ours, sums[:, 1], sums[:, 0]))
        same = np.all(sums[order][1:] == sums[order][:-1], axis=1)
        kept[ours[order][1:][same]] = False
    path.unlink()
    return kept


def _shuffle(
    prefix: str, pair: PartialPair, kept: NDArray[np.bool_], origins: NDArray[np.int64] | None, seed: int
) -> None:
    tokens_path, dtype = partial_path(prefix, "tokens"), pair.dtype
    buckets = min(max(-(-os.path.getsize(tokens_path) // BUCKET_BYTES), 1), MOST_BUCKETS, _openable() // 2)
    paths = [partial_path(prefix, f"bucket-{i}") for i in range(buckets)]
    records = np.dtype([("key", "<u8"), ("length", "<i8"), *([] if origins is None else [("origin", "<i8")])])
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        heads = [stack.enter_context(open(f"{path}.documents", "wb")) for path in paths]
        for first, lengths, tokens in _documents(partial_path(prefix, "lengths"), tokens_path, dtype):
            keys = document_keys(first, len(lengths), seed)
            # Of the upper 32 bits: in the order of the keys, and without overflow.
            bucket = (keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)
            keep = kept[first : first + len(lengths)]
            for number in np.unique(bucket[keep]).tolist():
                ours = keep & (bucket == number)
                files[number].write(np.ascontiguousarray(tokens[np.repeat(ours, lengths)]).view(np.uint8).data)
                head = np.empty(int(np.count_nonzero(ours)), records)
                head["key"], head["length"] = keys[ours], lengths[ours]
                if origins is not None:
                    head["origin"] = origins[first : first + len(lengths)][ours]
                heads[number].write(head.tobytes())
    for path in paths:
        head = np.fromfile(f"{path}.documents", records)
        tokens, lengths = np.fromfile(path, dtype), head["length"]
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(head["key"], kind="stable")
        # The token at each place of the sorted bucket: where its document starts, and how far on in it it is.
        sorted_lengths = lengths[order]
        places = np.repeat(starts[order] - (np.cumsum(sorted_lengths) - sorted_lengths), sorted_lengths)
        places += np.arange(len(places))
        pair.add_documents(tokens[places], sorted_lengths, None if origins is None else head["origin"][order])
        path.unlink()
        Path(f"{path}.documents").unlink()


def _openable() -> int:
    """Files that can still be opened, less those left for others; at least the two of one bucket."""
    allow_more_open_files()
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = 0
    for descriptor in range(min(limit, 2 * MOST_BUCKETS)):
        with suppress(OSError):
            os.fstat(descriptor)
            taken += 1
    return max(limit - taken - SPARED_FILES, 2)


def document_keys(first: int, count: int, seed: int) -> NDArray[np.uint64]:
    """[count] The keys of documents ``first`` on: SplitMix64 (Steele et al. 2014) at positions from ``seed`` on."""
    with np.errstate(over="ignore"):
        x = np.uint64(seed) + (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
