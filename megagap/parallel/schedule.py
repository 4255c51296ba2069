"""Pipeline schedules as data: for each stage a list of actions, proven here and executed by ``pipeline.py``.

A schedule lists compute only. The transfers between stages are derived from it by :func:`with_transfers`, so that no
schedule can get them wrong, and :func:`validate` proves the result against a model of NCCL before it is run.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal


@dataclass(frozen=True, order=True)
class Forward:
    """Compute a microbatch's activations on this stage's ``chunk`` of layers."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, order=True)
class Backward:
    """Compute a microbatch's input gradient and weight gradients."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, order=True)
class BackwardInput:
    """Compute a microbatch's input gradient only; its weight gradients are deferred to :class:`BackwardWeight`."""

    microbatch: int
    chunk: int = 0


@dataclass(frozen=True, order=True)
class BackwardWeight:
    """Compute the weight gradients that :class:`BackwardInput` deferred."""

    microbatch: int
    chunk: int = 0


Compute = Forward | Backward | BackwardInput | BackwardWeight


@dataclass(frozen=True)
class Message:
    """One tensor between neighbours: an activation (forward) or its gradient (backward), at the boundary before
    virtual stage ``boundary`` (counted along the model: ``chunk · stages + stage``)."""

    kind: Literal["activation", "gradient"]
    microbatch: int
    boundary: int


@dataclass(frozen=True)
class Transfer:
    """Sends and receives that form one batched action: (peer stage, message) each."""

    sends: tuple[tuple[int, Message], ...]
    receives: tuple[tuple[int, Message], ...]


Action = Compute | Transfer
Schedule = Callable[[int, int, int], Iterator[Compute]]


def gpipe(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    """All forwards, then all backwards (Huang et al. 2019). ``microbatches`` live activations."""
    yield from (Forward(i) for i in range(microbatches))
    yield from (Backward(i) for i in range(microbatches))


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    """1F1B (PipeDream-flush; Narayanan et al. 2021, section 2.2). At most ``stages - stage`` live activations."""
    warmup = min(stages - stage - 1, microbatches)
    forwards, backwards = count(), count()
    yield from (Forward(next(forwards)) for _ in range(warmup))
    for _ in range(microbatches - warmup):
        yield Forward(next(forwards))
        yield Backward(next(backwards))
    yield from (Backward(next(backwards)) for _ in range(warmup))


def forward_only(stage: int, stages: int, microbatches: int) -> Iterator[Compute]:
    """Evaluation."""
    yield from (Forward(i) for i in range(microbatches))


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def with_transfers(actions: Sequence[Compute], stage: int, stages: int, chunks: int = 1) -> list[Action]:
    """Put the sends and receives that one stage's compute actions need between them.

    An action's result is sent right after it, what an action needs is received right before it; what falls between
    two compute actions goes as one :class:`Transfer`, so that opposite transfers of a pair are batched.
    """
    last = stages * chunks - 1
    program: list[Action] = []
    sends: list[tuple[int, Message]] = []
    for action in actions:
        here = action.chunk * stages + stage
        below, above = (here - 1) % stages, (here + 1) % stages
        receives: list[tuple[int, Message]] = []
        after: list[tuple[int, Message]] = []
        match action:
            case Forward(i):
                if here > 0:
                    receives.append((below, Message("activation", i, here)))
                if here < last:
                    after.append((above, Message("activation", i, here + 1)))
            case Backward(i) | BackwardInput(i):
                if here < last:
                    receives.append((above, Message("gradient", i, here + 1)))
                if here > 0:
                    after.append((below, Message("gradient", i, here)))
            case BackwardWeight():
                pass
        if sends or receives:
            program.append(Transfer(tuple(sends), tuple(receives)))
        program.append(action)
        sends = after
    if sends:
        program.append(Transfer(tuple(sends), ()))
    return program


def validate(programs: Sequence[Sequence[Action]], microbatches: int, chunks: int = 1) -> None:
    """Prove that all stages' programs together are complete and cannot deadlock.

    Transfers follow NCCL's model: a batch ends when the peers have posted the other side of everything in it, and
    messages of one ordered pair arrive in the order in which they were sent. Asserts otherwise: a bug in megagap.
    """
    for stage, program in enumerate(programs):
        _check_data_flow(stage, program, len(programs), chunks)
        _check_compute(stage, [action for action in program if not isinstance(action, Transfer)], microbatches, chunks)
    position = [0] * len(programs)
    # Per ordered pair: messages posted by the sender, and by the receiver, not yet matched.
    sent: dict[tuple[int, int], deque[Message]] = {}
    awaited: dict[tuple[int, int], deque[Message]] = {}
    open_messages = [0] * len(programs)
    posted = [False] * len(programs)

    def match(sender: int, receiver: int) -> None:
        queue, wanted = sent.get((sender, receiver), deque()), awaited.get((sender, receiver), deque())
        while queue and wanted:
            message, expected = queue.popleft(), wanted.popleft()
            assert message == expected, f"stage {sender} sends {message}, stage {receiver} expects {expected}"
            open_messages[sender] -= 1
            open_messages[receiver] -= 1

    progress = True
    while progress:
        progress = False
        for stage, program in enumerate(programs):
            while position[stage] < len(program):
                action = program[position[stage]]
                if isinstance(action, Transfer):
                    if not posted[stage]:
                        posted[stage] = True
                        open_messages[stage] += len(action.sends) + len(action.receives)
                        for peer, message in action.sends:
                            sent.setdefault((stage, peer), deque()).append(message)
                            match(stage, peer)
                        for peer, message in action.receives:
                            awaited.setdefault((peer, stage), deque()).append(message)
                            match(peer, stage)
                    if open_messages[stage]:
                        break
                    posted[stage] = False
                position[stage] += 1
                progress = True
    stuck = {s: programs[s][p] for s, p in enumerate(position) if p < len(programs[s])}
    assert not stuck, f"deadlock: {stuck}"


def _check_data_flow(stage: int, program: Sequence[Action], stages: int, chunks: int) -> None:
    """What an action needs has been received before it, what is sent was computed before, and all of it is used."""
    received: set[Message] = set()
    to_send: set[Message] = set()
    for action in program:
        if isinstance(action, Transfer):
            for _, message in action.sends:
                assert message in to_send, f"stage {stage}: {message} is sent before it is computed"
                to_send.remove(message)
            received |= {message for _, message in action.receives}
            continue
        here, last = action.chunk * stages + stage, stages * chunks - 1
        forward = isinstance(action, Forward)
        if isinstance(action, BackwardWeight):
            continue
        if here > 0 if forward else here < last:
            needed = Message("activation" if forward else "gradient", action.microbatch, here + (not forward))
            assert needed in received, f"stage {stage}: {action} needs {needed} before it is received"
            received.remove(needed)
        if here < last if forward else here > 0:
            to_send.add(Message("activation" if forward else "gradient", action.microbatch, here + forward))
    assert not received and not to_send, f"stage {stage}: never used or sent: {received | to_send}"


def _check_compute(stage: int, actions: Sequence[Action], microbatches: int, chunks: int) -> None:
    """Every microbatch goes forward once, and backward once if at all, after its forward."""
    everything = {(i, chunk) for i in range(microbatches) for chunk in range(chunks)}
    place: dict[type, dict[tuple[int, int], int]] = {k: {} for k in (Forward, Backward, BackwardInput, BackwardWeight)}
    for index, action in enumerate(actions):
        assert not isinstance(action, Transfer)
        key = (action.microbatch, action.chunk)
        assert key not in place[type(action)], f"stage {stage}: {action} twice"
        place[type(action)][key] = index
    whole, inputs, weights = place[Backward], place[BackwardInput], place[BackwardWeight]
    assert place[Forward].keys() == everything, f"stage {stage}: not every microbatch goes forward"
    assert inputs.keys() == weights.keys() and not whole.keys() & inputs.keys(), (
        f"stage {stage}: BackwardInput without BackwardWeight"
    )
    backwards = whole | inputs
    assert not backwards or backwards.keys() == everything, f"stage {stage}: not every microbatch goes backward"
    assert all(place[Forward][key] < index for key, index in backwards.items()), f"stage {stage}: backward too early"
    assert all(inputs[key] < index for key, index in weights.items()), f"stage {stage}: weight gradient too early"
