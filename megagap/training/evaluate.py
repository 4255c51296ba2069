"""Loss on the fixed held-out windows of each source."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megagap.data.validation import ValidationData
from megagap.ops.document_mask import Documents
from megagap.optim.loss_scale import NoLossScale
from megagap.parallel.collectives import all_reduce
from megagap.parallel.context import own_documents, own_tokens
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.pipeline import execute
from megagap.parallel.program import programs_of
from megagap.parallel.schedule import EVALUATION
from megagap.training.step import BoundStages, TrainState, boundary, count_targets, counts_loss, targets_of

MICROBATCHES_PER_STAGE = 8
"""Microbatches computed between two looks for a stop, times the pipeline's stages: the pipeline runs empty there."""


class EvaluationStoppedError(Exception):
    """Some rank was asked to stop during an evaluation, whose losses are incomplete."""


@torch.no_grad()
def evaluate(
    state: TrainState, data: ValidationData, is_stop_asked: Callable[[], bool] | None = None
) -> dict[str, float]:
    """Mean loss over all tokens of each source's windows, by the source's name; the same on every rank.

    ``is_stop_asked``: whether this rank is asked to stop, looked at now and then; None: nobody asks.
    Raises :class:`EvaluationStoppedError`, on every rank, once any rank is.
    """

    def pause() -> None:
        if is_stop_asked is not None:
            asked = torch.tensor(float(is_stop_asked()), device=state.mesh.device)
            if all_reduce(asked, state.mesh.world) > 0:
                raise EvaluationStoppedError

    state.optimizer.store.wait_for_parameters()
    for stage in state.stages:
        stage.use_rope_theta(state.moment.rope_theta)
    return {name: _source_loss(state, data, name, pause) for name in data.windows}


def _source_loss(state: TrainState, data: ValidationData, name: str, pause: Callable[[], None]) -> float:
    """Each data rank takes a contiguous part of the windows; if they do not divide evenly, ignored ones fill up."""
    mesh, micro = state.mesh, state.settings.train.micro_batch_size
    windows = len(data.windows[name])
    microbatches = -(-windows // (mesh.dp.size * micro))
    first = min(mesh.dp.rank * microbatches * micro, windows)
    count = min(microbatches * micro, windows - first)
    length = state.settings.train.sequence_length

    tokens = torch.zeros(count, length + 1, dtype=torch.int64)
    if count:
        tokens = torch.from_numpy(data.batch(name, first, count))
    positions = torch.from_numpy(data.positions(name, first, count)) if state.settings.data.document_mask else None
    missing = (0, 0, 0, microbatches * micro - count)
    inputs, targets = (
        own_tokens(F.pad(part, missing, value=filler).view(microbatches, micro, length), mesh.cp).to(mesh.device)
        for part, filler in ((tokens[:, :-1], 0), (targets_of(tokens, positions), IGNORED_TARGET))
    )
    documents = None
    if positions is not None:
        padded = F.pad(positions[:, :-1], missing).view(microbatches, micro, length)
        documents = own_documents([Documents.of(part).to(mesh.device) for part in padded], mesh.cp)
    scale = 1 / count_targets(targets, mesh)
    losses = []
    for begin in range(0, microbatches, MICROBATCHES_PER_STAGE * mesh.pp.size):
        pause()
        part = slice(begin, begin + MICROBATCHES_PER_STAGE * mesh.pp.size)
        work = BoundStages(
            state.stages, inputs[part], targets[part], scale, NoLossScale(), documents[part] if documents else None
        )
        program = programs_of(EVALUATION, state.placement, len(work.inputs))[mesh.pp.rank]
        execute(program, work, boundary(state.stages, inputs), state.placement, mesh)
        losses.append(work.sequence_losses)
    own_loss = torch.cat(losses).sum() * scale * counts_loss(state.stages)
    return float(all_reduce(own_loss, mesh.world))
