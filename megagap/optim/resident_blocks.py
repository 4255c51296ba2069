"""Parameters that are there only while their block is computed (ZeRO stage 3): gathered before, freed afterwards.

The gathers follow from calls of the blocks' modules, by hooks outside of what they compute, so that a compiled or
recomputed block needs to know nothing of them:

- before a block's forward pass, its parameters are gathered, and those of the next block start on their way;
- before its backward pass, likewise, and those of the block before it;
- whatever neither of the two needs is freed.

So the parameters of two blocks are there at most. Freeing gives back a storage's memory and keeps the storage, since
autograd has kept views of it; gathering fills it with the same values again. All data ranks compute the same program,
so that they gather in the same order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megagap.parallel.shard import Block, ShardedParameter


def in_backward_pass() -> bool:
    """Whether autograd computes gradients just now: what is computed forward then, is computed again."""
    return torch._C._current_graph_task_id() != -1


class Gathered(Protocol):
    """What is gathered as one."""

    @property
    def is_resident(self) -> bool:
        """Whether it has memory, which may still be arriving."""
        ...

    def start_gather(self) -> None:
        """Start collecting it, unless it is resident."""
        ...

    def finish_gather(self) -> None:
        """Wait for it."""
        ...

    def free_values(self) -> None: ...


Some = TypeVar("Some", bound=Gathered)


class ResidentBlocks(Generic[Some]):
    """Which of ``buckets`` are resident, as the blocks of a rank's virtual stages are computed."""

    def __init__(
        self,
        buckets: Sequence[Some],
        chunks: Iterable[Sequence[Block]],
        buckets_of: Callable[[Iterable[ShardedParameter]], list[Some]],
    ) -> None:
        """``chunks``: the blocks of each virtual stage. ``buckets_of``: those that hold some parameters."""
        self.buckets = buckets
        for blocks in chunks:
            forward = [buckets_of(block.parameters) for block in blocks]
            backward = [buckets_of(block.in_backward) for block in blocks]
            for i, block in enumerate(blocks):
                before = backward[i - 1] if i else []
                following = forward[i + 1] if i + 1 < len(blocks) else []
                block.module.register_forward_pre_hook(_BeforeForward(self, forward[i], following, before))
                if backward[i]:
                    block.module.register_forward_hook(_AfterForward(self, backward[i], before))

    def use(self, now: Sequence[Some], soon: Sequence[Some]) -> None:
        """Wait until the parameters that are needed now are there; start gathering those needed next; free others."""
        needed = {id(bucket) for bucket in (*now, *soon)}
        for bucket in self.buckets:
            if bucket.is_resident and id(bucket) not in needed:
                bucket.free_values()
        for bucket in (*now, *soon):
            bucket.start_gather()
        for bucket in now:
            bucket.finish_gather()

    def free_all(self) -> None:
        """After the last backward pass of a step."""
        self.use((), ())


class _BeforeForward(Generic[Some]):
    """A module's forward pre-hook. Within a backward pass the forward is a recomputation, and the block before is
    next."""

    def __init__(
        self, blocks: ResidentBlocks[Some], own: list[Some], following: list[Some], before: list[Some]
    ) -> None:
        self._blocks, self._own, self._following, self._before = blocks, own, following, before

    def __call__(self, *_: object) -> None:
        self._blocks.use(self._own, self._before if in_backward_pass() else self._following)


class _AfterForward(Generic[Some]):
    """A module's forward hook: its backward pass begins when one of its outputs has its gradient."""

    def __init__(self, blocks: ResidentBlocks[Some], own: list[Some], before: list[Some]) -> None:
        self._blocks, self._own, self._before = blocks, own, before

    def __call__(self, module: nn.Module, inputs: Any, outputs: Tensor | tuple[Tensor, ...]) -> None:
        for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
            if output.requires_grad:
                output.register_hook(self._begin)

    def _begin(self, _: Tensor) -> None:
        self._blocks.use(self._own, self._before)
