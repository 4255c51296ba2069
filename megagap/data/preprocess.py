"""JSON lines of text to ``.bin``/``.idx`` pairs, one for each key, in worker processes.

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
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megagap.data.indexed import IndexedDatasetWriter, best_dtype
from megagap.data.jsonlines import Chunk, fail, read_chunks, total_size
from megagap.data.tokenizer import Tokenizer, load_tokenizer
from megagap.errors import DataError

CHUNKS_PER_WORKER = 3
"""Chunks under way: one being encoded, one waiting, one done and waiting for an earlier one."""


OnError = Literal["stop", "skip"]
"""What to do about a document that is malformed or lacks a text: end with its error, or leave it out."""

REPORTED = 5
"""Documents that were left out, of which file, line and fault are reported; the rest is counted."""


@dataclass(frozen=True)
class Pair:
    """A ``.bin``/``.idx`` pair that was written."""

    prefix: str
    documents: int
    empty: int
    """Documents without text, left out."""
    tokens: int

    def __str__(self) -> str:
        empty = f" ({self.empty:,} empty left out)" if self.empty else ""
        return f"{self.prefix}: {self.documents:,} documents{empty}, {self.tokens:,} tokens"


@dataclass(frozen=True)
class Summary:
    """What was written, and what was not."""

    pairs: tuple[Pair, ...]
    """In the order of the keys."""
    skipped: int
    """Documents that were malformed or lacked a text, left out of all pairs."""
    first_skipped: tuple[str, ...]
    """File, line and fault of the first of them."""
    input_bytes: int
    """Of compressed files, the compressed bytes."""
    seconds: float

    def __str__(self) -> str:
        megabytes = self.input_bytes / 1e6
        speed = f"{megabytes:,.1f} MB in {self.seconds:.1f} s ({megabytes / max(self.seconds, 1e-9):.1f} MB/s)"
        return "\n".join(f"{pair} from {speed}" for pair in self.pairs)


@dataclass(frozen=True)
class EncodedTexts:
    """The texts of a chunk's documents under one key, one after the other."""

    tokens: NDArray[Any]
    lengths: list[int]
    empty: int


@dataclass(frozen=True)
class EncodedChunk:
    texts: list[EncodedTexts]
    """In the order of the keys."""
    skipped: int
    first_skipped: list[str]
    size: int
    """Bytes of the chunk."""


@dataclass(frozen=True)
class Encoder:
    """Encodes chunks; what a worker process holds."""

    tokenizer: Tokenizer
    keys: Sequence[str]
    append_eod: bool
    on_error: OnError

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        faults: list[DataError] = []
        documents = list(chunk.documents(self.keys, faults.append if self.on_error == "skip" else fail))
        texts = [self._encode([document[i] for document in documents]) for i in range(len(self.keys))]
        return EncodedChunk(texts, len(faults), [fault.args[0] for fault in faults[:REPORTED]], chunk.size)

    def _encode(self, texts: list[str]) -> EncodedTexts:
        encoded = [ids for ids in self.tokenizer.encode_batch(texts) if ids]
        end = [self.tokenizer.eod] if self.append_eod else []
        dtype = best_dtype(self.tokenizer.vocab_size)
        tokens = np.fromiter(chain.from_iterable(chain(ids, end) for ids in encoded), dtype)
        return EncodedTexts(tokens, [len(ids) + len(end) for ids in encoded], len(texts) - len(encoded))


class PairWriter:
    """Writes the texts of one key and counts them."""

    def __init__(self, writer: IndexedDatasetWriter) -> None:
        self._writer = writer
        self._documents = self._empty = self._tokens = 0

    def add(self, texts: EncodedTexts) -> None:
        start = 0
        for length in texts.lengths:
            self._writer.add_document(texts.tokens[start : start + length])
            start += length
        self._documents += len(texts.lengths)
        self._empty += texts.empty
        self._tokens += start

    def pair(self) -> Pair:
        return Pair(self._writer.prefix, self._documents, self._empty, self._tokens)


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str,
    tokenizer: str,
    keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    on_error: OnError = "stop",
    show_progress: bool = False,
) -> Summary:
    """Write ``{output_prefix}_{key}_document.bin`` and ``.idx`` from JSON lines, for each key, in input order.

    ``tokenizer`` is a specification for :func:`load_tokenizer`; ``append_eod`` ends each document with its end-of-text
    id. Raises :class:`DataError` naming file and line of a document that is malformed or lacks a key, unless
    ``on_error`` is ``skip`` and others are fine, and of an input file that is cut short or damaged, in any case; then
    nothing is written.
    """
    assert on_error in get_args(OnError), on_error
    started = time.monotonic()
    if len({*keys}) < len(keys):
        raise DataError(f"the keys {', '.join(keys)} are not distinct: each is to be a file of its own")
    size = total_size(inputs)
    encoder = Encoder(load_tokenizer(tokenizer), keys, append_eod, on_error)
    if append_eod and encoder.tokenizer.eod is None:
        raise DataError(f"the tokenizer {tokenizer} has no end-of-text token to append")
    chunks = read_chunks(inputs)
    results = map(encoder, chunks) if workers == 1 else _encode_in_workers(chunks, encoder, workers)
    dtype = best_dtype(encoder.tokenizer.vocab_size)
    skipped = 0
    first_skipped: list[str] = []
    with (
        ExitStack() as stack,
        tqdm(total=size, unit="B", unit_scale=True, desc=Path(output_prefix).name, disable=not show_progress) as bar,
    ):
        writers = [
            PairWriter(stack.enter_context(IndexedDatasetWriter(f"{output_prefix}_{key}_document", dtype)))
            for key in keys
        ]
        for result in results:
            for writer, texts in zip(writers, result.texts, strict=True):
                writer.add(texts)
            skipped += result.skipped
            first_skipped += result.first_skipped[: REPORTED - len(first_skipped)]
            bar.update(result.size)
        pairs = tuple(writer.pair() for writer in writers)
        if skipped and not any(pair.documents or pair.empty for pair in pairs):
            raise DataError(f"none of the {skipped:,} documents can be used; the first fault:\n  {first_skipped[0]}")
    return Summary(pairs, skipped, tuple(first_skipped), size, time.monotonic() - started)


def _encode_in_workers(chunks: Iterable[Chunk], encoder: Encoder, workers: int) -> Iterator[EncodedChunk]:
    """``map(encoder, chunks)`` in ``workers`` processes, in order."""
    # Spawned rather than forked: a tokenizer's threads do not survive a fork. Each loads the tokenizer for itself.
    settings = (encoder.tokenizer.spec, encoder.keys, encoder.append_eod, encoder.on_error)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, settings)
    under_way: deque[Future[EncodedChunk]] = deque()
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


def _start_worker(tokenizer: str, keys: Sequence[str], append_eod: bool, on_error: OnError) -> None:
    global _worker_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores, one thread each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder = Encoder(load_tokenizer(tokenizer), keys, append_eod, on_error)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> EncodedChunk:
    return _worker_encoder(chunk)
