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

    The rank's part is contiguous: the batch in rank order is the batch in sample order. Every batch must be a multiple
    of ``micro_batch_size * dp_size``. ``workers`` threads read the steps that follow ahead, up to the end of the run;
    with 0, each step is read when it is asked for. A worker's exception is raised at the step that it affects.
    A context manager, which stops them.
    """

    def __init__(
        self,
        data: TrainingData,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        workers: int = 0,
        document_mask: bool = False,
    ) -> None:
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        self.data, self.timeline, self.document_mask = data, data.timeline, document_mask
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="megagap-data") if workers else None
        self._ahead: dict[int, Future[Batch]] = {}
        self._epochs: tuple[int, list[int]] | None = None

    def step(self, step: int) -> Batch:
        """This rank's part of the samples of ``step``, counted from 1."""
        batch = self._read(step) if self._pool is None else self._next(step)
        self._log_epochs(step)
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

    def _next(self, step: int) -> Batch:
        assert self._pool is not None
        end = self.timeline.steps
        following = range(step + 1, step + 1 + self.workers)
        wanted = [step, *(later for later in following if end is None or later <= end)]
        for unwanted in self._ahead.keys() - set(wanted):
            self._ahead.pop(unwanted).cancel()
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(self._read, number)
        return self._ahead.pop(step).result()

    def _read(self, step: int) -> Batch:
        moment = self.timeline.at(step)
        assert moment.samples % (self.micro_batch_size * self.dp_size) == 0, moment
        count = moment.samples // self.dp_size
        first = moment.first_sample + self.dp_rank * count
        shape = (-1, self.micro_batch_size)
        read, sources, read_positions = self.data.read(first, count, with_positions=self.document_mask)
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

    def _log_epochs(self, step: int) -> None:
        """Log which sources begin another epoch within the step."""
        moment = self.timeline.at(step)
        position, before = self._epochs or (-1, [])
        if position != moment.first_sample:
            before = self.data.epochs(moment.first_sample)
        now = self.data.epochs(moment.consumed_samples)
        for name, was, epoch in zip(self.data.names, before, now, strict=True):
            if epoch > was:
                log.info("source %s repeats: epoch %d begins", name, epoch + 1)
        self._epochs = (moment.consumed_samples, now)
