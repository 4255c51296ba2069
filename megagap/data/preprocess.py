"""JSON lines of text to a ``.bin``/``.idx`` pair, in worker processes.

The parent reads lines into chunks, workers parse and encode them, the parent writes the tokens in input order. At most
a few chunks per worker are under way, so memory does not grow with the input; a worker that raises or dies ends the
whole with its error.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megagap.data.indexed import IndexedDatasetWriter, best_dtype
from megagap.data.jsonlines import Chunk, read_chunks, total_size
from megagap.data.tokenizer import Tokenizer, load_tokenizer
from megagap.errors import DataError

CHUNKS_PER_WORKER = 3
"""Chunks under way: one being encoded, one waiting, one done and waiting for an earlier one."""


@dataclass(frozen=True)
class Summary:
    """What was written."""

    prefix: str
    documents: int
    empty: int
    """Documents without text, left out."""
    tokens: int
    input_bytes: int
    seconds: float

    def __str__(self) -> str:
        megabytes = self.input_bytes / 1e6
        empty = f" ({self.empty:,} empty left out)" if self.empty else ""
        return (
            f"{self.prefix}: {self.documents:,} documents{empty}, {self.tokens:,} tokens "
            f"from {megabytes:,.1f} MB in {self.seconds:.1f} s ({megabytes / max(self.seconds, 1e-9):.1f} MB/s)"
        )


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk, one after the other."""

    tokens: NDArray[Any]
    lengths: list[int]
    empty: int
    size: int
    """Bytes of the chunk."""


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks; what a worker process holds."""

    tokenizer: Tokenizer
    key: str
    append_eod: bool

    def __call__(self, chunk: Chunk) -> Encoded:
        encoded = self.tokenizer.encode_batch(list(chunk.texts(self.key)))
        documents = [ids for ids in encoded if ids]
        end = [self.tokenizer.eod] if self.append_eod else []
        dtype = best_dtype(self.tokenizer.vocab_size)
        tokens = np.fromiter(chain.from_iterable(chain(ids, end) for ids in documents), dtype)
        lengths = [len(ids) + len(end) for ids in documents]
        return Encoded(tokens, lengths, len(encoded) - len(documents), chunk.size)


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str,
    tokenizer: str,
    key: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    show_progress: bool = False,
) -> Summary:
    """Write ``{output_prefix}_{key}_document.bin`` and ``.idx`` from JSON lines, a document each, in input order.

    ``tokenizer`` is a specification for :func:`load_tokenizer`; ``append_eod`` ends each document with its end-of-text
    id. Raises :class:`DataError` naming file and line of a document that cannot be read; then nothing is written.
    """
    started = time.monotonic()
    size = total_size(inputs)
    encoder = Encoder(load_tokenizer(tokenizer), key, append_eod)
    if append_eod and encoder.tokenizer.eod is None:
        raise DataError(f"the tokenizer {tokenizer} has no end-of-text token to append")
    chunks = read_chunks(inputs)
    results = map(encoder, chunks) if workers == 1 else _encode_in_workers(chunks, tokenizer, key, append_eod, workers)
    prefix = f"{output_prefix}_{key}_document"
    documents = empty = tokens = 0
    with (
        IndexedDatasetWriter(prefix, best_dtype(encoder.tokenizer.vocab_size)) as writer,
        tqdm(total=size, unit="B", unit_scale=True, desc=Path(prefix).name, disable=not show_progress) as bar,
    ):
        for result in results:
            start = 0
            for length in result.lengths:
                writer.add_document(result.tokens[start : start + length])
                start += length
            documents, empty, tokens = documents + len(result.lengths), empty + result.empty, tokens + start
            bar.update(result.size)
    return Summary(prefix, documents, empty, tokens, size, time.monotonic() - started)


def _encode_in_workers(
    chunks: Iterable[Chunk], tokenizer: str, key: str, append_eod: bool, workers: int
) -> Iterator[Encoded]:
    """``map(encoder, chunks)`` in ``workers`` processes, in order."""
    # Spawned rather than forked: a tokenizer's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer, key, append_eod))
    under_way: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_encode, chunk))
            if len(under_way) == workers * CHUNKS_PER_WORKER:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died (out of memory, or killed?); nothing was written\n"
            "  try again with fewer --workers, or with --workers 1 to see its fault."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder
"""In a worker process: set once by its initialiser, as ProcessPoolExecutor has no other place for it."""


def _start_worker(tokenizer: str, key: str, append_eod: bool) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores, one thread each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(load_tokenizer(tokenizer), key, append_eod)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    return _worker_encoder(chunk)
