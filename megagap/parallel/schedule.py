"""Pipeline schedules as data: what each pipeline rank computes, in order.

A schedule lists compute only: ``program.py`` puts the transfers between, and proves the result before ``pipeline.py``
executes it. ``megagap draw-schedule`` draws each; docs/schedules.md compares them.

1F1B on three stages with four microbatches, in time (F forward, B backward, which takes twice as long)::

    stage 0  F0 F1|F2             B0--- F3 B1---|   B2---    B3---
    stage 1     F0|F1       B0--- F2 B1--- F3 B2---|   B3---
    stage 2        F0 B0--- F1 B1--- F2 B2--- F3 B3---

Bars separate warm-up, steady phase and cool-down; the last stage has the steady phase only.

To add a schedule, write such a function and add it to :data:`SCHEDULES`, with the bound that it keeps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise

from megagap.parallel.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward
from megagap.parallel.placement import Placement

Order = Callable[[int, int, int, int], Iterator[Compute]]
"""What a stage computes, in order: (stage, stages, chunks, microbatches) -> actions.

A stage is here all that one pipeline rank computes: ``chunks`` virtual stages of the model.
"""

Bound = Callable[[int, int, int, int], int]
"""A number that depends on (stage, stages, chunks, microbatches)."""

ONE = range(1, 2)
ANY = range(1, 2**60)
"""Numbers of chunks that a schedule may support."""


def all_activations(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """The bound of a schedule that keeps everything: every microbatch on every chunk."""
    return chunks * microbatches


@dataclass(frozen=True)
class Schedule:
    """An order of actions, what it is for, and what it promises."""

    order: Order
    live: Bound = all_activations
    """How many activations a stage keeps at most, as ``program.peak_live_activations`` counts them: this is proven."""
    chunks: range = ONE
    """The numbers of chunks per stage that it supports."""
    default_chunks: int = 1
    """How many it has where none is asked for."""
    place: Callable[[Sequence[int], int], Placement] = Placement.loop
    """Where its virtual stages are: (layers of each, chunks) -> placement."""

    def __call__(self, stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
        """The stage's actions."""
        return self.order(stage, stages, chunks, microbatches)


def gpipe(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """All forwards, then all backwards (Huang et al. 2019). All microbatches' activations are live at once."""
    yield from forward_only(stage, stages, chunks, microbatches)
    for group in _groups(stages, microbatches):
        yield from (Backward(i, chunk) for chunk in reversed(range(chunks)) for i in group)


def one_forward_one_backward(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """1F1B (PipeDream-flush; Narayanan et al. 2021, section 2.2). At most ``stages - stage`` live activations."""
    warmup = min(stages - stage - 1, microbatches)
    forwards, backwards = count(), count()
    # Warm-up: until this stage's first microbatch has passed all stages after it.
    yield from (Forward(next(forwards)) for _ in range(warmup))
    # Steady: a backward frees what the next forward keeps.
    for _ in range(microbatches - warmup):
        yield Forward(next(forwards))
        yield Backward(next(backwards))
    # Cool-down: the backwards of as many microbatches as the warm-up had.
    yield from (Backward(next(backwards)) for _ in range(warmup))


def _1f1b_live(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    return min(stages - stage, microbatches)


def interleaved(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """Interleaved 1F1B (Narayanan et al. 2021, section 2.2), for any number of microbatches; with one chunk it is 1F1B.

    Groups of microbatches go around the stages once per chunk, so that the pipeline fills with a chunk's time instead
    of a whole stage's.
    """
    if chunks == 1:
        yield from one_forward_one_backward(stage, stages, chunks, microbatches)
        return
    groups = _groups(stages, microbatches)
    forwards = [Forward(i, chunk) for group in groups for chunk in range(chunks) for i in group]
    backwards = [Backward(i, chunk) for group in groups for chunk in reversed(range(chunks)) for i in group]
    warmup = min(_interleaved_warmup(stage, stages, chunks, microbatches), len(forwards))
    yield from forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warmup :]


def _interleaved_warmup(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """Until the first group has passed all chunks but the last, and its first microbatch is back from the end: two more
    forwards for each stage after this one, for a backward takes twice as long."""
    return (chunks - 1) * len(_groups(stages, microbatches)[0]) + 2 * (stages - stage - 1)


def _interleaved_live(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    if chunks == 1:
        return _1f1b_live(stage, stages, chunks, microbatches)
    return min(_interleaved_warmup(stage, stages, chunks, microbatches) + 1, chunks * microbatches)


def zero_bubble_h1(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """ZB-H1 (Qi et al. 2023, section 2.2): 1F1B that defers weight gradients, and fills the cool-down with them.

    Stage i computes a weight gradient i microbatches late: all stages then keep as many activations as the first one
    in 1F1B. It hands no gradient on, so it has no reason to split its backwards.
    """
    warmup = min(stages - stage - 1, microbatches)
    yield from (Forward(i) for i in range(warmup))
    for i in range(microbatches):
        if warmup + i < microbatches:
            yield Forward(warmup + i)
        if stage == 0:
            yield Backward(i)
            continue
        yield BackwardInput(i)
        if i >= stage:
            yield BackwardWeight(i - stage)
    if stage > 0:
        yield from (BackwardWeight(i) for i in range(max(0, microbatches - stage), microbatches))


def _as_many_as_stages(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    return chunks * min(stages, microbatches)


def zero_bubble_v(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """ZB-V (Qi et al. 2023, section 6) on two chunks in a V: no bubble but that of the first and the last transfers.

    It is made for at least 2 · stages - 1 microbatches; of fewer, the actions of those that are missing are left out.
    """
    for action in _full_zero_bubble_v(stage, stages, max(2 * stages - 1, microbatches)):
        if action.microbatch < microbatches:
            yield action


def _full_zero_bubble_v(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    down, back = 0, 1
    forwards, inputs, weights = ((count(), count()) for _ in range(3))

    def forward(chunk: int) -> Compute:
        return Forward(next(forwards[chunk]), chunk)

    def backward_input(chunk: int) -> Compute:
        return BackwardInput(next(inputs[chunk]), chunk)

    def backward_weight(chunk: int) -> Compute:
        return BackwardWeight(next(weights[chunk]), chunk)

    # Warm-up: until the first microbatch has come back up to this stage, then until its gradient has.
    ahead = 2 * (stages - stage) - 1
    yield from (forward(down) for _ in range(ahead))
    for _ in range(stage):
        yield forward(back)
        yield forward(down)
    for _ in range(stages - stage):
        yield forward(back)
        yield backward_input(back)
        yield backward_weight(back)
    # Steady: a forward and a backward of both chunks, until no forward is left.
    for i in range(microbatches - stages):
        if i < microbatches - ahead - stage:
            yield forward(down)
        yield backward_input(down)
        yield backward_weight(down)
        yield forward(back)
        yield backward_input(back)
        yield backward_weight(back)
    # Cool-down: what others wait for first, weight gradients while waiting.
    for _ in range(stage):
        yield backward_input(down)
        yield backward_input(back)
    for _ in range(stages - stage):
        yield backward_input(down)
        yield backward_weight(down)
    yield from (backward_weight(back) for _ in range(stage))
    yield from (backward_weight(down) for _ in range(stage))


def forward_only(stage: int, stages: int, chunks: int, microbatches: int) -> Iterator[Compute]:
    """Evaluation."""
    for group in _groups(stages, microbatches):
        yield from (Forward(i, chunk) for chunk in range(chunks) for i in group)


def _groups(stages: int, microbatches: int) -> list[range]:
    """At least as many microbatches as there are stages: after the last of them, a chunk's output for the first has
    come around to the next chunk. As equal as possible, larger ones first."""
    groups = max(1, microbatches // stages)
    ends = list(accumulate(microbatches // groups + (i < microbatches % groups) for i in range(groups)))
    return [range(start, end) for start, end in pairwise([0, *ends])]


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(gpipe, chunks=ANY),
    "1f1b": Schedule(one_forward_one_backward, live=_1f1b_live),
    "interleaved": Schedule(interleaved, live=_interleaved_live, chunks=ANY, default_chunks=2),
    "zb-h1": Schedule(zero_bubble_h1, live=_as_many_as_stages),
    "zb-v": Schedule(
        zero_bubble_v, live=_as_many_as_stages, chunks=range(2, 3), default_chunks=2, place=Placement.v_shape
    ),
}
"""By the value of the setting ``parallel.schedule``, whose possible values are these."""

EVALUATION = Schedule(forward_only, chunks=ANY)


def choose(name: str | None, chunks: int | None) -> tuple[str, int]:
    """The schedule's name and number of chunks, where one or both are left open; whether they fit is not checked."""
    if name is None:
        name = "interleaved" if (chunks or 1) > 1 else "1f1b"
    return name, SCHEDULES[name].default_chunks if chunks is None else chunks
