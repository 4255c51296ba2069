"""The phases of training that a recipe asks for, in steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from megagap.config.settings import Data, Phase, Source, Train


@dataclass(frozen=True)
class Span:
    """A phase as it is run: steps ``first + 1`` to ``first + steps``."""

    name: str
    first: int
    steps: int
    sequence_length: int
    rope_theta: float
    sources: list[Source]


def spans(data: Data, train: Train, rope_theta: float) -> list[Span]:
    """``data.phases``, each rounded up to whole steps; without any, one of ``data.sources`` for the whole run."""
    if data.phases:
        return phase_spans(data.phases, train.global_batch_size, train.sequence_length, rope_theta)
    return [Span("training", 0, train.steps, train.sequence_length, rope_theta, data.sources)]


def phase_spans(
    phases: Sequence[Phase], global_batch_size: int, sequence_length: int, rope_theta: float = 0.0
) -> list[Span]:
    """``phases`` in steps; length and theta are those of phases that give none of their own."""
    found: list[Span] = []
    for phase in phases:
        length = phase.sequence_length or sequence_length
        first = found[-1].first + found[-1].steps if found else 0
        steps = -(-phase.tokens // (global_batch_size * length))
        found.append(Span(phase.name, first, steps, length, phase.rope_theta or rope_theta, phase.sources))
    return found


def sources_of(plan: Sequence[Span]) -> list[Source]:
    """Those of all phases, each once: sources are identified by name."""
    return list({source.name: source for span in plan for source in span.sources}.values())


def span_of(plan: Sequence[Span], step: int) -> Span:
    """The phase of a step, from 1; beyond the end, the last one."""
    return next((span for span in plan if step <= span.first + span.steps), plan[-1])


def tokens_after(plan: Sequence[Span], global_batch_size: int, step: int) -> int:
    """Tokens that the first ``step`` steps take."""
    inner = [max(0, min(step - span.first, span.steps)) * span.sequence_length for span in plan[:-1]]
    return global_batch_size * (sum(inner) + max(0, step - plan[-1].first) * plan[-1].sequence_length)


def steps_for(plan: Sequence[Span], global_batch_size: int, tokens: int) -> int:
    """The steps that it takes to train on so many tokens; beyond the last phase, counting continues with its steps."""
    for span in plan[:-1]:
        here = span.steps * span.sequence_length * global_batch_size
        if tokens <= here:
            return span.first + -(-tokens // (span.sequence_length * global_batch_size))
        tokens -= here
    return plan[-1].first + -(-tokens // (plan[-1].sequence_length * global_batch_size))
