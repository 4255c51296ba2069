"""Files sent between processes, through the group of all of them."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.errors import system_reason
from megagap.parallel.mesh import Mesh

PIECE_BYTES = 16 << 20
"""How much of a file is under way at a time between two ranks."""


@dataclass(frozen=True)
class Transfer:
    """A file that one rank sends to another one."""

    name: str
    size: int
    """Bytes."""
    sender: int
    receiver: int


def exchange_files(transfers: Sequence[Transfer], mesh: Mesh, path_of: Callable[[str], Path]) -> str | None:
    """Make all transfers: one file at a time between two ranks, all pairs of ranks at once. Collective, with one list.

    ``path_of``: where this rank reads the file of this name that it sends, or writes, and syncs, the one it receives.
    Returns what went wrong on this rank. It has made its part nevertheless, so that nobody waits for it: what arrives
    must be verified.
    """
    rank = mesh.world.rank
    faults: list[str] = []
    pairs: dict[tuple[int, int], list[Transfer]] = {}
    for transfer in transfers:
        if rank in (transfer.sender, transfer.receiver):
            pairs.setdefault((transfer.sender, transfer.receiver), []).append(transfer)

    def pieces(sender: int, files: list[Transfer]) -> Iterator[Tensor]:
        end = _outgoing if sender == rank else _incoming
        return chain.from_iterable(end(path_of(file.name), file.size, faults) for file in files)

    streams = [(pair, pieces(pair[0], files)) for pair, files in sorted(pairs.items())]
    # Each rank posts a round's messages before it waits for any of them, so no ranks wait for each other in a circle.
    while under_way := [(pair, piece) for pair, stream in streams if (piece := next(stream, None)) is not None]:
        tensors = [piece.to(mesh.device) for _, piece in under_way]  # NCCL sends from GPUs only
        messages = [
            dist.P2POp(dist.isend, tensor, receiver) if sender == rank else dist.P2POp(dist.irecv, tensor, sender)
            for ((sender, receiver), _), tensor in zip(under_way, tensors, strict=True)
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        for (_, piece), tensor in zip(under_way, tensors, strict=True):
            if tensor is not piece:
                piece.copy_(tensor)
        mesh.spans.move()
    return "; ".join(faults) or None


def _outgoing(path: Path, size: int, faults: list[str]) -> Iterator[Tensor]:
    """The file's pieces; zeros from where it cannot be read."""
    lengths, sent = _lengths(size), 0
    try:
        with open(path, "rb") as file:
            for length in lengths:
                piece = torch.zeros(length, dtype=torch.uint8)
                file.readinto(piece.numpy().data)
                yield piece
                sent += 1
    except OSError as error:
        faults.append(f"{path}: {system_reason(error)}")
    for length in lengths[sent:]:
        yield torch.zeros(length, dtype=torch.uint8)


def _incoming(path: Path, size: int, faults: list[str]) -> Iterator[Tensor]:
    """Tensors to receive the pieces in; each is written when the next one is asked for, until that fails."""
    lengths, received = _lengths(size), 0
    try:
        with open(path, "wb") as file:
            for length in lengths:
                piece = torch.empty(length, dtype=torch.uint8)
                yield piece
                received += 1
                file.write(piece.numpy().data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        faults.append(f"{path}: {system_reason(error)}")
    for length in lengths[received:]:
        yield torch.empty(length, dtype=torch.uint8)


def _lengths(size: int) -> list[int]:
    return [min(PIECE_BYTES, size - begin) for begin in range(0, size, PIECE_BYTES)]
