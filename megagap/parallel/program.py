"""From a schedule to what every rank runs: transfers put between its actions, and the proof that it all works out.

A schedule (``schedule.py``) lists compute only. The transfers between stages are derived from it by
:func:`with_transfers`, so that no schedule can get them wrong, and :func:`validate` proves the result against a model
of NCCL before ``pipeline.py`` executes it.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from megagap.parallel.actions import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Compute,
    Forward,
    Hop,
    Message,
    Transfer,
)
from megagap.parallel.placement import Placement
from megagap.parallel.schedule import Bound, Schedule, all_activations


def actions_of(schedule: Schedule, placement: Placement, microbatches: int) -> list[list[Compute]]:
    """What each pipeline rank computes under a schedule; proven complete, not yet free of deadlock."""
    ranks, chunks = placement.ranks, placement.chunks
    assert chunks in schedule.chunks, f"a schedule for {schedule.chunks} chunks per stage, not {chunks}"
    actions = [list(schedule(rank, ranks, chunks, microbatches)) for rank in range(ranks)]
    for rank, row in enumerate(actions):
        _check_compute(rank, row, chunks, microbatches)
    return actions


def programs_of(schedule: Schedule, placement: Placement, microbatches: int) -> list[list[Action]]:
    """What each pipeline rank does under a schedule, proven by :func:`validate`."""
    programs = with_transfers(actions_of(schedule, placement, microbatches), placement)
    validate(programs, placement, microbatches, schedule.live)
    return programs


def flow(action: Compute, rank: int, placement: Placement) -> tuple[Hop | None, Hop | None]:
    """What a rank's action needs and what it makes, with the rank that makes or needs it: the one rule of borders.

    Forwards go up the virtual stages, backwards down. The first forward needs no activation and the last backward no
    gradient: they start from tokens and from the loss.
    """
    if isinstance(action, BackwardWeight):
        return None, None
    here, forward = placement.virtual(rank, action.chunk), isinstance(action, Forward)

    def hop(neighbour: int) -> Hop | None:
        if not 0 <= neighbour < len(placement.stages):
            return None
        kind: Literal["activation", "gradient"] = "activation" if forward else "gradient"
        return Hop(placement.places[neighbour].rank, Message(kind, action.microbatch, max(here, neighbour)))

    below, above = hop(here - 1), hop(here + 1)
    return (below, above) if forward else (above, below)


class Timed(NamedTuple):
    """An action of a :func:`timeline`, in units of half a backward, or as it was measured, in seconds."""

    start: float
    end: float
    action: Compute


def timeline(schedules: Sequence[Sequence[Compute]], placement: Placement) -> list[list[Timed]]:
    """When every rank computes what, if a backward takes twice as long as a forward, each of its halves as long, and
    transfers take no time.

    ``schedules``: every rank's compute actions. Asserts that none of them waits for ever.
    """
    rows: list[list[Timed]] = [[] for _ in schedules]
    made_at: dict[Message, float] = {}
    todo = [deque(actions) for actions in schedules]
    progress = True
    while progress:
        progress = False
        for rank, (row, actions) in enumerate(zip(rows, todo, strict=True)):
            while actions:
                needed, made = flow(actions[0], rank, placement)
                if needed is not None and needed.message not in made_at:
                    break
                free = row[-1].end if row else 0
                start = free if needed is None else max(free, made_at[needed.message])
                action = actions.popleft()
                row.append(Timed(start, start + (2 if isinstance(action, Backward) else 1), action))
                if made is not None:
                    made_at[made.message] = row[-1].end
                progress = True
    waiting = {rank: actions[0] for rank, actions in enumerate(todo) if actions}
    assert not waiting, f"stages wait for each other: {waiting}"
    return rows


def bubble_fraction(rows: Sequence[Sequence[Timed]]) -> float:
    """The share of the makespan, from the first start to the last end of all ranks, in which a rank is idle; the mean
    over ranks."""
    times = [(timed.start, timed.end) for row in rows for timed in row]
    makespan = max(end for _, end in times) - min(start for start, _ in times)
    busy = sum(end - start for start, end in times)
    return 1 - busy / (makespan * len(rows)) if makespan else 0.0


def with_transfers(schedules: Sequence[Sequence[Compute]], placement: Placement) -> list[list[Action]]:
    """Put the sends and receives that compute actions need between those of every rank.

    A message is sent right after the action that makes it, and its receive is posted at that moment of the
    :func:`timeline`, even if it is needed later: it arrives during what is computed meanwhile, and no sender waits
    until its receiver needs it. What falls between two actions of a rank goes as one :class:`Transfer`, so that
    opposite transfers of a pair are batched. Chunks of one rank hand over without a transfer.

    All programs are then parts of one sequence in which both sides of a message stand at the same place. So ranks
    cannot wait for each other: the first message of the sequence that is not transferred yet always can be.
    """
    # In order of time; what is sent when an action starts comes before it.
    sequence: list[tuple[float, bool, int, Compute | Hop]] = []
    for rank, row in enumerate(timeline(schedules, placement)):
        for start, end, action in row:
            sequence.append((start, True, rank, action))
            _, made = flow(action, rank, placement)
            if made is not None and made.peer != rank:
                sequence.append((end, False, rank, made))
    programs: list[list[Action]] = [[] for _ in schedules]
    sends: list[list[Hop]] = [[] for _ in schedules]
    receives: list[list[Hop]] = [[] for _ in schedules]

    def close_batch(rank: int) -> None:
        if sends[rank] or receives[rank]:
            programs[rank].append(Transfer(tuple(sends[rank]), tuple(receives[rank])))
            sends[rank], receives[rank] = [], []

    for _, _, rank, event in sorted(sequence, key=lambda entry: entry[:3]):
        if isinstance(event, Hop):
            sends[rank].append(event)
            receives[event.peer].append(Hop(rank, event.message))
        else:
            close_batch(rank)
            programs[rank].append(event)
    for rank in range(len(programs)):
        close_batch(rank)
    return programs


def peak_live_activations(actions: Iterable[Action]) -> int:
    """For how many microbatches, counted per chunk, a rank keeps activations at most: from a forward to the end of its
    backward, weight gradients included."""
    live = most = 0
    for action in actions:
        live += isinstance(action, Forward)
        most = max(most, live)
        live -= isinstance(action, Backward | BackwardWeight)
    return most


def validate(
    programs: Sequence[Sequence[Action]], placement: Placement, microbatches: int, live: Bound = all_activations
) -> None:
    """Prove that all ranks' programs together are complete, cannot deadlock, and keep no more activations than ``live``
    states.

    Transfers follow NCCL's model: a batch ends when the peers have posted the other side of everything in it, and
    messages of one ordered pair arrive in the order in which they were sent. Asserts otherwise: a bug in megagap.
    """
    assert len(programs) == placement.ranks, f"{len(programs)} programs for {placement.ranks} pipeline ranks"
    for rank, program in enumerate(programs):
        compute = [action for action in program if not isinstance(action, Transfer)]
        _check_compute(rank, compute, placement.chunks, microbatches)
        _check_data_flow(rank, program, placement)
        bound = live(rank, placement.ranks, placement.chunks, microbatches)
        most = peak_live_activations(compute)
        assert most <= bound, f"stage {rank}: {most} live activations, more than the bound of {bound}"
    _check_progress(programs)


class _Network:
    """Who waits for what, as NCCL would have it."""

    def __init__(self, ranks: int) -> None:
        # Per ordered pair: messages posted by the sender, and by the receiver, not yet matched.
        self._sent: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._awaited: dict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._open = [0] * ranks

    def post(self, rank: int, transfer: Transfer) -> None:
        """A rank begins a batch."""
        self._open[rank] += len(transfer.sends) + len(transfer.receives)
        for peer, message in transfer.sends:
            self._sent[rank, peer].append(message)
            self._match(rank, peer)
        for peer, message in transfer.receives:
            self._awaited[peer, rank].append(message)
            self._match(peer, rank)

    def has_ended(self, rank: int) -> bool:
        """Whether all that the rank has posted has met its other side."""
        return not self._open[rank]

    def _match(self, sender: int, receiver: int) -> None:
        sent, awaited = self._sent[sender, receiver], self._awaited[sender, receiver]
        while sent and awaited:
            message, expected = sent.popleft(), awaited.popleft()
            assert message == expected, f"stage {sender} sends {message}, stage {receiver} expects {expected}"
            self._open[sender] -= 1
            self._open[receiver] -= 1


def _check_progress(programs: Sequence[Sequence[Action]]) -> None:
    """Every program comes to its end: run them all, each as far as it gets, until none gets any further."""
    network = _Network(len(programs))
    todo = [deque(program) for program in programs]
    waiting: set[int] = set()
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(todo):
            while actions:
                action = actions[0]
                if isinstance(action, Transfer):
                    if rank not in waiting:
                        waiting.add(rank)
                        network.post(rank, action)
                    if not network.has_ended(rank):
                        break
                    waiting.remove(rank)
                actions.popleft()
                progress = True
    stuck = {rank: actions[0] for rank, actions in enumerate(todo) if actions}
    assert not stuck, f"deadlock: {stuck}"


def _check_data_flow(rank: int, program: Sequence[Action], placement: Placement) -> None:
    """What an action needs is there before it, what is sent was computed before, and all of it is used."""
    available: set[Message] = set()
    to_send: set[Message] = set()
    for action in program:
        if isinstance(action, Transfer):
            for _, message in action.sends:
                assert message in to_send, f"stage {rank}: {message} is sent before it is computed"
                to_send.remove(message)
            available |= {message for _, message in action.receives}
            continue
        needed, made = flow(action, rank, placement)
        if needed is not None:
            assert needed.message in available, f"stage {rank}: {action} needs {needed.message} before it is there"
            available.remove(needed.message)
        if made is not None:
            (available if made.peer == rank else to_send).add(made.message)
    assert not available and not to_send, f"stage {rank}: never used or sent: {available | to_send}"


def _check_compute(rank: int, actions: Sequence[Compute], chunks: int, microbatches: int) -> None:
    """On every chunk every microbatch goes forward once, and backward once if at all, after its forward."""
    everything = {(i, chunk) for i in range(microbatches) for chunk in range(chunks)}
    place: dict[type, dict[tuple[int, int], int]] = {k: {} for k in (Forward, Backward, BackwardInput, BackwardWeight)}
    for index, action in enumerate(actions):
        key = (action.microbatch, action.chunk)
        assert key not in place[type(action)], f"stage {rank}: {action} twice"
        place[type(action)][key] = index
    whole, inputs, weights = place[Backward], place[BackwardInput], place[BackwardWeight]
    assert place[Forward].keys() == everything, f"stage {rank}: not every microbatch goes forward"
    assert inputs.keys() == weights.keys(), f"stage {rank}: BackwardInput without BackwardWeight, or the reverse"
    assert not whole.keys() & inputs.keys(), f"stage {rank}: Backward beside BackwardInput of the same microbatch"
    backwards = whole | inputs
    assert not backwards or backwards.keys() == everything, f"stage {rank}: not every microbatch goes backward"
    assert all(place[Forward][key] < index for key, index in backwards.items()), f"stage {rank}: backward too early"
    assert all(inputs[key] < index for key, index in weights.items()), f"stage {rank}: weight gradient too early"
