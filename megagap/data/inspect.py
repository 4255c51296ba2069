"""What token files and training steps contain, as tables for people and as JSON for programs."""

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from megagap.data.agreement import Ids, differing, is_extension
from megagap.data.indexed import VERSION
from megagap.data.manifest import Manifest
from megagap.data.origins import Origin, SourceOrigins
from megagap.data.samples import Sample, TrainingData
from megagap.data.token_file import TokenFile
from megagap.errors import DataError, counted, library_errors
from megagap.tokenizer import Tokenizer, fingerprint, load_tokenizer

SHOWN_TOKENS = 64
SHOWN_ORIGINS = 8
"""Stretches of files that a sample came from."""


def dataset_json(dataset: TokenFile, manifest: Manifest | None) -> dict[str, Any]:
    """Counts, lengths (null without sequences) and manifest (null without one) of a token file."""
    lengths, statistics = dataset.lengths, None
    if len(lengths):
        statistics = {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths.max()),
        }
    return {
        "prefix": dataset.prefix,
        "dtype": dataset.dtype.name,
        "documents": dataset.document_count,
        "sequences": len(dataset),
        "tokens": dataset.token_count,
        "sequence_lengths": statistics,
        "manifest": manifest.model_dump(mode="json") if manifest else None,
    }


def dataset_table(dataset: TokenFile) -> Table:
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
        ("tokens per sequence", statistics),
    ):
        table.add_row(name, value)
    return table


def manifest_table(manifest: Manifest) -> Table:
    """What a token file was made from and with."""
    table = Table(title="made from", show_header=False)
    left_out = manifest.left_out
    counts = {"empty": left_out.empty, "too short": left_out.short, "repeated": left_out.duplicate}
    settings = manifest.arguments.model_dump()
    first, *more = [record.path for record in manifest.inputs] or ["unknown"]
    for name, value in (
        ("inputs", f"{first} and {counted(len(more), 'more file')}" if more else first),
        ("input size", input_size(manifest)),
        ("characters", f"{manifest.characters:,}"),
        ("left out", ", ".join(f"{count:,} {name}" for name, count in (counts | left_out.malformed).items() if count)),
        ("tokenizer", f"{manifest.tokenizer.spec} ({manifest.tokenizer.fingerprint})"),
        ("settings", ", ".join(f"{name} {value}" for name, value in settings.items() if value)),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ):
        table.add_row(name, value or "–")
    return table


def input_size(manifest: Manifest) -> str:
    """Bytes that were read of the inputs, uncompressed, where the manifest says so."""
    return "" if manifest.content_bytes is None else f"{manifest.content_bytes:,} bytes, uncompressed"


def documents_table(
    dataset: TokenFile, numbers: Iterable[int], tokenizer: Tokenizer | None = None, title: str | None = None
) -> Table:
    """The documents of these numbers: their first ids and, with a tokenizer, the text of these.

    Raises :class:`DataError` where one is damaged, or there are none of such a number.
    """
    table = _tokens_table(["document", "tokens"], tokenizer, title)
    for number in numbers:
        tokens = document_tokens(dataset, number)
        text = decode_document(dataset, number, tokens[:SHOWN_TOKENS], tokenizer) if tokenizer else None
        table.add_row(str(number), f"{len(tokens):,}", *_show(tokens, text))
    return table


def documents_json(
    dataset: TokenFile, numbers: Iterable[int], tokenizer: Tokenizer | None = None
) -> list[dict[str, Any]]:
    """Whole documents: ``{"document": int, "tokens": [int], "text": str}``, the text null without a tokenizer."""
    return [_document_json(dataset, number, tokenizer) for number in numbers]


def _document_json(dataset: TokenFile, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    tokens = document_tokens(dataset, number)
    text = decode_document(dataset, number, tokens, tokenizer) if tokenizer else None
    return {"document": number, "tokens": tokens.tolist(), "text": text}


def whole_document(dataset: TokenFile, number: int, tokenizer: Tokenizer | None = None) -> str:
    """A document for a person: a line that says which, then its text, or without a tokenizer its ids."""
    tokens = document_tokens(dataset, number)
    head = f"document {number} of {dataset.prefix}: {counted(len(tokens), 'token')}"
    if tokenizer is None:
        return f"{head}\n{' '.join(map(str, tokens.tolist()))}"
    return f"{head}\n{visible(decode_document(dataset, number, tokens, tokenizer))}"


def document_tokens(dataset: TokenFile, number: int) -> NDArray[Any]:
    """The tokens of a document. Raises :class:`DataError` if there is none of this number, or the index is damaged."""
    count = dataset.document_count
    if not 0 <= number < count:
        numbered = f"{counted(count, 'document')}, numbered 0 to {count - 1}" if count else "no documents"
        raise DataError(f"there is no document {number} in {dataset.prefix}: it has {numbered}")
    first, stop = map(int, dataset.document_indices[number : number + 2])
    if not 0 <= first <= stop <= len(dataset):
        raise DataError(
            f"{dataset.index_path} is damaged: document {number} should be sequences {first:,} to {stop:,} "
            f"of {len(dataset):,}\n  preprocess the text again."
        )
    return dataset.document(number)


def decode_document(dataset: TokenFile, number: int, tokens: NDArray[Any], tokenizer: Tokenizer) -> str:
    """The text of a document's ``tokens``, special tokens written out, ids outside the vocabulary left out.

    Raises :class:`DataError` for numbers that are not token ids.
    """
    if tokens.dtype.kind not in "iu" or (tokens < 0).any():
        raise DataError(
            f"{dataset.tokens_path} does not hold token ids: document {number} starts with "
            f"{_shorten(tokens.tolist(), 4)}\n  give --tokenizer '' to see the numbers."
        )
    with library_errors(f"the tokenizer {tokenizer.spec} cannot decode document {number} of {dataset.prefix}"):
        return tokenizer.decode(tokens[known_places(tokens, tokenizer)].tolist())


def known_places(tokens: NDArray[Any], tokenizer: Tokenizer) -> NDArray[np.intp]:
    """The places of the ids that the vocabulary has: libraries fail at very large ones."""
    return np.flatnonzero(tokens < tokenizer.vocab_size)


def drawn_documents(dataset: TokenFile, count: int, seed: int) -> list[int]:
    """Numbers of ``count`` different documents, or of all if there are fewer, drawn by ``seed``; in file order."""
    documents = range(dataset.document_count)
    return sorted(random.Random(seed).sample(documents, min(count, len(documents))))


def tokenizer_of_manifest(prefix: str, manifest: Manifest | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer that a pair was made with, and a note for the user, mostly empty.

    It is the one that the manifest names, if it still exists and its ids mean the same; tokens may have been added.
    Else it is None, and the note says why.
    """
    if manifest is None:
        return None, f"{prefix} has no manifest that names its tokenizer"
    made, recorded = manifest.tokenizer, Ids.of_manifest(prefix, manifest)
    try:
        tokenizer = load_tokenizer(made.spec)
    except DataError as error:
        return None, f"the tokenizer that {prefix} was made with cannot be read: {error.args[0].splitlines()[0]}"
    if is_extension(recorded, tokenizer):
        recorded = replace(recorded, fingerprint=fingerprint(tokenizer))
    differences = differing(recorded, Ids.of_tokenizer(tokenizer))
    if recorded.fingerprint != fingerprint(tokenizer):
        return None, f"{made.spec} is no longer the tokenizer that {prefix} was made with: {differences[-1]}"
    return tokenizer, "; ".join(differences)


def step_samples(data: TrainingData, step: int) -> list[Sample]:
    """The samples that training step ``step`` (from 1) reads, in batch order."""
    moment = data.timeline.at(step)
    return [data.sample(position) for position in range(moment.first_sample, moment.consumed_samples)]


def sample_origins(data: TrainingData, samples: Sequence[Sample]) -> tuple[list[list[Origin | None]], list[str]]:
    """Where each document of each sample came from, None if that is not known; and the reasons why not, in words."""
    sources, known = {source.source.name: source for source in data.sources}, SourceOrigins()
    found = [[known.of(sources[sample.source], document) for document in sample.documents] for sample in samples]
    return [[None if isinstance(origin, str) else origin for origin in origins] for origins in found], known.unknown


def samples_json(samples: Sequence[Sample], origins: Sequence[Sequence[Origin | None]]) -> str:
    """``[{"sample": int, "source": str, "documents": [int], "origins": […], "tokens": [int]}, …]`` in one line.

    ``origins`` has for each of ``documents`` what :meth:`Origin.as_dict` gives, or null.
    """
    return json.dumps(
        [
            {
                "sample": s.sample,
                "source": s.source,
                "documents": s.documents,
                "origins": [origin and origin.as_dict() for origin in of_sample],
                "tokens": s.tokens.tolist(),
            }
            for s, of_sample in zip(samples, origins, strict=True)
        ]
    )


def samples_table(
    samples: Sequence[Sample],
    origins: Sequence[Sequence[Origin | None]],
    unknown: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Table:
    """Each sample's source, documents, where these came from, and first ids and, with a tokenizer, their text.

    ``unknown`` is said below: why it is not known where some documents came from.
    """
    table = _tokens_table(["sample", "source", "documents", "from"], tokenizer)
    table.caption = Text("\n".join(unknown)) if unknown else None
    for s, of_sample in zip(samples, origins, strict=True):
        text = tokenizer.decode(s.tokens[:SHOWN_TOKENS].tolist()) if tokenizer else None
        lines = [one_line(line) for line in _joined(of_sample)]
        shown = Text("\n".join(lines[:SHOWN_ORIGINS]) + ("\n…" if len(lines) > SHOWN_ORIGINS else ""))
        table.add_row(str(s.sample), s.source, _shorten(s.documents, 8), shown, *_show(s.tokens, text))
    return table


def _joined(origins: Sequence[Origin | None]) -> list[str]:
    """In words, documents that follow each other in a file together: ``a.jsonl, lines 3 to 5``."""
    runs: list[tuple[Origin | None, int]] = []
    for origin in origins:
        if runs and origin and runs[-1][0] and origin == replace(runs[-1][0], number=runs[-1][0].number + runs[-1][1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((origin, 1))
    return ["unknown" if first is None else first.describe(count) for first, count in runs]


def _tokens_table(columns: list[str], tokenizer: Tokenizer | None, title: str | None = None) -> Table:
    return Table(*columns, "first ids", *(["first text"] if tokenizer else []), show_lines=True, title=title)


def _show(tokens: NDArray[Any], text: str | None) -> list[str | Text]:
    shown = [Text(visible(text))] if text is not None else []
    return [_shorten(tokens[: SHOWN_TOKENS + 1].tolist(), SHOWN_TOKENS if text is None else 12), *shown]


def visible(text: str) -> str:
    """``text`` with control characters, which a terminal would obey, written out; line ends and tabs stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    r"""As :func:`visible`, with line ends and tabs written out too, as ``\n`` and ``\t``."""
    return visible(text.replace("\n", "\\n").replace("\t", "\\t"))


def _shorten(numbers: Sequence[int], shown: int) -> str:
    return " ".join(map(str, numbers[:shown])) + (" …" if len(numbers) > shown else "")
