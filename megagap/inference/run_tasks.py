"""Tasks evaluated within a run, by all its ranks in their layout: no process needs a whole model.

The texts are encoded once, at the start, by rank 0, and sent to the others, so that all ranks compute the same. Each
context with its continuation is a row of its own. Rows of similar length make up a *part*: microbatches of one shape,
as many on every data rank, whose forward passes are those of validation. A continuation's likelihood is the sum of the
losses of its tokens, whichever ranks have them.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from typing import cast

import torch
from torch import Tensor

from megagap.checkpoint.agreement import raised_by_all
from megagap.config import Settings
from megagap.errors import DataError, counted
from megagap.files import require_fetched, require_regular
from megagap.inference.continuations import Row, Score, TextEncoder, padded
from megagap.inference.likeliest import count_misses
from megagap.inference.tasks import Task, read_tasks, require_no_faults, task_numbers
from megagap.model.llama import LlamaStage
from megagap.parallel.collectives import all_reduce
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.context import own_tokens
from megagap.parallel.layout import sequence_unit
from megagap.parallel.mesh import Mesh
from megagap.tokenizer import Tokenizer, load_tokenizer
from megagap.training.evaluate import ForwardPasses
from megagap.training.step import TrainState, counts_loss

log = logging.getLogger(__name__)

ROUNDED_TO = 32
"""Rows are padded to a multiple of so many tokens: few shapes, little padding."""

MOST_ROWS = 16
"""Of a microbatch: under sequence parallelism each is gathered by a collective of its own."""


@dataclass(frozen=True)
class TaskRows:
    """A run's tasks; without any, nothing is evaluated."""

    tasks: Sequence[Task] = ()
    rows: Sequence[Row] = ()
    """Of all texts, task by task."""

    def numbers(self, scores: Sequence[Score]) -> dict[str, float]:
        """What the run records of the scores of all rows."""
        found: dict[str, float] = {}
        at = 0
        for task in self.tasks:
            found |= task_numbers(task, scores[at : at + task.texts])
            at += task.texts
        return found


# ------------------------------------------------------------------------------------------------------------- reading


def open_run_tasks(settings: Settings, mesh: Mesh) -> TaskRows:
    """What the settings ask to be evaluated, the same on every rank. Collective.

    Raises :class:`DataError`, on every rank, naming everything in the files that cannot be used.
    """
    if not settings.data.tasks:
        return TaskRows()
    if not settings.train.evaluate_tasks_every and not settings.train.evaluate_first:
        log.warning("data.tasks is given, but train.evaluate_tasks_every = 0: they are never evaluated")
        return TaskRows()
    communicator, opened = DistributedCommunicator(mesh), TaskRows()
    with raised_by_all(communicator):
        if mesh.world.rank == 0:
            opened = encode_tasks(settings)
    return cast(TaskRows, communicator.broadcast(opened))


def encode_tasks(settings: Settings) -> TaskRows:
    """Contexts that are too long for ``train.sequence_length`` lose their beginning, with a warning.

    Raises :class:`DataError` naming all texts that cannot be used.
    """
    _require_files(settings.data.tasks)
    tasks = read_tasks(settings.data.tasks)
    encoder = TextEncoder(load_tokenizer(settings.data.tokenizer))
    rows: list[Row] = []
    faults: list[str] = []
    longest, cut = settings.train.sequence_length, 0
    for task in tasks:
        for place, context, text in task.asked_at():
            try:
                one = encoder.continuation(context, text)
            except DataError as error:
                faults.append(f"{place}: {error.args[0]}")
                continue
            row = Row.of(one, longest)
            faults += (f"{place}: {fault}" for fault in _faults(row, text, settings, encoder.tokenizer))
            cut += len(row.tokens) < len(one.context) + len(one.tokens)
            rows.append(row)
    require_no_faults(faults)
    if cut:
        cause, positions = f"train.sequence_length = {longest}", settings.model.max_position_embeddings
        if positions > longest:
            cause += f"; megagap evaluate has {positions} positions, and may score them otherwise"
        log.warning("contexts of %s of data.tasks lose their beginning: %s", counted(cut, "text"), cause)
    return TaskRows(tasks, rows)


def _require_files(paths: Sequence[str]) -> None:
    """A restart reads them again, so pipes will not do."""
    faults: list[str] = []
    for path in paths:
        try:
            require_regular(path)
            require_fetched(path)
        except DataError as error:
            faults.append(error.args[0])
    require_no_faults(faults)


def _faults(row: Row, text: str, settings: Settings, tokenizer: Tokenizer) -> Iterator[str]:
    longest, vocabulary = settings.train.sequence_length, settings.model.vocab_size
    shown = f"{text.strip()[:40]!r}"
    if not row.scored:
        yield f"{shown} has no tokens in the tokenizer {tokenizer.spec}"
    elif row.scored > longest:
        yield f"{shown}… has {row.scored:,} tokens, more than train.sequence_length = {longest:,}; give shorter texts"
    elif (highest := max(row.tokens)) >= vocabulary:
        yield f"{shown} has the token id {highest:,}, and model.vocab_size is {vocabulary:,}; is data.tokenizer right?"


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Part:
    """Rows of similar length, computed as microbatches of one shape."""

    rows: Sequence[int]
    """Their numbers."""
    length: int
    batch: int
    microbatches: int
    """Of each data rank."""

    def of_rank(self, rank: int) -> Sequence[int]:
        """A data rank's own rows: those that it has fewer of than others are padding."""
        share = self.batch * self.microbatches
        return self.rows[rank * share : (rank + 1) * share]


def parts_of(
    lengths: Sequence[int], longest: int, unit: int, batch_tokens: int, most_microbatches: int, ranks: int
) -> list[Part]:
    """Parts of rows of these ``lengths``, none above ``longest``, for so many data ranks; long ones first.

    ``unit``: what padded lengths are a multiple of, as ``longest`` is. A row takes more than half of its part's length,
    but for the shortest. ``batch_tokens``: of a microbatch, unless a single row has more.
    """
    step = lcm(unit, ROUNDED_TO)
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts: list[Part] = []
    while left:
        length = min(-(-lengths[left[0]] // step) * step, longest)
        fitting = sum(2 * lengths[i] > length or length <= step for i in left)
        batch = min(max(batch_tokens // length, 1), MOST_ROWS)
        taken, left = left[: (count := min(fitting, ranks * most_microbatches * batch))], left[count:]
        share = -(-len(taken) // ranks)
        batch = min(batch, share)
        parts.append(Part(taken, length, batch, -(-share // batch)))
    return parts


@torch.no_grad()
def score_rows(state: TrainState, rows: Sequence[Row], is_stop_asked: Callable[[], bool] | None = None) -> list[Score]:
    """In the order of ``rows``, the same on every rank. Not finite where the model's outputs are not.

    ``is_stop_asked``: whether this rank is asked to stop, looked at now and then; None: nobody asks.
    Raises :class:`EvaluationStoppedError`, on every rank, once any rank is.
    """
    mesh, parallel, train = state.mesh, state.settings.parallel, state.settings.train
    passes = ForwardPasses(state, is_stop_asked)
    parts = parts_of(
        [row.length for row in rows],
        train.sequence_length,
        sequence_unit(parallel.cp, parallel.tp, bool(parallel.sequence_parallel)),
        train.micro_batch_size * train.sequence_length,
        passes.most_microbatches,
        mesh.dp.size,
    )
    sums = torch.zeros(2, len(rows), dtype=torch.float64, device=mesh.device)
    for part in parts:
        own = part.of_rank(mesh.dp.rank)
        shape = part.microbatches, part.batch, part.length
        inputs, targets = (
            own_tokens(whole.view(shape), mesh.cp).to(mesh.device)
            for whole in padded([rows[i] for i in own], part.microbatches * part.batch, part.length)
        )
        work = ScoringStages(state.stages, inputs, targets)
        passes.compute(work, inputs)
        sums[:, own] = work.sums.flatten(1)[:, : len(own)] * counts_loss(state.stages)
    nats, misses = all_reduce(sums, mesh.world).tolist()
    return [Score(nats[i], not misses[i], row.scored) for i, row in enumerate(rows)]


class ScoringStages:
    """A rank's stages bound to rows that are scored, as the executor calls them."""

    def __init__(self, stages: Sequence[LlamaStage], inputs: Tensor, targets: Tensor) -> None:
        """inputs, targets: [m, b, s / cp] of this rank's tokens."""
        self.stages, self.inputs, self.targets = stages, inputs, targets
        self.queue = stages[0].queue
        self.length = inputs.shape[-1] * stages[0].tensor_parallel.mesh.cp.size
        """Tokens of a whole row."""
        self.sums = torch.zeros(2, *inputs.shape[:2], dtype=torch.float64, device=inputs.device)
        """Of this rank's tokens of each row [2, m, b], once computed by the last virtual stage: negative
        log-likelihood, and how many are not the likeliest one."""

    def compute(self, chunk: int, microbatch: int, activation: Tensor | None) -> Tensor:
        stage = self.stages[chunk]
        y: Tensor = stage(self.inputs[microbatch] if activation is None else activation, self.length)
        if stage.has_head:
            targets = self.targets[microbatch]
            _, losses, _ = stage.loss(y, targets, torch.ones((), device=y.device))
            self.sums[:, microbatch] = torch.stack([losses.double().sum(1), count_misses(stage, y, targets).double()])
        return y
