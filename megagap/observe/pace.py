"""Which ranks are slow: each rank's own time for a step, without what it waits for others.

All ranks of a step end it together, so that their step times say nothing. Every ``run.slow_ranks_every`` steps one is
measured: the time from its begin to its end, less the time within spans that wait. The numbers of all ranks travel
with the sum of the losses, :data:`SHARED_AFTER` steps later, when a GPU has long passed its events and nobody waits for
them.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megagap.observe.run_directory import RunDirectory
from megagap.observe.spans import Clock
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.spans import Span
from megagap.timeline import due

SHARED_AFTER = 3
"""Steps from one that is measured to the one in which ranks exchange what they took."""
SLOWER = 1.25
"""Times the median from which on a rank is slow."""
LEAST_SECONDS = 0.02
"""Above the median, from which on a difference counts: below, it is noise."""
IN_A_ROW = 3
"""Measurements after which a slow rank is named."""

log = logging.getLogger(__name__)


class Pace:
    """Measures this rank's own time; a :class:`megagap.parallel.spans.Listener`."""

    def __init__(self, every: int, mesh: Mesh, clock: Clock) -> None:
        """``every``: steps between those measured."""
        self.every, self.mesh, self._clock = every, mesh, clock
        self._marks: list[Any] = []
        """Of the step that is being measured: its begin, begin and end of each wait."""
        self._measured: list[Any] = []
        """Of the last one that was, with its end."""
        self._is_measuring, self._depth = False, 0

    def begin(self, span: Span) -> None:
        if span.name == "step" and due(self.every, span.spans.step):
            self._is_measuring, self._depth, self._marks = True, 0, [self._clock.mark()]
        elif self._is_measuring and span.waits:
            self._depth += 1
            if self._depth == 1:
                self._marks.append(self._clock.mark())

    def end(self, span: Span) -> None:
        if not self._is_measuring:
            return
        if span.name == "step":
            self._measured = [*self._marks, self._clock.mark()]
            self._is_measuring = False
        elif span.waits:
            self._depth -= 1
            if self._depth == 0:
                self._marks.append(self._clock.mark())

    def share(self, step: int) -> Tensor:
        """This rank's seconds at its place, fp32 [world], if ``step`` is one in which they are exchanged; else [0]."""
        if step <= SHARED_AFTER or not due(self.every, step - SHARED_AFTER):
            return torch.zeros(0, device=self.mesh.device)
        shared = torch.zeros(self.mesh.world.size, device=self.mesh.device)
        if self._measured and all(map(self._clock.has_passed, self._measured)):
            seconds = [self._clock.seconds(mark) for mark in self._measured]
            own = sum(end - begin for begin, end in zip(seconds[::2], seconds[1::2], strict=True))
            shared[self.mesh.world.rank] = own
        self._measured = []
        return shared


class SlowRanks:
    """Names ranks that are slower than others again and again."""

    def __init__(self, layout: Layout, run: RunDirectory) -> None:
        self.run = run
        self._peers: dict[int, list[int]] = defaultdict(list)
        """Ranks that have the same to do, by pipeline stage."""
        for rank in range(layout.world_size):
            self._peers[layout.coordinates(rank)["pp"]].append(rank)
        self._times: Counter[int] = Counter()
        """How often each rank was slow in a row."""

    def judge(self, step: int, seconds: Sequence[float]) -> dict[str, float]:
        """Take what each rank took [world], 0 where unknown, as known in ``step``. Names the ranks in the log and the
        events once. Returns the median and the maximum, for the metrics."""
        for peers in self._peers.values():
            known = [seconds[rank] for rank in peers if seconds[rank] > 0]
            if not known:
                continue
            usual = _lower_median(known)
            for rank in peers:
                is_slow = seconds[rank] > max(SLOWER * usual, usual + LEAST_SECONDS)
                self._times[rank] = self._times[rank] + 1 if is_slow else 0
                if self._times[rank] == IN_A_ROW:
                    self._name(rank, step, seconds[rank], usual)
        known = [value for value in seconds if value > 0]
        return {"own_seconds": _lower_median(known), "own_seconds_max": max(known)} if known else {}

    def _name(self, rank: int, step: int, seconds: float, usual: float) -> None:
        self.run.event("slow_rank", rank=rank, seconds=seconds, median=usual)
        if self.run.is_writer:
            log.warning(
                "rank %d is slow: without waiting for others, it takes %.3f s for a step, %.1f times the median of its "
                "stage, %.3f s (%d measurements in a row, up to step %d)",
                rank,
                seconds,
                seconds / usual,
                usual,
                IN_A_ROW,
                step,
            )


def _lower_median(values: Sequence[float]) -> float:
    """Of two values the smaller, so that one of two ranks can be slow."""
    return sorted(values)[(len(values) - 1) // 2]
