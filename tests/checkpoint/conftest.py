"""Ranks without processes: threads that gather and broadcast through shared memory, and random layouts of tensors."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from megagap.parallel.shard import Shard, Slice
from megagap.preprocess.bpe import train_tokenizer
from tests.launching import SECONDS

Tensors = dict[tuple[str, str], torch.Tensor]
"""Whole tensors by (kind, name)."""

RunRanks = Callable[[int, Callable[["ThreadCommunicator"], None]], list[Exception | None]]


class ThreadCommunicator:
    """One rank of several that run as threads."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[object]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._board = barrier, board

    def _exchange(self, value: object) -> list[object]:
        self._board[self.rank] = value
        self._barrier.wait(timeout=SECONDS)
        values = list(self._board)
        self._barrier.wait(timeout=SECONDS)
        return values

    def gather(self, value: object) -> list[object] | None:
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast(self, value: object) -> object:
        return self._exchange(value)[0]


def run_ranks(size: int, work: Callable[[ThreadCommunicator], None]) -> list[Exception | None]:
    """Run ``work`` on each of ``size`` ranks at once; returns what each raised. A hang breaks the barrier."""
    barrier = threading.Barrier(size)
    board: list[object] = [None] * size

    def guarded(rank: int) -> Exception | None:
        try:
            work(ThreadCommunicator(rank, size, barrier, board))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))


@pytest.fixture(name="run_ranks")
def run_ranks_fixture() -> RunRanks:
    return run_ranks


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int) -> list[tuple[int, int]]:
    """[0, length) in up to ``most`` consecutive intervals, none empty."""
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=most - 1)) if length > 1 else set()
    borders = [0, *sorted(inner), length]
    return list(itertools.pairwise(borders))


@st.composite
def layouts(draw: st.DrawFn, tensors: Tensors, ranks: int) -> list[list[tuple[str, Shard, int, int]]]:
    """For each rank the (kind, shard, start, stop) it owns: every tensor cut into a grid of shards, each shard into
    flat intervals, and those distributed at random."""
    owned: list[list[tuple[str, Shard, int, int]]] = [[] for _ in range(ranks)]
    for (kind, name), tensor in tensors.items():
        shape = tuple(tensor.shape)
        for box in itertools.product(*[draw(cuts(length, 2)) for length in shape]):
            sizes = tuple(end - begin for begin, end in box)
            padding = draw(st.integers(0, 2))
            shard = Shard(name, shape, tuple(begin for begin, _ in box), sizes, (sizes[0] + padding, *sizes[1:]))
            for start, stop in draw(cuts(prod(sizes), 3)):
                owned[draw(st.integers(0, ranks - 1))].append((kind, shard, start, stop))
    return owned


def part_of(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    """The local part of a whole tensor, flattened."""
    region = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))
    return whole[region].reshape(-1).contiguous()


def cut_out(tensors: Tensors, owned: list[tuple[str, Shard, int, int]]) -> list[Slice]:
    """Slices with the values of the whole tensors."""
    return [
        Slice(kind, shard, start, stop, part_of(tensors[kind, shard.name], shard)[start:stop].clone())
        for kind, shard, start, stop in owned
    ]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of at most 300 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text('{"text": "the quick brown fox, le vif renard brun"}\n' * 5)
    train_tokenizer([folder / "text.jsonl"], folder / "bpe", 300)
    return folder / "bpe"
