"""The executor: runs one stage's program of actions (``program.py``) over real microbatches."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megagap.parallel.actions import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Hop,
    Message,
    Transfer,
)
from megagap.parallel.mesh import Mesh
from megagap.parallel.placement import Placement
from megagap.parallel.program import flow
from megagap.parallel.tensor import WeightGradientQueue

MOST_BATCHES = 2
"""Batches of transfers under way on a GPU at most, whose sent tensors are kept. With one, computation would wait for
what the batch before receives, be it needed much later: NCCL's batches have one Work for both directions, while gloo
has one for each tensor.
"""


class Stages(Protocol):
    """This rank's chunks of the model, as the executor sees them."""

    queue: WeightGradientQueue

    def compute(self, chunk: int, microbatch: int, activation: Tensor | None) -> Tensor:
        """The next virtual stage's activation, or of the last one the scalar to differentiate.

        ``activation`` comes from the previous virtual stage; None for the first.
        """
        ...


@dataclass(frozen=True)
class Boundary:
    """What is sent between neighbouring stages: activations and their gradients have this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def execute(
    program: Sequence[Action],
    stages: Stages,
    boundary: Boundary,
    placement: Placement,
    mesh: Mesh,
) -> None:
    """Run this rank's program; gradients accumulate in the parameters.

    Each action is a span of the mesh under its name, with ``microbatch`` and ``chunk``; what it waits for before is a
    span ``wait`` of its own.
    """
    differentiate = any(isinstance(action, Backward | BackwardWeight) for action in program)
    run = _Run(stages, boundary, placement, mesh, differentiate)
    for action in program:
        run.act(action)
    run.finish_sends(0)


class _Run:
    """The live tensors of one execution of a program."""

    def __init__(
        self,
        stages: Stages,
        boundary: Boundary,
        placement: Placement,
        mesh: Mesh,
        differentiate: bool,
    ) -> None:
        self.stages, self.boundary, self.placement, self.mesh = stages, boundary, placement, mesh
        self.differentiate, self.span, self.wait = differentiate, mesh.spans.span, mesh.spans.wait
        self.available: dict[Message, Tensor] = {}
        """Received from other ranks, or made by a neighbouring chunk of this one."""
        self.arriving: dict[Message, dist.Work] = {}
        """What has to be waited for before a received tensor is read."""
        self.to_send: dict[Message, Tensor] = {}
        self.live: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """By microbatch and chunk, from forward to backward: what came in and what went out."""
        self.waiting_weights: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.unfinished = MOST_BATCHES if mesh.device.type == "cuda" else 1
        self.sends: deque[tuple[list[dist.Work], list[Tensor], int]] = deque()
        """Of each batch that may still be under way, and to whom; the tensors must live until it ends."""

    def act(self, action: Action) -> None:
        match action:
            case Transfer():
                self.transfer(action)
            case Forward():
                self.forward(action)
            case Backward():
                self.backward(action)
            case BackwardInput(microbatch, chunk):
                with self.stages.queue.deferring() as jobs:
                    self.backward(action)
                self.waiting_weights[microbatch, chunk] = jobs
            case BackwardWeight(microbatch, chunk):
                # As within a backward pass. Each job is dropped with what it keeps once it is done.
                waiting = deque(self.waiting_weights.pop((microbatch, chunk)))
                with self.span("backward_weight", microbatch=microbatch, chunk=chunk), torch.no_grad():
                    while waiting:
                        waiting.popleft()()

    def forward(self, action: Forward) -> None:
        needed, made = flow(action, self.mesh.pp.rank, self.placement)
        activation = self.take(needed)
        if activation is not None and self.differentiate:
            activation.requires_grad_()
        with self.span("forward", microbatch=action.microbatch, chunk=action.chunk):
            output = self.stages.compute(action.chunk, action.microbatch, activation)
        if made is not None:
            self.hand_on(made, output.detach())
        if self.differentiate:
            self.live[action.microbatch, action.chunk] = (activation, output)

    def backward(self, action: Backward | BackwardInput) -> None:
        needed, made = flow(action, self.mesh.pp.rank, self.placement)
        activation, output = self.live.pop((action.microbatch, action.chunk))
        gradient = self.take(needed)
        name = "backward" if isinstance(action, Backward) else "backward_input"
        with self.span(name, microbatch=action.microbatch, chunk=action.chunk):
            torch.autograd.backward(output, gradient)
        if made is not None:
            assert activation is not None and activation.grad is not None
            self.hand_on(made, activation.grad)

    def take(self, needed: Hop | None) -> Tensor | None:
        if needed is None:
            return None
        if (work := self.arriving.pop(needed.message, None)) is not None:
            with self.wait("wait", peer=self.mesh.pp.ranks[needed.peer]):
                work.wait()
        return self.available.pop(needed.message)

    def hand_on(self, made: Hop, tensor: Tensor) -> None:
        (self.available if made.peer == self.mesh.pp.rank else self.to_send)[made.message] = tensor

    def transfer(self, transfer: Transfer) -> None:
        """Post the whole batch; what it receives is waited for when it is needed."""
        self.finish_sends(self.unfinished - 1)
        pp = self.mesh.pp
        operations = []
        for peer, message in transfer.sends:
            tensor = self.to_send.pop(message).contiguous()
            operations.append(dist.P2POp(dist.isend, tensor, pp.ranks[peer], pp.group))
        for peer, message in transfer.receives:
            tensor = torch.empty(self.boundary.shape, dtype=self.boundary.dtype, device=self.mesh.device)
            self.available[message] = tensor
            operations.append(dist.P2POp(dist.irecv, tensor, pp.ranks[peer], pp.group))
        works = dist.batch_isend_irecv(operations)
        # gloo returns one Work per operation, NCCL one for the batch (and its wait does not block the host).
        works *= len(operations) // len(works)
        sends = len(transfer.sends)
        self.arriving |= {message: work for (_, message), work in zip(transfer.receives, works[sends:], strict=True)}
        if sends:
            tensors = [operation.tensor for operation in operations[:sends]]
            self.sends.append((works[:sends], tensors, pp.ranks[transfer.sends[0][0]]))

    def finish_sends(self, leave: int) -> None:
        """Drop the batches that have ended, and wait for the others, from the oldest, until ``leave`` are left."""
        while self.sends and all(work.is_completed() for work in self.sends[0][0]):
            self.sends.popleft()
        while len(self.sends) > leave:
            works, _, peer = self.sends.popleft()
            with self.wait("wait", peer=peer):
                for work in works:
                    work.wait()
