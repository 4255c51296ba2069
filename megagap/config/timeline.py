"""The timeline that a recipe asks for."""

from collections.abc import Sequence
from functools import partial

from megagap.config.learning_rate import learning_rate
from megagap.config.settings import Data, PhaseSettings, Settings, SourceSettings, Train
from megagap.timeline import Phase, Schedule, Source, Timeline


def timeline_of(settings: Settings, origin: int = 0) -> Timeline:
    """The run that the settings, as :func:`load_recipe` completes them, describe.

    ``origin``: the steps after which its learning-rate schedule begins, of a run that branched off there.
    """
    schedule = Schedule(partial(learning_rate, settings.optim, settings.train.steps - origin), origin)
    return timeline_of_data(settings.data, settings.train, settings.model.rope_theta, [schedule])


def most_microbatches(settings: Settings, dp: int) -> int:
    """Those that a data-parallel rank of ``dp`` has in the run's largest step."""
    return timeline_of(settings).largest_batch // (settings.train.micro_batch_size * dp)


def timeline_of_data(data: Data, train: Train, rope_theta: float = 0.0, schedules: Sequence[Schedule] = ()) -> Timeline:
    """The same from the settings that determine samples and tokens, without learning rates unless they are given."""
    phases = phases_of(data.phases, train.sequence_length, rope_theta, data.sources)
    return Timeline(phases, batch_sizes_of(train.global_batch_size, train.batch_ramp), train.steps, schedules)


def batch_sizes_of(first: int, ramp: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """``train.global_batch_size`` and ``train.batch_ramp`` as pairs (tokens, sequences) from token 0 on."""
    return [(0, first), *ramp]


def phases_of(
    phases: Sequence[PhaseSettings],
    sequence_length: int,
    rope_theta: float = 0.0,
    sources: Sequence[SourceSettings] = (),
) -> list[Phase]:
    """``data.phases``; without any, one of ``sources`` for the whole run. Length and theta are those of phases that
    give none of their own."""
    if not phases:
        return [Phase("training", None, sequence_length, sources_of(sources), rope_theta)]
    return [
        Phase(
            phase.name,
            phase.tokens,
            phase.sequence_length or sequence_length,
            sources_of(phase.sources),
            phase.rope_theta or rope_theta,
        )
        for phase in phases
    ]


def sources_of(sources: Sequence[SourceSettings]) -> tuple[Source, ...]:
    """A list of sources in the settings, such as ``data.validation``."""
    return tuple(Source(source.name, tuple(source.paths), source.weight, source.role) for source in sources)


def run_length(timeline: Timeline, steps: int, tokens: int) -> int:
    """The steps that ``train.steps``, ``train.tokens`` or all phases make; 0 where none of them is given."""
    last = timeline.phases[-1]
    return steps or timeline.steps_for(tokens) or (0 if last.tokens is None else timeline.last_step(last))
