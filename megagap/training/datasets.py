"""The data that a recipe names, opened. Training, evaluation and ``tools/inspect_data.py`` all read through this."""

import logging

from megagap.config import Settings, Train, sources_of, spans
from megagap.config import Source as SourceSettings
from megagap.data.manifest import read_manifest
from megagap.data.plan import unnormalised_weights
from megagap.data.samples import Phase, TrainingData
from megagap.data.sources import Source
from megagap.data.tokenizer import load_tokenizer
from megagap.data.validation import ValidationData, open_validation

log = logging.getLogger(__name__)


def training_data(settings: Settings) -> TrainingData:
    """Raises :class:`DataError` if a file is missing, damaged or too small, or was made with another tokenizer."""
    train, batch = settings.train, settings.train.global_batch_size
    plan = spans(settings.data, train, settings.model.rope_theta)
    require_tokenizer(settings.data.tokenizer, sources_of(plan))
    phases = [
        Phase(span.name, span.steps * batch, span.sequence_length, tuple(_sources(span.sources))) for span in plan
    ]
    for phase in phases:
        if complaint := unnormalised_weights(phase):
            log.warning("%s", complaint)
    return TrainingData(
        phases,
        train.seed,
        settings.data.split,
        settings.model.vocab_size,
        skipped_ranges(train),
        planned=train.steps * batch if settings.data.order == "megatron" else None,
    )


def require_tokenizer(spec: str, sources: list[SourceSettings]) -> None:
    """Raises :class:`DataError` if a source's manifest, where it has one, names another tokenizer than the recipe."""
    prefixes = [prefix for source in sources for prefix in source.paths]
    manifests = {prefix: manifest for prefix in prefixes if (manifest := read_manifest(prefix))} if spec else {}
    if manifests:
        tokenizer = load_tokenizer(spec)
        for prefix, manifest in manifests.items():
            manifest.require_tokenizer(tokenizer, prefix)


def validation_data(settings: Settings) -> ValidationData:
    """Fixed held-out windows; none where the recipe evaluates never."""
    train, data = settings.train, settings.data
    if not train.evaluate_every:
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


def skipped_ranges(train: Train) -> list[tuple[int, int]]:
    """``train.skip_samples`` as half-open ranges of global sample numbers."""
    return [(int(start), int(stop)) for start, _, stop in (r.partition(":") for r in train.skip_samples)]


def _sources(sources: list[SourceSettings]) -> list[Source]:
    return [Source(source.name, tuple(source.paths), source.weight) for source in sources]
