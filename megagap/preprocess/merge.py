"""Several token files concatenated into one, in constant memory: what preprocessing all their inputs would give."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np

from megagap.data.agreement import AS_THE_OTHER, require_same_ids, same_texts
from megagap.data.manifest import Arguments, FileRecord, LeftOut, Manifest, read_manifest, versions
from megagap.data.origin_map import ENDING, OriginMap
from megagap.data.partial import (
    PartialPair,
    making_pair,
    partial_path,
    publish_pair,
    write_index,
    writing_pair,
)
from megagap.data.planted import poison_path
from megagap.data.sources import same_pairs
from megagap.data.token_file import TokenFile, open_tokens
from megagap.errors import DataError
from megagap.files import write_text
from megagap.preprocess.arrange import arrange, take_over
from megagap.preprocess.encoder import REPORTED
from megagap.terminal.progress import ProgressBar
from megagap.token_formats import pair_prefix

log = logging.getLogger(__name__)


def merge_datasets(
    inputs: Sequence[str],
    output_prefix: str,
    shuffle_documents: int | None = None,
    dedup: bool = False,
    show_progress: bool = False,
) -> TokenFile:
    """Write the documents of the pairs ``inputs``, in this order, to ``output_prefix``; the new pair.

    ``shuffle_documents`` and ``dedup`` are those of :func:`megagap.preprocess.preprocess`. There is a manifest if
    all inputs have one. Raises :class:`DataError` if the inputs hold tokens of different types or, as far as manifests
    say, of different tokenizers, with and without special ids around documents, or not all shards in order, or if one
    has planted documents.
    """
    inputs, output_prefix = [pair_prefix(name) for name in inputs], pair_prefix(output_prefix)
    if os.path.realpath(output_prefix) in map(os.path.realpath, inputs) or same_pairs([output_prefix], inputs):
        raise DataError(f"{output_prefix} cannot be merged into itself: choose another --output-prefix")
    if planted := next((prefix for prefix in inputs if os.path.lexists(poison_path(prefix))), None):
        raise DataError(
            f"{planted} has planted documents ({poison_path(planted).name} lists them), which nobody could tell from "
            "others in a merged pair\n  keep it as a source of its own."
        )
    dtype = _common_type(inputs, shuffle_documents is not None or dedup)
    manifests = [read_manifest(prefix) for prefix in inputs]
    known = [(prefix, manifest) for prefix, manifest in zip(inputs, manifests, strict=True) if manifest]
    warnings = list(_warnings(inputs, known))
    _require_same_options(known)
    _require_whole_shards(known)
    with_origins = [p for p, manifest in known if ENDING in manifest.files and os.path.exists(p + ENDING)]
    has_origins = with_origins == inputs
    if with_origins and not has_origins:
        without = next(prefix for prefix in inputs if prefix not in with_origins)
        warnings.append(f"{without} has no {ENDING}, so the merged pair cannot say where its documents came from")
    for warning in warnings:
        log.warning("%s", warning)
    first_record = 0
    with making_pair(output_prefix), writing_pair(output_prefix):
        with closing(PartialPair(output_prefix, dtype, has_origins=has_origins)) as pair:
            for prefix, manifest in ProgressBar(
                zip(inputs, manifests, strict=True), "merge", len(inputs), unit=" pairs", disable=not show_progress
            ):
                dataset = open_tokens(prefix)
                dataset.require_contiguous()
                pair.add_pair(dataset.tokens, dataset.lengths, dataset.document_indices[1:])
                if has_origins:
                    assert manifest is not None
                    for numbers in OriginMap(prefix, manifest.documents).parts():
                        pair.add_origins(numbers + first_record)
                    first_record += sum(record.records or 0 for record in manifest.inputs)
            position, duplicates = pair.sync(), 0
        if shuffle_documents is not None or dedup:
            position, duplicates = arrange(output_prefix, dtype, shuffle_documents, dedup)
            take_over(output_prefix)
        files = write_index(output_prefix, dtype, position)
        if len(known) == len(inputs):
            records = {ending: FileRecord(**asdict(file)) for ending, file in files.items()}
            merged = _merged([manifest for _, manifest in known], records, shuffle_documents, dedup, duplicates)
            write_text(partial_path(output_prefix, "manifest"), merged.model_dump_json(indent=2) + "\n")
        publish_pair(output_prefix)
    return open_tokens(output_prefix)


def _common_type(inputs: Sequence[str], arranged: bool) -> np.dtype[Any]:
    """The type of all pairs' tokens. They are opened one at a time: each keeps two files open.

    Raises :class:`DataError` if they are of different types, or cannot be rearranged.
    """
    first = open_tokens(inputs[0])
    for prefix in inputs:
        dataset = open_tokens(prefix)
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{first.prefix} has tokens of type {first.dtype.name}, {prefix} of type {dataset.dtype.name}\n"
                "  they come from different tokenizers; preprocess one of them again."
            )
        if arranged and len(dataset) != dataset.document_count:
            raise DataError(
                f"{prefix} has documents of several sequences, which can be neither shuffled nor deduplicated"
            )
    return first.dtype


def _warnings(inputs: Sequence[str], manifests: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """Raises :class:`DataError` if ids of the pairs mean different things."""
    yield from require_same_ids(manifests)
    if same := same_pairs(inputs, inputs):
        yield f"named, and therefore merged, more than once: {', '.join(dict.fromkeys(same))}"
    yield from same_texts(manifests)


def _require_same_options(manifests: Sequence[tuple[str, Manifest]]) -> None:
    for prefix, other in manifests[1:]:
        first, one = manifests[0]
        for name, ours, theirs in (
            ("append_eod", one.arguments.append_eod, other.arguments.append_eod),
            ("prepend_bos", one.arguments.prepend_bos, other.arguments.prepend_bos),
            ("special_tokens", one.special_tokens, other.special_tokens),
        ):
            if ours != theirs:
                raise DataError(f"{first} was made with {name} = {ours}, {prefix} with {theirs}\n  {AS_THE_OTHER}")


def _require_whole_shards(manifests: Sequence[tuple[str, Manifest]]) -> None:
    """Shard 0/n is followed by 1/n and so on to the last: none is missing, none comes twice.

    Each continues with the same key, where the one before stopped in a file, or with another file.
    """
    expected, count, key, seam = 0, 0, "", 0
    for prefix, manifest in manifests:
        found = manifest.arguments.shard
        index, of = map(int, found.split("/")) if found else (0, 1)
        if index != expected or (index and of != count):
            wanted = f"shard {expected}/{count}" if expected else "the first shard of a set"
            raise DataError(f"{prefix} is shard {index}/{of}, where {wanted} should be\n  give all shards in order.")
        inputs = manifest.inputs
        if index and (manifest.key != key or (inputs and inputs[0].start != seam)):
            raise DataError(
                f"{prefix} is shard {index}/{of} of a different set than the one before\n  give all shards of one set."
            )
        expected, count, key = (index + 1) % of, of, manifest.key
        if inputs or not index:
            seam = (inputs[-1].stop or 0) if inputs else 0
    if expected:
        raise DataError(f"shard {expected}/{count} is missing\n  give all shards in order.")


def _merged(
    manifests: Sequence[Manifest], files: dict[str, FileRecord], seed: int | None, dedup: bool, duplicates: int
) -> Manifest:
    left_out = [manifest.left_out for manifest in manifests]
    given = [manifest.arguments for manifest in manifests]
    special = [manifest.special_tokens_in_texts for manifest in manifests]
    content = [manifest.content_bytes for manifest in manifests]
    texts = [manifest.text_bytes for manifest in manifests]
    malformed: Counter[str] = Counter()
    for one in left_out:
        malformed.update(one.malformed)
    return manifests[0].model_copy(
        update=dict(
            documents=sum(manifest.documents for manifest in manifests) - duplicates,
            tokens=files[".bin"].size // np.dtype(manifests[0].dtype).itemsize,
            characters=sum(manifest.characters for manifest in manifests),
            text_bytes=None if duplicates or None in texts else sum(filter(None, texts)),
            content_bytes=None if None in content else sum(filter(None, content)),
            special_tokens_in_texts=None if None in special else sum(filter(None, special)),
            left_out=LeftOut(
                empty=sum(one.empty for one in left_out),
                short=sum(one.short for one in left_out),
                duplicate=sum(one.duplicate for one in left_out) + duplicates,
                malformed=dict(sorted(malformed.items())),
                first_malformed=[fault for one in left_out for fault in one.first_malformed][:REPORTED],
            ),
            arguments=Arguments(
                append_eod=given[0].append_eod,
                prepend_bos=given[0].prepend_bos,
                min_tokens=min(one.min_tokens for one in given),
                dedup=dedup,
                shuffle_documents=seed,
                shard=None,
                on_error="skip" if any(one.on_error == "skip" for one in given) else "stop",
                special_tokens=manifests[0].special_tokens,
            ),
            inputs=[record for manifest in manifests for record in manifest.inputs],
            unread=[*dict.fromkeys(record for manifest in manifests for record in manifest.unread)],
            files=files,
            versions=versions(),
        )
    )
