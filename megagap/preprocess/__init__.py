"""Text to ``.bin``/``.idx`` pairs, one for each key, at the speed of the tokenizer.

The parent reads files and cuts them into units of about a megabyte (``units``), worker processes parse and encode these
(``encoder``, ``workers``), the parent writes their tokens in input order. Reading, encoding and writing overlap, and at
most a few units per worker are in progress, so memory does not grow with the input. Now and then a journal records how
far the partial files have come (``journal``), so that a run that was killed can be continued. At the end the documents
may be put in another order (``arrange``), and a manifest accounts for everything (:mod:`megagap.data.manifest`).
"""

import logging
import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self, get_args

from rich.filesize import decimal

from megagap.data.manifest import Arguments, Manifest, OnError
from megagap.data.partial import CannotWriteError, lock_pair
from megagap.errors import DataError, counted, printable
from megagap.files import require_name
from megagap.preprocess.fast import Fast
from megagap.preprocess.inputs import shard
from megagap.preprocess.job import Job
from megagap.preprocess.listing import list_inputs
from megagap.terminal.programs import typed
from megagap.tokenizer import SpecialTokens, find_tokenizer, load_tokenizer

log = logging.getLogger(__name__)

__all__ = ["Fast", "OnError", "Pair", "Summary", "preprocess"]


@dataclass(frozen=True)
class Pair:
    """A ``.bin``/``.idx`` pair that was written."""

    prefix: str
    documents: int
    empty: int
    """Documents without text, left out."""
    tokens: int
    short: int = 0
    """Documents of too few tokens, left out."""
    duplicate: int = 0
    """Documents that were there before, left out."""

    @classmethod
    def of(cls, prefix: str, manifest: Manifest) -> Self:
        left_out = manifest.left_out
        counts = (left_out.empty, manifest.tokens, left_out.short, left_out.duplicate)
        return cls(prefix, manifest.documents, *counts)

    def __str__(self) -> str:
        reasons = ((self.empty, "empty"), (self.short, "too short"), (self.duplicate, "repeated"))
        left_out = ", ".join(f"{count:,} {name}" for count, name in reasons if count)
        left_out = f" ({left_out} left out)" if left_out else ""
        counts = f"{counted(self.documents, 'document')}{left_out}, {counted(self.tokens, 'token')}"
        return f"{printable(self.prefix)}: {counts}"


@dataclass(frozen=True)
class Summary:
    """What was written, and what was not."""

    pairs: tuple[Pair, ...]
    """In the order of the keys."""
    skipped: int
    """Documents that were malformed or lacked a text, left out of all pairs."""
    first_skipped: tuple[str, ...]
    """File, line and fault of the first of them."""
    input_bytes: int | None
    """Of all inputs, uncompressed (``content_bytes`` of the manifest); None where an earlier version did not count."""
    read_bytes: int
    """Of these, those that this run read: with ``resume``, an earlier one may have read some or all."""
    file_bytes: int
    """Of the input files as they are stored, compressed or not."""
    seconds: float
    """That this run took."""
    was_finished: bool = False
    """By an earlier run: this one did nothing."""
    notes: tuple[str, ...] = ()
    """What else the user should know."""

    def __str__(self) -> str:
        return "\n".join(f"{pair} from {self._size()}{self._work()}" for pair in self.pairs)

    def _size(self) -> str:
        if self.input_bytes is None:
            return f"{decimal(self.file_bytes)} in files"
        files = f" ({decimal(self.file_bytes)} in files)" if self.file_bytes not in (0, self.input_bytes) else ""
        return f"{decimal(self.input_bytes)} of uncompressed input{files}"

    def _work(self) -> str:
        """What this run did of it, and how fast."""
        if self.was_finished:
            return ", by an earlier run"
        if not self.read_bytes:
            return f"{', which an earlier run read' if self.input_bytes else ''} in {self.seconds:.1f} s"
        rate = f"{self.seconds:.1f} s ({decimal(int(self.read_bytes / max(self.seconds, 1e-9)))}/s)"
        if self.read_bytes == self.input_bytes:
            return f" in {rate}"
        return f"; this run read {decimal(self.read_bytes)} of it, uncompressed, in {rate}"


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str,
    tokenizer: str,
    keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    on_error: OnError = "stop",
    show_progress: bool = False,
    *,
    prepend_bos: bool = False,
    min_tokens: int = 0,
    shuffle_documents: int | None = None,
    dedup: bool = False,
    part: tuple[int, int] | None = None,
    fast: Fast = "off",
    resume: bool = False,
    special_tokens: SpecialTokens = "text",
) -> Summary:
    """Write ``{output_prefix}_{key}_document.bin``, ``.idx`` and ``.json`` for each key, in input order.

    ``inputs`` are files, folders and patterns (:func:`list_inputs`); ``tokenizer`` is a specification for
    :func:`load_tokenizer`, to which ``special_tokens`` written out in a text are text or tokens. ``append_eod`` and
    ``prepend_bos`` put its special ids around each document. Documents of fewer than ``min_tokens`` tokens are left
    out, with ``dedup`` those whose tokens were there before; the rest is shuffled by the seed ``shuffle_documents``.
    ``part`` (i, n) makes part i of n, from 0, whose name is ``{output_prefix}-{i}-of-{n}``, with five digits.
    ``resume`` continues a killed run of the same arguments, and does nothing if that had finished.

    Raises :class:`DataError` naming file and line of a document that is malformed or lacks a key, unless ``on_error``
    is ``skip`` and others are fine, and of an input file that is cut short or damaged, in any case. What an error
    leaves behind is kept for ``resume`` once the journal has recorded it; no file has its final name then.
    """
    assert on_error in get_args(OnError), on_error
    started = time.monotonic()
    if len({*keys}) < len(keys):
        raise DataError(f"the keys {', '.join(keys)} are not distinct: each becomes a pair of its own")
    require_name(output_prefix)
    listing = list_inputs(inputs, keys, partial(_is_output, output_prefix, keys))
    for note in listing.notes:
        log.warning("%s", note)
    files = listing.inputs
    if part is not None:
        if dedup or shuffle_documents is not None:
            raise DataError(
                "--dedup and --shuffle-documents do not apply to a shard, which sees only its own documents\n"
                f"  give them to {typed('merge')}, which has both options."
            )
        files = shard(files, *part)
        output_prefix = f"{output_prefix}-{part[0]:05}-of-{part[1]:05}"
    reference = load_tokenizer(tokenizer, special_tokens)
    if append_eod and reference.eod is None:
        raise DataError(f"the tokenizer {tokenizer} has no end-of-text token to append{_how_to_name(tokenizer, 'eos')}")
    if prepend_bos and reference.bos is None:
        raise DataError(
            f"the tokenizer {tokenizer} has no begin-of-text token to prepend{_how_to_name(tokenizer, 'bos')}"
        )
    arguments = Arguments(
        append_eod=append_eod,
        prepend_bos=prepend_bos,
        min_tokens=min_tokens,
        dedup=dedup,
        shuffle_documents=shuffle_documents,
        shard=f"{part[0]}/{part[1]}" if part else None,
        on_error=on_error,
        special_tokens=reference.special_tokens,
    )
    prefixes = [f"{output_prefix}_{key}_document" for key in keys]
    job = Job(files, listing.unread, prefixes, list(keys), reference, arguments)
    with ExitStack() as stack:
        try:
            for prefix in prefixes:
                stack.callback(lock_pair(prefix).release)
        except CannotWriteError:
            # What is finished needs no writing, as in a folder that has become read-only.
            if not (resume and (manifests := job.finished())):
                raise
        else:
            manifests = job(fast, workers, resume, show_progress)
    left_out = manifests[0].left_out
    notes = [*listing.notes, *job.notes, *_copies(manifests[0]), *filter(None, map(_special_note, manifests))]
    return Summary(
        tuple(Pair.of(prefix, manifest) for prefix, manifest in zip(prefixes, manifests, strict=True)),
        sum(left_out.malformed.values()),
        tuple(left_out.first_malformed),
        manifests[0].content_bytes,
        job.content_read,
        sum(file.share for file in files),
        time.monotonic() - started,
        job.was_finished,
        tuple(notes),
    )


def _how_to_name(tokenizer: str, which: str) -> str:
    kind, file = find_tokenizer(tokenizer)
    return f"\n  name it as {which}_token in {file.with_name('tokenizer_config.json')}." if kind == "hf" else ""


def _special_note(manifest: Manifest) -> str | None:
    count = manifest.special_tokens_in_texts
    if not count:
        return None
    became = "these tokens" if manifest.special_tokens == "parse" else "ordinary text"
    times = counted(count, "time")
    return f"special tokens are written out in the texts of {manifest.key!r} {times}; they became {became}"


def _copies(manifest: Manifest) -> list[str]:
    """A note on inputs with the same content under different names; links to one file were reported before."""
    first: dict[tuple[object, ...], str] = {}
    copies = []
    for record in manifest.inputs:
        path = first.setdefault((record.checksum, record.start, record.stop), record.path)
        if path != record.path and record.size:
            copies.append(f"{record.path} (as {path})")
    shown = ", ".join(copies[:10]) + (" …" if copies[10:] else "")
    return [f"{counted(len(copies), 'input')} with the same content as another: {shown}"] if copies else []


def _is_output(output_prefix: str, keys: Sequence[str], path: str) -> bool:
    """Whether a file belongs to the pairs of this output, or to other shards of it."""
    folder, name = os.path.split(output_prefix)
    if os.path.realpath(os.path.dirname(path)) != os.path.realpath(folder):
        return False
    ours = rf"{re.escape(name)}(-\d{{5,}}-of-\d{{5,}})?_({'|'.join(map(re.escape, keys))})_document"
    endings = r"\.(bin|idx|origins|json|lock|partial\..*)"
    return re.fullmatch(ours + endings, os.path.basename(path), re.DOTALL) is not None
