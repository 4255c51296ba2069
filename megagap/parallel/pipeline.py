"""The executor: runs one stage's program of actions (``schedule.py``) over real microbatches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.parallel.mesh import Mesh
from megagap.parallel.schedule import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Message,
    Schedule,
    Transfer,
    validate,
    with_transfers,
)
from megagap.parallel.tensor import WeightGradientQueue


class Stage(Protocol):
    """One chunk of the model, as the executor sees it."""

    queue: WeightGradientQueue

    def compute(self, microbatch: int, activation: Tensor | None) -> Tensor:
        """The next stage's activation, or on the last stage the scalar to differentiate.

        ``activation`` comes from the previous stage; None on the first stage.
        """
        ...


@dataclass(frozen=True)
class Boundary:
    """What is sent between neighbouring stages: activations and their gradients have this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def plan(schedule: Schedule, mesh: Mesh, microbatches: int) -> list[Action]:
    """This rank's program under a schedule, after proving the programs of all stages together."""
    stages = mesh.pp.size
    programs = [with_transfers(list(schedule(stage, stages, microbatches)), stage, stages) for stage in range(stages)]
    validate(programs, microbatches)
    return programs[mesh.pp.rank]


def execute(
    program: Sequence[Action],
    stages: Sequence[Stage],
    boundary: Boundary,
    mesh: Mesh,
    before_last_backward: Callable[[], None] = lambda: None,
) -> None:
    """Run a program; gradients accumulate in the parameters.

    ``stages``: this rank's chunks. ``before_last_backward`` is called before the last backward action, after which
    no gradient changes any more.
    """
    backwards = [index for index, action in enumerate(program) if isinstance(action, Backward | BackwardWeight)]
    run = _Run(stages, boundary, mesh, differentiate=bool(backwards))
    for index, action in enumerate(program):
        if backwards and index == backwards[-1]:
            before_last_backward()
        run.act(action)
    run.finish_sends()


class _Run:
    """The live tensors of one execution of a program."""

    def __init__(self, stages: Sequence[Stage], boundary: Boundary, mesh: Mesh, differentiate: bool) -> None:
        self.stages, self.boundary, self.mesh, self.differentiate = stages, boundary, mesh, differentiate
        self.last = len(stages) * mesh.pp.size - 1
        self.received: dict[Message, Tensor] = {}
        self.to_send: dict[Message, Tensor] = {}
        self.live: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.waiting_weights: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.sends: list[tuple[dist.Work, Tensor]] = []

    def act(self, action: Action) -> None:
        match action:
            case Transfer():
                self.transfer(action)
            case Forward(microbatch, chunk):
                self.forward(microbatch, chunk)
            case Backward(microbatch, chunk):
                self.backward(microbatch, chunk)
            case BackwardInput(microbatch, chunk):
                with self.stages[chunk].queue.deferring() as jobs:
                    self.backward(microbatch, chunk)
                self.waiting_weights[microbatch, chunk] = jobs
            case BackwardWeight(microbatch, chunk):
                for job in self.waiting_weights.pop((microbatch, chunk)):
                    job()

    def forward(self, microbatch: int, chunk: int) -> None:
        here = chunk * self.mesh.pp.size + self.mesh.pp.rank
        activation = None if here == 0 else self.received.pop(Message("activation", microbatch, here))
        if activation is not None and self.differentiate:
            activation.requires_grad_()
        output = self.stages[chunk].compute(microbatch, activation)
        if here != self.last:
            self.to_send[Message("activation", microbatch, here + 1)] = output.detach()
        if self.differentiate:
            self.live[microbatch, chunk] = (activation, output)

    def backward(self, microbatch: int, chunk: int) -> None:
        here = chunk * self.mesh.pp.size + self.mesh.pp.rank
        activation, output = self.live.pop((microbatch, chunk))
        gradient = None if here == self.last else self.received.pop(Message("gradient", microbatch, here + 1))
        torch.autograd.backward(output, gradient)
        if activation is not None:
            assert activation.grad is not None
            self.to_send[Message("gradient", microbatch, here)] = activation.grad

    def transfer(self, transfer: Transfer) -> None:
        """Post the whole batch and wait for the receives; sends overlap with the next compute action."""
        self.finish_sends()  # the validated model: a batch ends before the next is posted
        pp = self.mesh.pp
        operations = []
        for peer, message in transfer.sends:
            tensor = self.to_send.pop(message).contiguous()
            operations.append(dist.P2POp(dist.isend, tensor, pp.ranks[peer], pp.group))
        for peer, message in transfer.receives:
            tensor = torch.empty(self.boundary.shape, dtype=self.boundary.dtype, device=self.mesh.device)
            self.received[message] = tensor
            operations.append(dist.P2POp(dist.irecv, tensor, pp.ranks[peer], pp.group))
        works = dist.batch_isend_irecv(operations)
        tensors = [operation.tensor for operation in operations]
        # gloo returns one Work per operation, NCCL one for the batch (and its wait does not block the host).
        sends = len(transfer.sends) if len(works) == len(operations) else 0
        for work in works[sends:]:
            work.wait()
        self.sends = list(zip(works[:sends], tensors[:sends], strict=True))

    def finish_sends(self) -> None:
        for work, _ in self.sends:
            work.wait()
        self.sends = []
