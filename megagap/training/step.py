"""One training step, from microbatches to updated parameters."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megagap.config import Settings
from megagap.data.loader import Batch
from megagap.model.llama import LlamaStage, Watch
from megagap.observe.insight import Insight
from megagap.observe.pace import Pace
from megagap.ops.document_mask import Documents
from megagap.optim.clipping import clip_divisor
from megagap.optim.distributed import DistributedOptimizer, unobserved
from megagap.optim.gradient_hash import LocalHash, gradient_hash, hash_of, in_parts
from megagap.optim.loss_scale import NoLossScale
from megagap.optim.replicas import differing_replicas
from megagap.parallel.actions import Action, Forward
from megagap.parallel.collectives import all_reduce
from megagap.parallel.context import OwnDocuments, own_documents, own_tokens
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.parallel.mesh import Mesh
from megagap.parallel.pipeline import Boundary, execute
from megagap.parallel.placement import Placement
from megagap.parallel.program import programs_of
from megagap.timeline import Moment, Timeline, due
from megagap.training.guard import StepGuard, Verdict, accept_update


@dataclass
class TrainState:
    """All that a step reads and changes."""

    settings: Settings
    mesh: Mesh
    placement: Placement
    stages: list[LlamaStage]
    """This rank's virtual stages, by chunk."""
    optimizer: DistributedOptimizer
    timeline: Timeline
    step: int = 0
    """Steps made, including those whose update was skipped."""
    pace: Pace | None = None
    """What measures this rank's own time, if anything does."""
    programs: dict[int, list[Action]] = field(default_factory=dict)
    """This rank's actions in a step, by its number of microbatches."""
    copied: torch.cuda.Event | None = None
    """Marks on a GPU the end of a copy of the state, for a checkpoint: no update may come before it."""
    guard: StepGuard = field(init=False)
    """Decides which updates are made."""

    def __post_init__(self) -> None:
        self.guard = StepGuard(self.settings.guard, self.settings.model, self.mesh.device)

    def program(self, microbatches: int) -> list[Action]:
        """What this rank does in a step of so many microbatches: proven when it is first asked for."""
        if microbatches not in self.programs:
            programs = programs_of(self.settings.schedule, self.placement, microbatches)
            self.programs[microbatches] = programs[self.mesh.pp.rank]
        return self.programs[microbatches]

    @property
    def moment(self) -> Moment:
        """The last step made."""
        return self.timeline.at(self.step)


class HostCopy:
    """Small tensors on their way to the host, each read as a list of floats.

    On a GPU they are copied to pinned memory on the stream that computes them, behind an event: reading waits for that
    event only, not for what is queued later.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        numbers = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])
        self._event: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = numbers

    def wait(self) -> None:
        """Until the device is done with what was queued before the copy."""
        if self._event is not None:
            self._event.synchronize()

    def read(self) -> dict[str, list[float]]:
        """The numbers by name."""
        self.wait()
        parts = self._host.split(list(self._sizes.values()))
        return {name: part.tolist() for name, part in zip(self._sizes, parts, strict=True)}


@dataclass(frozen=True)
class StepResult:
    """Device tensors, the same on every rank: the host has not synchronised yet."""

    loss: Tensor
    """Cross-entropy, the mean over the valid tokens of the global batch, before the update."""
    source_losses: Tensor
    """The same for each source [sources]; NaN for one that the batch had nothing from."""
    z_loss: Tensor
    """The mean of what ``train.z_loss`` adds."""
    grad_norm: Tensor
    """Global, before clipping."""
    verdict: Verdict
    layer_norms: Tensor
    """Those of the gradients of ``StepGuard.layers`` [layers]."""
    differing: Tensor
    """For each rank [world], whether its two computations differ (1 or 0); empty where there was only one."""
    replicas: Tensor
    """For each rank [world], what :func:`differing_replicas` found; empty where they were not compared."""
    own_seconds: Tensor
    """What each rank itself took for a step measured before [world], 0 where unknown; empty in most steps."""
    gradient_hash: Tensor
    """In parts of 16 bits [4]; empty where it was not computed."""
    requests: Tensor
    """How many ranks made each request."""
    loss_scale: Tensor
    """What the loss was multiplied by for the backward pass; empty where it was not."""
    lr: float
    insight: Tensor | None = None
    """What :meth:`Insight.over_world` returned, if it was this step's turn."""
    host: HostCopy = field(init=False)
    """All of these numbers, copied to the host as soon as they are computed."""

    def __post_init__(self) -> None:
        numbers = {"loss": self.loss, "source_losses": self.source_losses, "z_loss": self.z_loss}
        numbers |= {"grad_norm": self.grad_norm, **vars(self.verdict)}
        if self.insight is not None:
            numbers["insight"] = self.insight
        copy = HostCopy(
            **numbers,
            layer_norms=self.layer_norms,
            differing=self.differing,
            replicas=self.replicas,
            own_seconds=self.own_seconds,
            gradient_hash=self.gradient_hash,
            requests=self.requests,
            loss_scale=self.loss_scale,
        )
        object.__setattr__(self, "host", copy)


class BoundStages:
    """A rank's stages bound to one step's batch, as the executor calls them: the last gives the scaled loss."""

    def __init__(
        self,
        stages: Sequence[LlamaStage],
        inputs: Tensor,
        targets: Tensor,
        scale: Tensor,
        loss_scale: NoLossScale,
        documents: Sequence[Documents] | Sequence[OwnDocuments] | None = None,
        z_loss: float = 0.0,
        watch: Watch | None = None,
    ) -> None:
        """inputs, targets: [m, b, s / cp] of this rank's tokens; scale: factor that turns a sum over tokens into a
        share of the loss; loss_scale: of the backward pass; z_loss: coefficient of each token's logsumexp²."""
        self.stages, self.inputs, self.targets, self.scale = stages, inputs, targets, scale
        self.backward_scale = loss_scale.scaled(scale)
        self.documents, self.z_loss, self.watch = documents, z_loss, watch
        self.queue = stages[0].queue
        self.length = inputs.shape[-1] * stages[0].tensor_parallel.mesh.cp.size
        """Tokens of a whole sequence."""
        self.sequence_losses = torch.zeros(inputs.shape[:2], device=inputs.device)
        """Sum of the cross-entropies over this rank's tokens of each sequence [m, b], once computed by the last virtual
        stage; elsewhere 0."""
        self.z_losses = torch.zeros(len(inputs), device=inputs.device)
        """Sum of the z-losses over this rank's tokens of each microbatch [m], likewise."""

    def compute(self, chunk: int, microbatch: int, activation: Tensor | None) -> Tensor:
        stage = self.stages[chunk]
        x = self.inputs[microbatch] if activation is None else activation
        documents = self.documents[microbatch] if self.documents else None
        y: Tensor = stage(x, self.length, documents=documents, watch=self.watch)
        if not stage.has_head:
            return y
        loss, losses, z_losses = stage.loss(y, self.targets[microbatch], self.backward_scale, self.z_loss)
        self.sequence_losses[microbatch] = losses.sum(-1)
        self.z_losses[microbatch] = z_losses.sum()
        return loss

    def own_losses(self) -> Tensor:
        """This rank's shares of the loss and the z-loss, [2]: the sums over the world are the two."""
        both = torch.stack([self.sequence_losses.sum(), self.z_losses.sum()])
        return both * self.scale * counts_loss(self.stages)


def train_step(state: TrainState, batch: Batch, poll: Callable[[], Sequence[bool]]) -> StepResult:
    """One update. ``batch``: this data rank's part, on the device.

    ``poll`` returns this rank's requests, such as to stop; they travel with the loss, so that all ranks agree on them
    at no extra cost.
    """
    mesh, optimizer, optim, guard = state.mesh, state.optimizer, state.settings.optim, state.guard
    loss_scale = optimizer.loss_scale
    state.step += 1
    moment = state.moment
    for stage in state.stages:
        stage.use_rope_theta(moment.rope_theta)
    if state.step == state.timeline.first_step(moment.phase):
        guard.begin_phase()
    program, nothing = state.program(len(batch.tokens)), torch.zeros(0, device=mesh.device)
    insight = None
    if due(state.settings.run.insight_every, state.step):
        insight = Insight(state.settings.model, mesh.device, loss_scale)
    watch = insight.layer_output if insight else None
    if guard.is_repeated(state.step):
        work, differs = compute_gradients_twice(state, batch, program, watch)
    else:
        work, differs = compute_gradients(state, batch, program, watch), nothing

    # Filled on the device: a copy from the host would wait for it.
    own_requests = torch.stack([torch.full_like(work.scale, float(asked)) for asked in poll()])
    own_norms, by_source = guard.squared_norms(optimizer.store), losses_by_source(work, batch)
    compared = differing_replicas(optimizer.store) if guard.are_replicas_compared(state.step) else nothing
    own_seconds = nothing if state.pace is None else state.pace.share(state.step)
    (loss, z_loss), squared_norms, by_source, requests, differing, replicas, seconds = _sum_over_world(
        mesh, work.own_losses(), own_norms, by_source, own_requests, differs, compared, own_seconds
    )
    norm = loss_scale.unscaled(squared_norms.sum().sqrt())
    verdict = guard.judge(loss, norm, differing)
    hashed = guard.is_hashed(state.step)
    digest = in_parts(all_reduce(gradient_hash(optimizer.store), mesh.world)) if hashed else nothing
    updating = insight.updating if insight else unobserved
    divisor = loss_scale.scaled(clip_divisor(norm, optim.clip_grad))
    if state.copied is not None:
        torch.cuda.current_stream(mesh.device).wait_event(state.copied)
        state.copied = None
    with mesh.spans.span("update"):
        optimizer.step(moment.lr, divisor, verdict.accepted, updating)
    result = StepResult(
        loss=loss,
        source_losses=by_source[0] / by_source[1],
        z_loss=z_loss,
        grad_norm=norm,
        verdict=verdict,
        layer_norms=loss_scale.unscaled(squared_norms[: len(guard.layers)].sqrt()),
        differing=differing,
        replicas=replicas,
        own_seconds=seconds,
        gradient_hash=digest,
        requests=requests,
        loss_scale=nothing if loss_scale.value is None else loss_scale.value.clone(),
        lr=moment.lr,
        insight=insight.over_world(mesh) if insight else None,
    )
    loss_scale.update(norm)
    return result


def compute_gradients(
    state: TrainState,
    batch: Batch,
    program: list[Action],
    watch: Watch | None = None,
    loss_scale: NoLossScale | None = None,
) -> BoundStages:
    """Fill the optimizer's gradients, of the mean loss over the batch's targets on all data ranks, times
    ``loss_scale``: by default the optimizer's."""
    mesh, store = state.mesh, state.optimizer.store
    inputs, targets = batch.tokens[..., :-1], targets_of(batch.tokens, batch.positions)
    inputs, targets = (own_tokens(part, mesh.cp) for part in (inputs, targets))
    scale = 1 / count_targets(targets, mesh, all_count=batch.positions is None)
    documents = own_documents(batch.documents, mesh.cp)
    z_loss, loss_scale = state.settings.train.z_loss, loss_scale or state.optimizer.loss_scale
    work = BoundStages(state.stages, inputs, targets, scale, loss_scale, documents, z_loss, watch)
    forwards = sum(isinstance(action, Forward) for action in program)
    assert forwards == len(inputs) * state.placement.chunks, "a program of another number of microbatches"
    store.begin(len(inputs))
    execute(program, work, boundary(state.stages, inputs), state.placement, mesh)
    with mesh.spans.span("reduction_of_gradients"):
        store.finish()
    return work


def compute_gradients_twice(
    state: TrainState, batch: Batch, program: list[Action], watch: Watch | None = None
) -> tuple[BoundStages, Tensor]:
    """:func:`compute_gradients`, twice, to find silent data corruption.

    Also returns [world], fp32: 1 at this rank if its losses, or its own gradients before they are summed over data
    ranks, differ in a bit; else 0. What a rank computes wrongly also reaches those that it exchanges activations with.
    """
    mesh, found = state.mesh, []
    for heard in (mesh.spans.unheard(), nullcontext()):  # recordings have it once
        own = LocalHash(mesh.device)
        with heard, own.of(state.optimizer.store):
            work = compute_gradients(state, batch, program, watch)
        found.append(torch.stack([own.value, hash_of(work.sequence_losses.flatten())]))
    differs = torch.zeros(mesh.world.size, device=mesh.device)
    differs[mesh.world.rank] = (found[0] != found[1]).any()
    return work, differs


def _sum_over_world(mesh: Mesh, *parts: Tensor) -> list[Tensor]:
    """All parts summed over all ranks in one reduction, fp32."""
    flat = torch.cat([part.float().flatten() for part in parts])
    with mesh.spans.span("sum_of_losses_and_norms"):
        sums = all_reduce(flat, mesh.world).split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def losses_by_source(work: BoundStages, batch: Batch) -> Tensor:
    """This rank's share of [sum of the losses, number of targets] of each source: [2, sources]."""
    counts = (work.targets != IGNORED_TARGET).sum(-1, dtype=torch.float32)
    sums = torch.zeros(2, batch.source_count, device=counts.device)
    both = torch.stack([work.sequence_losses.flatten(), counts.flatten()])
    sums.index_add_(1, batch.sources.flatten(), both)
    return sums * counts_loss(work.stages)


def counts_loss(stages: Sequence[LlamaStage]) -> bool:
    """Whether this rank counts its losses in sums over the world: all tp ranks of the last virtual stage know them."""
    return any(stage.has_head for stage in stages) and stages[0].tensor_parallel.mesh.tp.rank == 0


def next_step_is_finite(state: TrainState, batch: Batch) -> bool:
    """Whether a step on the first microbatch of each data rank's ``batch`` would be accepted with the weights as they
    are; the same on every rank. Overwrites the gradients, which no update needs any more."""
    part = Batch(
        batch.tokens[:1],
        batch.sources[:1],
        batch.source_count,
        None if batch.positions is None else batch.positions[:1],
        batch.documents[:1] if batch.documents else None,
    )
    loss_scale = state.optimizer.loss_scale.cautious()
    work = compute_gradients(state, part, state.program(1), loss_scale=loss_scale)
    (loss, _), squared_norm = _sum_over_world(state.mesh, work.own_losses(), state.optimizer.store.squared_norm())
    return bool(accept_update(loss, loss_scale.unscaled(squared_norm.sqrt())))


def targets_of(tokens: Tensor, positions: Tensor | None) -> Tensor:
    """What each input should predict [.., s], of tokens [.., s + 1] at these positions: no document's first token."""
    targets = tokens[..., 1:]
    return targets if positions is None else targets.masked_fill(positions[..., 1:] == 0, IGNORED_TARGET)


def count_targets(targets: Tensor, mesh: Mesh, all_count: bool = False) -> Tensor:
    """Targets that count, over the parts of all ranks of ``data``; fp32 device scalar, at least 1.

    ``all_count``: whether all do, so that nobody needs to ask. Asking lets the first layer wait for all parameters: on
    a GPU the collectives of one group follow each other, and the gathers of the update before are under way.
    """
    if all_count:
        return torch.full((), float(targets.numel() * mesh.data.size), device=targets.device)
    return all_reduce((targets != IGNORED_TARGET).sum().float(), mesh.data).clamp(min=1)


def boundary(stages: Sequence[LlamaStage], inputs: Tensor) -> Boundary:
    """What is sent between stages for inputs [m, b, s / cp]."""
    _, batch, length = inputs.shape
    stage = stages[0]
    parallel = stage.tensor_parallel
    return Boundary((batch, parallel.sequence_part(length), stage.model.hidden_size), stage.dtype)
