"""Batches for one data-parallel rank, read ahead in the background."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from megagap.data.samples import TrainingData
from megagap.ops.document_mask import Documents

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One data rank's part of a step, in microbatches."""

    tokens: torch.Tensor
    """int64 [m, b, s + 1]"""
    sources: torch.Tensor
    """Index of each sequence's source, int64 [m, b]."""
    source_count: int
    positions: torch.Tensor | None = None
    """With a document mask: the position of each token in its document, int64 [m, b, s + 1]."""
    documents: list[Documents] | None = None
    """The same of the inputs, for each microbatch."""

    def to(self, device: torch.device) -> "Batch":
        """To a GPU asynchronously, from pinned memory."""

        def moved(part: torch.Tensor) -> torch.Tensor:
            return (part.pin_memory() if device.type == "cuda" else part).to(device, non_blocking=True)

        return Batch(
            moved(self.tokens),
            moved(self.sources),
            self.source_count,
            None if self.positions is None else moved(self.positions),
            None if self.documents is None else [documents.to(device) for documents in self.documents],
        )


class MicrobatchLoader:
    """Gives data-parallel rank ``dp_rank`` of ``dp_size`` its part of each step's samples, in microbatches.

    The rank's part is contiguous: the batch in rank order is the batch in sample order. ``global_batch_size`` must be
    a multiple of ``micro_batch_size * dp_size``. ``workers`` threads read the steps that follow ahead, up to position
    ``end`` if given; with 0, each step is read when it is asked for. A worker's exception is raised at the step that it
    affects. A context manager, which stops them.
    """

    def __init__(
        self,
        data: TrainingData,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        workers: int = 0,
        end: int | None = None,
        document_mask: bool = False,
    ) -> None:
        assert global_batch_size % (micro_batch_size * dp_size) == 0, (global_batch_size, micro_batch_size, dp_size)
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self.data, self.document_mask = data, document_mask
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.samples = global_batch_size // dp_size
        self.offset = dp_rank * self.samples
        self.end = end
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="megagap-data") if workers else None
        self._ahead: dict[int, Future[Batch]] = {}
        self._epochs: tuple[int, list[int]] | None = None

    def step(self, first_sample: int) -> Batch:
        """This rank's part of the samples at positions ``first_sample … + global_batch_size``."""
        batch = self._read(first_sample) if self._pool is None else self._next(first_sample)
        self._log_epochs(first_sample)
        return batch

    def close(self) -> None:
        """Stop the workers; what they have read ahead is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, first: int) -> Batch:
        assert self._pool is not None
        wanted = [first + i * self.global_batch_size for i in range(self.workers + 1)]
        wanted = [first, *(at for at in wanted[1:] if self.end is None or at < self.end)]
        for at in self._ahead.keys() - set(wanted):
            self._ahead.pop(at).cancel()
        for at in wanted:
            if at not in self._ahead:
                self._ahead[at] = self._pool.submit(self._read, at)
        return self._ahead.pop(first).result()

    def _read(self, first_sample: int) -> Batch:
        first = first_sample + self.offset
        shape = (-1, self.micro_batch_size)
        read, sources, read_positions = self.data.read(first, self.samples, with_positions=self.document_mask)
        tokens = torch.from_numpy(read)
        positions = documents = None
        if read_positions is not None:
            positions = torch.from_numpy(read_positions).view(*shape, tokens.shape[-1])
            documents = [Documents.of(part[:, :-1]) for part in positions]
        return Batch(
            tokens.view(*shape, tokens.shape[-1]),
            torch.from_numpy(sources).view(shape),
            len(self.data.sources),
            positions,
            documents,
        )

    def _log_epochs(self, first: int) -> None:
        """Log which sources begin another epoch within the step."""
        position, before = self._epochs or (-1, [])
        if position != first:
            before = self.data.epochs(first)
        now = self.data.epochs(first + self.global_batch_size)
        for name, was, epoch in zip(self.data.names, before, now, strict=True):
            if epoch > was:
                log.info("source %s repeats: epoch %d begins", name, epoch + 1)
        self._epochs = (first + self.global_batch_size, now)
