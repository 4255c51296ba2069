"""The loss of any model on token files: each token predicted once, from the tokens before it in its window.

A source is one row of tokens, its documents end to end, cut into windows of ``sequence_length + 1`` tokens that overlap
by one, as training samples are; the last window may be shorter. So every token but the very first is predicted exactly
once, from at most ``sequence_length`` tokens.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megagap.checkpoint.companions import recorded_tokenizer, tokenizer_of
from megagap.checkpoint.huggingface_config import read_settings
from megagap.checkpoint.huggingface_import import is_hugging_face, load_hugging_face_model
from megagap.checkpoint.index import Index
from megagap.checkpoint.load import resolve_checkpoint
from megagap.checkpoint.model import SingleProcessModel, load_model, require_output_projection
from megagap.checkpoint.state import read_ids, read_model, read_run
from megagap.config import Model
from megagap.data.agreement import Ids
from megagap.data.sources import TokenSource
from megagap.data.text_bytes import TextBytes
from megagap.data.validation import read_stretches
from megagap.errors import CheckpointError, ConfigError, DataError
from megagap.ops.document_mask import Documents
from megagap.parallel.cross_entropy import IGNORED_TARGET
from megagap.tokenizer import Tokenizer, load_tokenizer
from megagap.training.step import targets_of

log = logging.getLogger(__name__)

LONGEST_DEFAULT = 4096
"""Tokens of a sequence where it is not known what a model was trained on: its positions may be many more than that."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk and what is known of it, before its weights are read."""

    path: Path
    """The checkpoint or the Hugging Face folder."""
    settings: Model
    ids: Ids | None
    """What it says of its token ids."""
    tokenizer: Tokenizer | None
    step: int | None = None
    """Of the run that wrote it."""
    trained_length: int | None = None
    """Tokens of a sequence in that run."""
    trained_with_mask: bool = False
    """Whether documents were masked from each other in that run."""

    def load(self, device: torch.device, dtype: torch.dtype) -> SingleProcessModel:
        """Raises :class:`CheckpointError` if the weights are damaged, :class:`ConfigError` if they do not fit a GPU."""
        load = load_hugging_face_model if is_hugging_face(self.path) else load_model
        with _memory_errors(device, "the model", "use a larger one, --dtype bfloat16, or none: CUDA_VISIBLE_DEVICES="):
            return load(self.path, device).to(dtype)

    def default_length(self) -> int:
        """The length that the model was trained on, or else its positions, at most :data:`LONGEST_DEFAULT`."""
        return self.trained_length or min(self.settings.max_position_embeddings, LONGEST_DEFAULT)


def find_model_files(path: Path, tokenizer: str | None = None) -> ModelFiles:
    """A checkpoint of any layout, a run (its latest), or a Hugging Face folder.

    ``tokenizer``: None means the one beside a Hugging Face model, or the one that the run was trained with, if it can
    be read. Raises :class:`CheckpointError` if there is no such model, or it is headless, :class:`DataError` for
    a ``tokenizer`` that cannot be read.
    """
    if is_hugging_face(path.parent) and path.is_file():
        raise CheckpointError(f"{path} is a file of a Hugging Face model\n  give its folder: {path.parent}")
    if is_hugging_face(path):
        settings = read_settings(path)
        own = load_tokenizer(tokenizer) if tokenizer else _readable_tokenizer(tokenizer_of(path))
        return ModelFiles(path, settings, None, own)
    path = resolve_checkpoint(path)
    index = Index.read(path)
    settings, ids = read_model(path, index), read_ids(path, index)
    require_output_projection(path, settings)
    own = load_tokenizer(tokenizer) if tokenizer else _readable_tokenizer(recorded_tokenizer(index))
    if "train" not in index.state:
        return ModelFiles(path, settings, ids, own)
    run = read_run(path, index)
    return ModelFiles(path, settings, ids, own, run.step, run.train.sequence_length, run.data.document_mask)


def _readable_tokenizer(spec: str | None) -> Tokenizer | None:
    """The loss needs none, so one that cannot be read is a warning."""
    if spec is None:
        return None
    try:
        return load_tokenizer(spec)
    except DataError as error:
        log.warning("the model's tokenizer cannot be used: %s", error.args[0])
        return None


@dataclass(frozen=True)
class SourceLoss:
    """What a model makes of a source."""

    nats: float
    """Sum of the cross-entropies of all predicted tokens; not finite if one of them is not."""
    tokens: int
    """Predicted tokens."""
    bytes: int | None
    """UTF-8 bytes of the text that these stand for; None if that is not known."""
    share_read: float
    """How much of the source was read; 1 means all."""

    @property
    def loss(self) -> float | None:
        """Mean over the predicted tokens, in nats; None if it is not finite."""
        return self.nats / self.tokens if math.isfinite(self.nats) else None

    @property
    def perplexity(self) -> float | None:
        """exp(loss); None if it is not finite."""
        try:
            return None if self.loss is None else math.exp(self.loss)
        except OverflowError:
            return None

    @property
    def bits_per_byte(self) -> float | None:
        """None if the bytes are unknown or none, or the loss is not finite."""
        return self.nats / math.log(2) / self.bytes if self.bytes and math.isfinite(self.nats) else None


def targets_in(source: TokenSource, max_tokens: int | None = None) -> int:
    """How many tokens of a source are predicted where no document mask leaves any out."""
    return min(max(source.token_count - 1, 0), max_tokens or source.token_count)


def require_targets(source: TokenSource) -> None:
    """Raises :class:`DataError` if a source has no token that could be predicted."""
    if source.token_count < 2:
        name, prefix = source.source.name, source.source.prefixes[0]
        count = "1 token" if source.token_count else "no tokens"
        raise DataError(f"source {name} ({prefix}) has {count}, none to predict\n  give one with more text.")


@torch.no_grad()
def evaluate_source(
    model: SingleProcessModel,
    source: TokenSource,
    sequence_length: int,
    *,
    batch_tokens: int,
    max_tokens: int | None = None,
    document_mask: bool = False,
    text_bytes: TextBytes | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> SourceLoss:
    """The loss of ``model`` on the first ``max_tokens`` predicted tokens of ``source``, or on all of them.

    ``batch_tokens``: tokens computed at a time, at least one window. ``document_mask``: attention stays within
    documents, and the first token of a document is not predicted. ``progress`` is told the tokens of each batch.
    Raises :class:`DataError` if there is nothing to predict, or files are damaged or were changed meanwhile;
    :class:`ConfigError` if a batch does not fit the GPU's memory.
    """
    require_targets(source)
    targets = targets_in(source, max_tokens)
    device = model.stage.output.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    sizes: list[int | None] = []
    for starts, length in _batches(targets, sequence_length, max(batch_tokens // sequence_length, 1)):
        read, positions = read_stretches(source, starts, length + 1)
        window = torch.from_numpy(read)
        places = torch.from_numpy(positions) if document_mask else None
        predicted = targets_of(window, places)
        nats += _loss(model, window[:, :-1], predicted, places, batch_tokens)
        counted = predicted[predicted != IGNORED_TARGET]
        tokens += counted.numel()
        sizes.append(text_bytes.count(counted.numpy()) if text_bytes else None)
        progress(predicted.numel())
    if not tokens:
        raise DataError(
            f"source {source.source.name} ({source.source.prefixes[0]}): no document in what was read has two tokens, "
            "so none can be predicted with --document-mask\n  leave it out, or give longer documents."
        )
    known = [size for size in sizes if size is not None]
    total_bytes = sum(known) if len(known) == len(sizes) else None
    return SourceLoss(float(nats), tokens, total_bytes, targets / targets_in(source))


def _batches(targets: int, sequence_length: int, rows: int) -> Iterator[tuple[range, int]]:
    """Where the windows of a batch start, and how many tokens are predicted in each of them."""
    last = targets - targets % sequence_length
    for first in range(0, last, rows * sequence_length):
        yield range(first, min(first + rows * sequence_length, last), sequence_length), sequence_length
    if last < targets:
        yield range(last, targets, targets - last), targets - last


def _loss(
    model: SingleProcessModel,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None,
    batch_tokens: int,
) -> torch.Tensor:
    """Sum of the cross-entropies at the targets, an fp64 scalar on the model's device.

    inputs, targets: int64 [b, s] on the CPU. positions: int64 [b, s + 1], of the inputs and the last target.
    """
    stage, device = model.stage, model.stage.output.device
    documents = None if positions is None else Documents.of(positions[:, :-1]).to(device)
    what = f"batches of {batch_tokens:,} tokens in windows of {inputs.shape[1]:,}"
    with _memory_errors(device, what, "lower --batch-size or --sequence-length, or compute in --dtype bfloat16"):
        y = stage(inputs.to(device), inputs.shape[1], documents=documents)
        _, losses, _ = stage.loss(y, targets.to(device), torch.ones((), device=device))
        return losses.double().sum()


@contextmanager
def _memory_errors(device: torch.device, what: str, cure: str) -> Iterator[None]:
    """Raises :class:`ConfigError` where a GPU has not the memory for the block."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(f"the memory of the GPU ({device}) is too small for {what}\n  {cure}.") from None
