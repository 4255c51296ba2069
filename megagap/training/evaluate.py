"""Loss on the fixed held-out windows of each source."""

import torch
import torch.nn.functional as F

from megagap.data.validation import ValidationData
from megagap.ops.documents import Documents
from megagap.parallel.collectives import all_reduce
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.pipeline import execute, plan
from megagap.parallel.schedule import forward_only
from megagap.training.step import StageOnBatch, TrainState, border, count_targets, targets_of


@torch.no_grad()
def evaluate(state: TrainState, data: ValidationData) -> dict[str, float]:
    """Mean loss over all tokens of each source's windows, by the source's name; the same on every rank."""
    state.optimizer.wait_for_parameters()
    return {name: _source_loss(state, data, name) for name in data.windows}


def _source_loss(state: TrainState, data: ValidationData, name: str) -> float:
    """Each data rank takes a contiguous part of the windows; where they do not divide, ignored ones fill up."""
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
        F.pad(part, missing, value=filler).view(microbatches, micro, length).to(mesh.device)
        for part, filler in ((tokens[:, :-1], 0), (targets_of(tokens, positions), IGNORED_TARGET))
    )
    documents = None
    if positions is not None:
        padded = F.pad(positions[:, :-1], missing).view(microbatches, micro, length)
        documents = [Documents.of(part).to(mesh.device) for part in padded]
    scale = 1 / count_targets(targets, mesh)
    program = plan(forward_only, mesh, microbatches)
    work = StageOnBatch(state.stage, inputs, targets, scale, documents)
    execute(program, [work], border(state.stage, inputs), mesh)
    return float(all_reduce(work.own_loss(), mesh.world))
