"""The data that a recipe names, opened. Training, evaluation and ``tools/inspect_data.py`` all read through this."""

import logging

from megagap.config import Settings
from megagap.config import Source as SourceSettings
from megagap.data.loader import Source, TrainingData, ValidationData, open_validation

log = logging.getLogger(__name__)


def training_data(settings: Settings) -> TrainingData:
    """Raises :class:`DataError` if a file is missing, damaged or too small."""
    return TrainingData(
        _sources(settings.data.sources),
        settings.train.sequence_length,
        settings.train.seed,
        settings.data.split,
        settings.model.vocab_size,
        skipped_ranges(settings),
    )


def validation_data(settings: Settings) -> ValidationData:
    """Fixed held-out windows; none where the recipe evaluates never."""
    if not settings.train.evaluate_every:
        if settings.data.validation:
            log.warning("data.validation is given, but train.evaluate_every = 0: it is never evaluated")
        return ValidationData([], settings.train.evaluate_samples)
    return open_validation(
        _sources(settings.data.sources),
        _sources(settings.data.validation),
        settings.train.sequence_length,
        settings.train.evaluate_samples,
        settings.data.split,
        settings.model.vocab_size,
    )


def skipped_ranges(settings: Settings) -> list[tuple[int, int]]:
    """``train.skip_samples`` as half-open ranges of global sample numbers."""
    return [(int(start), int(stop)) for start, _, stop in (r.partition(":") for r in settings.train.skip_samples)]


def _sources(sources: list[SourceSettings]) -> list[Source]:
    return [Source(source.name, tuple(source.paths), source.weight) for source in sources]
