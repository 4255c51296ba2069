"""What token files and training steps hold, as tables for people and as JSON for programs."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from megagap.data.indexed import VERSION, IndexedDataset
from megagap.data.manifest import Manifest
from megagap.data.samples import Sample, TrainingData
from megagap.data.tokenizer import Tokenizer
from megagap.errors import DataError

SHOWN_TOKENS = 64


def dataset_table(dataset: IndexedDataset) -> Table:
    """Header, counts and document lengths of a token file."""
    table = Table(title=dataset.prefix, show_header=False)
    lengths = dataset.lengths
    statistics = (
        f"min {lengths.min():,}, median {np.median(lengths):,.0f}, mean {lengths.mean():,.1f}, max {lengths.max():,}"
        if len(lengths)
        else "none"
    )
    for name, value in (
        ("format", f"Megatron indexed dataset, version {VERSION}"),
        ("token type", f"{dataset.dtype.name}, {dataset.dtype.itemsize} bytes"),
        ("documents", f"{dataset.document_count:,}"),
        ("sequences", f"{len(dataset):,}"),
        ("tokens", f"{dataset.token_count:,}"),
        ("tokens a sequence", statistics),
    ):
        table.add_row(name, value)
    return table


def manifest_table(manifest: Manifest) -> Table:
    """What a token file was made of and with."""
    table = Table(title="made of", show_header=False)
    left_out = manifest.left_out
    counts = {"empty": left_out.empty, "too short": left_out.short, "repeated": left_out.duplicate}
    settings = manifest.arguments.model_dump()
    first, *more = [Text(record.path) for record in manifest.inputs] or [Text("unknown")]
    for name, value in (
        ("inputs", first + Text(f" and {len(more):,} more files") if more else first),
        ("characters", f"{manifest.characters:,}"),
        ("left out", ", ".join(f"{count:,} {name}" for name, count in (counts | left_out.malformed).items() if count)),
        ("tokenizer", Text(f"{manifest.tokenizer.spec} ({manifest.tokenizer.fingerprint})")),
        ("settings", ", ".join(f"{name} {value}" for name, value in settings.items() if value)),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ):
        table.add_row(name, value or "–")
    return table


def documents_table(dataset: IndexedDataset, count: int, tokenizer: Tokenizer | None = None) -> Table:
    """The first ``count`` documents: their first ids and, with a tokenizer, the text of these.

    Raises :class:`DataError` where one is damaged.
    """
    table = _tokens_table(["document", "tokens"], tokenizer)
    for index in range(min(count, dataset.document_count)):
        first, stop = map(int, dataset.document_indices[index : index + 2])
        if not 0 <= first <= stop <= len(dataset):
            raise DataError(
                f"{dataset.index_path} is damaged: document {index} should be sequences {first:,} to {stop:,} "
                f"of {len(dataset):,}\n  preprocess the text again."
            )
        tokens = dataset.document(index)
        if tokenizer and (tokens.dtype.kind not in "iu" or (tokens[:SHOWN_TOKENS] < 0).any()):
            raise DataError(
                f"{dataset.tokens_path} holds no token ids: document {index} starts with "
                f"{_shorten(tokens.tolist(), 4)}\n  leave --tokenizer out to see the numbers."
            )
        table.add_row(str(index), f"{len(tokens):,}", *_show(tokens, tokenizer))
    return table


def step_samples(data: TrainingData, global_batch_size: int, step: int) -> list[Sample]:
    """The samples that training step ``step`` (from 1) reads, in batch order."""
    first = (step - 1) * global_batch_size
    return [data.sample(n) for n in range(first, first + global_batch_size)]


def samples_json(samples: Sequence[Sample]) -> str:
    """``[{"sample": int, "source": str, "documents": [int], "tokens": [int]}, …]`` in one line."""
    return json.dumps(
        [
            {"sample": s.sample, "source": s.source, "documents": s.documents, "tokens": s.tokens.tolist()}
            for s in samples
        ]
    )


def samples_table(samples: Sequence[Sample], tokenizer: Tokenizer | None = None) -> Table:
    """Each sample's source, documents and first ids and, with a tokenizer, the text of these."""
    table = _tokens_table(["sample", "source", "documents"], tokenizer)
    for s in samples:
        table.add_row(str(s.sample), s.source, _shorten(s.documents, 8), *_show(s.tokens, tokenizer))
    return table


def _tokens_table(columns: list[str], tokenizer: Tokenizer | None) -> Table:
    return Table(*columns, "first ids", *(["first text"] if tokenizer else []), show_lines=True)


def _show(tokens: NDArray[Any], tokenizer: Tokenizer | None) -> list[str | Text]:
    # As Text: square brackets in a document are no markup.
    text = [Text(tokenizer.decode(tokens[:SHOWN_TOKENS].tolist()))] if tokenizer else []
    return [_shorten(tokens[: SHOWN_TOKENS + 1].tolist(), SHOWN_TOKENS if not tokenizer else 12), *text]


def _shorten(numbers: Sequence[int], shown: int) -> str:
    return " ".join(map(str, numbers[:shown])) + (" …" if len(numbers) > shown else "")
