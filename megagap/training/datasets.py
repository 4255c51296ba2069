"""The data that a recipe names, opened. Training, evaluation and ``megagap inspect`` all read through this."""

import logging

from megagap.config import Settings, Train, sources_of, spans
from megagap.config import Source as SourceSettings
from megagap.data.agreement import Ids, require_agreement
from megagap.data.plan import unnormalised_weights
from megagap.data.samples import Phase, TrainingData
from megagap.data.sources import Source, TokenSource, shared_pairs
from megagap.data.validation import ValidationData, held_out_sources, open_validation

log = logging.getLogger(__name__)


def training_data(settings: Settings) -> TrainingData:
    """Raises :class:`DataError` if a file is missing, damaged or too small, or does not fit tokenizer and model."""
    train, batch = settings.train, settings.train.global_batch_size
    plan = spans(settings.data, train, settings.model.rope_theta)
    phases = [
        Phase(span.name, span.steps * batch, span.sequence_length, tuple(_sources(span.sources))) for span in plan
    ]
    for phase in phases:
        if complaint := unnormalised_weights(phase):
            log.warning("%s", complaint)
    for complaint in shared_pairs(_sources(sources_of(plan))):
        log.warning("%s", complaint)
    opened = TrainingData(
        phases,
        train.seed,
        settings.data.split,
        settings.model.vocab_size,
        skipped_ranges(train),
        planned=train.steps * batch if settings.data.order == "megatron" else None,
    )
    opened.ids = check_agreement(settings)
    return opened


def check_agreement(settings: Settings) -> Ids | None:
    """The ids that data and tokenizer agree on and the model has room for; warnings are logged.

    Raises :class:`DataError` otherwise.
    """
    data, train = settings.data, settings.train
    named = sources_of(spans(data, train, settings.model.rope_theta))
    named += data.validation if train.evaluate_every or train.evaluate_first else []
    sources: dict[str, list[str]] = {}
    for source in named:
        sources.setdefault(source.name, []).extend(source.paths)
    ids, warnings = require_agreement(sources, data.tokenizer, settings.model.vocab_size, data.document_mask)
    for warning in warnings:
        log.warning("%s", warning)
    return ids


def validation_data(settings: Settings) -> ValidationData:
    """Fixed held-out windows; none if the recipe never evaluates."""
    train, data = settings.train, settings.data
    if not train.evaluate_every and not train.evaluate_first:
        if data.validation:
            log.warning("data.validation is given, but train.evaluate_every = 0: it is never evaluated")
        return ValidationData([], train.sequence_length, train.evaluate_samples)
    return open_validation(
        _sources(sources_of(spans(data, train, settings.model.rope_theta))),
        _sources(data.validation),
        train.sequence_length,
        train.evaluate_samples,
        data.split,
        settings.model.vocab_size,
    )


def held_out(settings: Settings, vocab_size: int) -> list[TokenSource]:
    """All that a recipe holds out for validation, by source; none where it holds out nothing.

    ``vocab_size``: of the model that is to read it. Raises :class:`DataError` if a file is missing or damaged.
    """
    data = settings.data
    training = _sources(sources_of(spans(data, settings.train, settings.model.rope_theta)))
    return held_out_sources(training, _sources(data.validation), data.split, vocab_size)


def skipped_ranges(train: Train) -> list[tuple[int, int]]:
    """``train.skip_samples`` as half-open ranges of global sample numbers."""
    return [(int(start), int(stop)) for start, _, stop in (r.partition(":") for r in train.skip_samples)]


def _sources(sources: list[SourceSettings]) -> list[Source]:
    return [Source(source.name, tuple(source.paths), source.weight) for source in sources]
