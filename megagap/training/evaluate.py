"""Loss on the fixed held-out windows of each source, and the forward passes of any evaluation within a run."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megagap.data.validation import ValidationData
from megagap.ops.document_mask import Documents
from megagap.optim.loss_scale import NoLossScale
from megagap.parallel.collectives import all_reduce
from megagap.parallel.context import own_documents, own_tokens
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.pipeline import Stages, execute
from megagap.parallel.program import programs_of
from megagap.parallel.schedule import EVALUATION
from megagap.training.step import BoundStages, TrainState, boundary, count_targets, counts_loss, targets_of

MICROBATCHES_PER_STAGE = 8
"""Microbatches computed between two looks for a stop, times the pipeline's stages: the pipeline runs empty there."""


class EvaluationStoppedError(Exception):
    """Some rank was asked to stop during an evaluation, whose losses are incomplete."""


class ForwardPasses:
    """Forward passes of a run's stages with the weights as they are, in the pipeline's evaluation schedule."""

    def __init__(self, state: TrainState, is_stop_asked: Callable[[], bool] | None = None) -> None:
        """``is_stop_asked``: whether this rank is asked to stop; None: nobody asks."""
        self.state, self._is_stop_asked = state, is_stop_asked
        self.most_microbatches = MICROBATCHES_PER_STAGE * state.mesh.pp.size
        """That should be computed between two looks for a stop."""
        state.optimizer.store.wait_for_parameters()
        for stage in state.stages:
            stage.use_rope_theta(state.moment.rope_theta)

    def compute(self, work: Stages, inputs: Tensor) -> None:
        """``work`` of the microbatches ``inputs`` [m, b, s / cp], of which there are as many on every data rank.

        Raises :class:`EvaluationStoppedError` instead, on every rank, once any rank is asked to stop.
        """
        state, mesh = self.state, self.state.mesh
        if self._is_stop_asked is not None:
            asked = torch.tensor(float(self._is_stop_asked()), device=mesh.device)
            if all_reduce(asked, mesh.world) > 0:
                raise EvaluationStoppedError
        program = programs_of(EVALUATION, state.placement, len(inputs))[mesh.pp.rank]
        execute(program, work, boundary(state.stages, inputs), state.placement, mesh)


@torch.no_grad()
def evaluate(
    state: TrainState, data: ValidationData, is_stop_asked: Callable[[], bool] | None = None
) -> dict[str, float]:
    """Mean loss over all tokens of each source's windows, by the source's name; the same on every rank.

    ``is_stop_asked``: whether this rank is asked to stop, looked at now and then; None: nobody asks.
    Raises :class:`EvaluationStoppedError`, on every rank, once any rank is.
    """
    passes = ForwardPasses(state, is_stop_asked)
    return {name: _source_loss(passes, data, name) for name in data.windows}


def _source_loss(passes: ForwardPasses, data: ValidationData, name: str) -> float:
    """Each data rank takes a contiguous part of the windows; if they do not divide evenly, ignored ones fill up."""
    state = passes.state
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
    for begin in range(0, microbatches, passes.most_microbatches):
        part = slice(begin, begin + passes.most_microbatches)
        own = documents[part] if documents else None
        work = BoundStages(state.stages, inputs[part], targets[part], scale, NoLossScale(), own)
        passes.compute(work, work.inputs)
        losses.append(work.sequence_losses)
    own_loss = torch.cat(losses).sum() * scale * counts_loss(state.stages)
    return float(all_reduce(own_loss, mesh.world))
