"""What each step of a run is: its phase, samples, tokens and learning rate, as closed forms of the step.

A run is a list of stretches of steps that are alike: of one phase, at one batch size. Looking a step up, and finding
the step of a sample or of a number of tokens, is a search among the stretches, however many steps a run has.
``config.timeline_of`` builds the timeline of a run from its settings; everything else is handed it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


def due(every: int, step: int, last: bool = False) -> bool:
    """Whether something done every so many steps (0: never), and at the ``last``, is due."""
    return every > 0 and (last or step % every == 0)


@dataclass(frozen=True)
class Source:
    """A source of tokens; several prefixes are shards that are read one after another."""

    name: str
    prefixes: tuple[str, ...]
    weight: float = 1.0
    role: str = ""
    """What it is, for a person who lacks its files."""


@dataclass(frozen=True, eq=False)
class Phase:
    """A part of a run with a mixture and a sequence length of its own."""

    name: str
    tokens: int | None
    """To train on, rounded up to whole steps; None: as long as the run."""
    sequence_length: int
    sources: tuple[Source, ...] = ()
    rope_theta: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A course of the learning rate that begins with step ``origin + 1`` of the run."""

    rate: Callable[[int], float]
    """The learning rate of its own steps, from 1."""
    origin: int = 0


@dataclass(frozen=True)
class Moment:
    """One step of a run. Step 0, before the first, is of the first phase and has no samples."""

    step: int
    phase: Phase
    first_sample: int
    """Position of its first sample in training order, from 0."""
    samples: int
    """Its global batch size in sequences."""
    first_token: int
    """Tokens of the steps before."""
    schedule: Schedule | None
    """The one that determines its learning rate."""

    @property
    def sequence_length(self) -> int:
        return self.phase.sequence_length

    @property
    def rope_theta(self) -> float:
        return self.phase.rope_theta

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.samples * self.sequence_length

    @property
    def consumed_samples(self) -> int:
        """Samples of this step and all before."""
        return self.first_sample + self.samples

    @property
    def consumed_tokens(self) -> int:
        """Tokens of this step and all before."""
        return self.first_token + self.tokens

    @property
    def lr(self) -> float:
        """The learning rate."""
        assert self.schedule is not None, "a timeline without a schedule has no learning rates"
        return self.schedule.rate(self.step - self.schedule.origin)


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps that are alike. All numbers are those of the steps before it."""

    phase: Phase
    batch_size: int
    steps: int
    samples: int
    tokens: int

    @property
    def step_tokens(self) -> int:
        """Tokens of each of its steps."""
        return self.batch_size * self.phase.sequence_length


class Timeline:
    """A run of ``phases``, one after another; beyond its end, the last phase goes on.

    ``batch_sizes``: pairs (tokens, sequences), the first from token 0: a step that begins after so many tokens or more
    has so many sequences. A ramp has several, and so has a run that goes on at another batch size, whose sample
    positions go on with it. ``steps``: length of the run; None: not known. ``schedules``: by their origins; a branch,
    such as a cooldown, is one more that begins where it branches off.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        batch_sizes: Sequence[tuple[int, int]],
        steps: int | None = None,
        schedules: Sequence[Schedule] = (),
    ) -> None:
        assert phases and all(phase.tokens is not None for phase in phases[:-1]), "only the last phase may have no end"
        assert batch_sizes[0][0] == 0 and list(batch_sizes) == sorted(batch_sizes), batch_sizes
        self.phases, self.batch_sizes, self.steps = tuple(phases), tuple(batch_sizes), steps
        self.schedules = sorted(schedules, key=lambda schedule: schedule.origin)
        self.stretches = list(_stretches(self.phases, self.batch_sizes))
        self._steps = [stretch.steps for stretch in self.stretches]
        self._samples = [stretch.samples for stretch in self.stretches]
        self._tokens = [stretch.tokens for stretch in self.stretches]
        self._starts: dict[Phase, Stretch] = {}
        for stretch in self.stretches:
            self._starts.setdefault(stretch.phase, stretch)

    def at(self, step: int) -> Moment:
        """What ``step`` is, counted from 1; 0 is before the first."""
        stretch = self.stretches[bisect_left(self._steps, step, 1) - 1]
        before = max(step - 1 - stretch.steps, 0)
        return Moment(
            step,
            stretch.phase,
            stretch.samples + before * stretch.batch_size,
            stretch.batch_size if step else 0,
            stretch.tokens + before * stretch.step_tokens,
            self._schedule(step),
        )

    def step_of_sample(self, position: int) -> int:
        """The step that the sample at ``position`` in training order, from 0, belongs to."""
        stretch = self.stretches[bisect_right(self._samples, position) - 1]
        return stretch.steps + (position - stretch.samples) // stretch.batch_size + 1

    def steps_for(self, tokens: int) -> int:
        """The steps that it takes to train on so many tokens."""
        stretch = self.stretches[bisect_left(self._tokens, tokens, 1) - 1]
        return stretch.steps + -(-(tokens - stretch.tokens) // stretch.step_tokens)

    def first_step(self, phase: Phase) -> int:
        """The first step of one of :attr:`phases`."""
        return self._starts[phase].steps + 1

    def last_step(self, phase: Phase) -> int:
        """The last step of one of :attr:`phases`, which may lie beyond the run's; without an end, the run's."""
        if phase is not self.phases[-1]:
            return self.first_step(self.phases[self.phases.index(phase) + 1]) - 1
        if phase.tokens is not None:
            return self.steps_for(self._starts[phase].tokens + phase.tokens)
        assert self.steps is not None, f"neither the run nor its phase {phase.name} has an end"
        return self.steps

    @property
    def sources(self) -> list[Source]:
        """Those of all phases in the order of their first appearance, each once: names identify them."""
        return list({source.name: source for phase in self.phases for source in phase.sources}.values())

    @property
    def largest_batch(self) -> int:
        """The most sequences that a step has."""
        return max(stretch.batch_size for stretch in self.stretches)

    @property
    def sequence_lengths(self) -> list[int]:
        """Every length that there is, ascending."""
        return sorted({phase.sequence_length for phase in self.phases})

    def _schedule(self, step: int) -> Schedule | None:
        begun = [schedule for schedule in self.schedules if schedule.origin < max(step, 1)]
        return begun[-1] if begun else None


def _stretches(phases: Sequence[Phase], batch_sizes: Sequence[tuple[int, int]]) -> Iterator[Stretch]:
    """Cut at the ends of phases and where the batch size changes; the last one has no end."""
    borders = [border for border, _ in batch_sizes]
    steps = samples = tokens = 0
    for i, phase in enumerate(phases):
        end = None if i + 1 == len(phases) or phase.tokens is None else tokens + phase.tokens
        while end is None or tokens < end:
            size = bisect_right(borders, tokens) - 1
            stretch = Stretch(phase, batch_sizes[size][1], steps, samples, tokens)
            yield stretch
            stops = [*borders[size + 1 : size + 2], *([] if end is None else [end])]
            if not stops:
                return
            count = -(-(min(stops) - tokens) // stretch.step_tokens)
            steps, samples = steps + count, samples + count * stretch.batch_size
            tokens += count * stretch.step_tokens
