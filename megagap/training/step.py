"""One training step, from microbatches to updated parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megagap.config import Settings
from megagap.model.llama import LlamaStage
from megagap.optim.clipping import clip_divisor
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.schedule import learning_rate
from megagap.parallel.collectives import all_reduce
from megagap.parallel.mesh import Mesh
from megagap.parallel.pipeline import Border, execute, plan
from megagap.parallel.schedule import SCHEDULES, Action
from megagap.parallel.tensor import IGNORED_TARGET
from megagap.training.guard import accept_update


@dataclass
class TrainState:
    """All that a step reads and changes."""

    settings: Settings
    mesh: Mesh
    stage: LlamaStage
    optimizer: DistributedOptimizer
    program: list[Action]
    step: int = 0
    """Updates made, skipped ones included."""

    @property
    def consumed_samples(self) -> int:
        return self.step * self.settings.train.global_batch_size

    @property
    def consumed_tokens(self) -> int:
        return self.consumed_samples * self.settings.train.sequence_length


@dataclass(frozen=True)
class StepResult:
    """Device tensors, the same on every rank: nobody has waited for the host yet."""

    loss: Tensor
    """Mean over the valid tokens of the global batch, before the update."""
    grad_norm: Tensor
    """Global, before clipping."""
    accepted: Tensor
    """Whether the update was made."""
    flags: Tensor
    """Sum over ranks of the flag given to the step."""
    lr: float


class StageOnBatch:
    """A stage with a batch in its hands, as the pipeline executor wants it: the scaled loss on the last stage."""

    def __init__(self, stage: LlamaStage, inputs: Tensor, targets: Tensor, scale: Tensor) -> None:
        """inputs, targets: [m, b, s]; scale: what a sum over tokens is multiplied with to be a share of the loss."""
        self.stage, self.inputs, self.targets, self.scale = stage, inputs, targets, scale
        self.queue = stage.queue

    def compute(self, microbatch: int, activation: Tensor | None) -> Tensor:
        x = self.inputs[microbatch] if activation is None else activation
        y = self.stage(x, self.inputs.shape[-1])
        return self.stage.loss(y, self.targets[microbatch]) * self.scale if self.stage.is_last else y


def train_step(state: TrainState, tokens: Tensor, flag: bool = False) -> StepResult:
    """One update. ``tokens``: this data rank's microbatches [m, b, s + 1] on the device.

    ``flag`` is summed over all ranks on the way (to agree on stopping, say).
    """
    mesh, optimizer, optim = state.mesh, state.optimizer, state.settings.optim
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    scale = 1 / count_targets(targets, mesh)

    optimizer.zero_gradients()
    optimizer.wait_for_parameters()
    losses = execute(
        state.program,
        [StageOnBatch(state.stage, inputs, targets, scale)],
        border(state.stage, inputs),
        mesh,
        before_last_backward=optimizer.expect_last_backward,
    )
    optimizer.finish_gradients()

    loss, squared_norm, flags = all_reduce(
        torch.stack([own_loss(losses, mesh), optimizer.squared_norm(), torch.full_like(scale, float(flag))]),
        mesh.world,
    )
    norm = squared_norm.sqrt()
    accepted = accept_update(loss, norm)
    state.step += 1
    lr = learning_rate(optim, state.settings.train.steps, state.step)
    optimizer.step(lr, clip_divisor(norm, optim.clip_grad), accepted)
    return StepResult(loss, norm, accepted, flags, lr)


def build_program(settings: Settings, mesh: Mesh) -> list[Action]:
    """This rank's actions in a training step."""
    train = settings.train
    microbatches = train.global_batch_size // (train.micro_batch_size * mesh.dp.size)
    return plan(SCHEDULES[settings.parallel.schedule], mesh, microbatches)


def count_targets(targets: Tensor, mesh: Mesh) -> Tensor:
    """Targets that count, over all data ranks; fp32 device scalar, at least 1."""
    return all_reduce((targets != IGNORED_TARGET).sum().float(), mesh.data).clamp(min=1)


def border(stage: LlamaStage, inputs: Tensor) -> Border:
    """What crosses between stages for inputs [m, b, s]."""
    _, batch, length = inputs.shape
    parallel = stage.tensor_parallel
    return Border((batch, parallel.sequence_part(length), stage.model.hidden_size), parallel.dtype)


def own_loss(losses: list[Tensor], mesh: Mesh) -> Tensor:
    """This rank's share of the loss: summed over the world it is whole. All tp ranks know it, the first one tells."""
    if not losses or mesh.tp.rank != 0:
        return torch.zeros((), device=mesh.device)
    return torch.stack(losses).sum()
