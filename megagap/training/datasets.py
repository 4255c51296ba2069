"""The data that a recipe names, opened. Training, evaluation and ``megagap inspect`` all read through this."""

import logging

from megagap.config import Settings, Train, sources_of, timeline_of
from megagap.data.agreement import Ids, require_agreement
from megagap.data.mixture_plan import unnormalised_weights
from megagap.data.samples import TrainingData
from megagap.data.sources import TokenSource, shared_pairs
from megagap.data.text_bytes import PredictedText, UnknownBytesError, predicted_text
from megagap.data.validation import ValidationData, held_out_sources, open_validation
from megagap.timeline import Timeline
from megagap.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


def training_data(settings: Settings, timeline: Timeline | None = None) -> TrainingData:
    """The training samples of ``timeline``, by default the settings' own.

    Raises :class:`DataError` if a file is missing, damaged or too small, or does not fit tokenizer and model.
    """
    train, timeline = settings.train, timeline or timeline_of(settings)
    for phase in timeline.phases:
        if complaint := unnormalised_weights(phase):
            log.warning("%s", complaint)
    for complaint in shared_pairs(timeline.sources):
        log.warning("%s", complaint)
    opened = TrainingData(
        timeline,
        train.seed,
        settings.data.split,
        settings.model.vocab_size,
        skipped_ranges(train),
        megatron=settings.data.order == "megatron",
    )
    opened.ids = check_agreement(settings)
    return opened


def check_agreement(settings: Settings) -> Ids | None:
    """The ids that data and tokenizer agree on and the model has room for; warnings are logged.

    Raises :class:`DataError` otherwise.
    """
    data, train = settings.data, settings.train
    named = timeline_of(settings).sources
    named += sources_of(data.validation) if train.evaluate_every or train.evaluate_first else []
    sources: dict[str, list[str]] = {}
    for source in named:
        sources.setdefault(source.name, []).extend(source.prefixes)
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
        timeline_of(settings).sources,
        sources_of(data.validation),
        train.sequence_length,
        train.evaluate_samples,
        data.split,
        settings.model.vocab_size,
    )


def validation_texts(settings: Settings, held_out: ValidationData) -> dict[str, PredictedText]:
    """What the predicted tokens of each validation source stand for; the log says of which sources that is not known.

    None of a headless model, whose loss does not say how many bits a text takes. Raises :class:`DataError` if a file is
    damaged or was rebuilt since it was opened.
    """
    if settings.model.headless:
        return {}
    known, spec = {}, settings.data.tokenizer
    tokenizer = load_tokenizer(spec) if spec and held_out.windows else None
    for name, source in held_out.sources.items():
        targets = held_out.targets(name, settings.data.document_mask)
        try:
            known[name] = predicted_text(source.source.prefixes, targets, tokenizer)
        except UnknownBytesError as reason:
            log.info("bits per byte of %s are not known, so validation_bpb/%s is left out: %s", name, name, reason)
    return known


def held_out(settings: Settings, vocab_size: int) -> list[TokenSource]:
    """All that a recipe holds out for validation, by source; none where it holds out nothing.

    ``vocab_size``: of the model that is to read it. Raises :class:`DataError` if a file is missing or damaged.
    """
    data = settings.data
    return held_out_sources(timeline_of(settings).sources, sources_of(data.validation), data.split, vocab_size)


def skipped_ranges(train: Train) -> list[tuple[int, int]]:
    """``train.skip_samples`` as half-open ranges of global sample numbers."""
    return [(int(start), int(stop)) for start, _, stop in (r.partition(":") for r in train.skip_samples)]
