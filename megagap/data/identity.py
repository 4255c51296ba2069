"""Detects that a token file was rebuilt, without reading all of it."""

import json
import os
from dataclasses import dataclass
from typing import Any

import xxhash

from megagap.data.format import HEADER
from megagap.data.token_file import open_tokens
from megagap.errors import DataError
from megagap.files import read_regular, reading
from megagap.token_formats import format_of

SAMPLED_BLOCKS = 16
BLOCK_BYTES = 4096

Identity = dict[str, Any]
"""``sequences``, ``documents``, ``tokens``, ``dtype`` and ``checksum``: xxh3_64 of the index's header and of blocks
that are spread over both files. ``manifest``: the checksums of both files that the manifest beside them states."""

_WORDS = {"checksum": "checksum of sampled blocks", "manifest": "checksums of the whole files"}


def identify(prefix: str) -> Identity:
    """Reads at most about 130 KB of a pair. Raises :class:`DataError` if it cannot be read."""
    dataset = open_tokens(prefix)
    digest = xxhash.xxh3_64()
    for path in (dataset.index_path, dataset.tokens_path):
        with reading(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(file.read(HEADER.size))
            for i in range(SAMPLED_BLOCKS):
                file.seek(max(size - BLOCK_BYTES, 0) * i // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return {
        "sequences": len(dataset),
        "documents": dataset.document_count,
        "tokens": dataset.token_count,
        "dtype": dataset.dtype.name,
        "checksum": digest.hexdigest(),
        "manifest": _stated_checksums(prefix),
    }


def _stated_checksums(prefix: str) -> list[str] | None:
    """Those of ``.bin`` and ``.idx`` in ``PREFIX.json``; None if it is missing or has none."""
    try:
        files = json.loads(read_regular(f"{prefix}.json"))["files"]
        return [str(files[ending]["checksum"]) for ending in (".bin", ".idx")]
    except (DataError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def differences(before: Identity, now: Identity) -> list[str]:
    """What changed, in words. Adding or removing a manifest is not a change."""
    return [
        f"{_WORDS.get(key, key)} was {before.get(key)}, is {now[key]}"
        for key in now
        if before.get(key) != now[key] and not (key == "manifest" and None in (before.get(key), now[key]))
    ]


@dataclass(frozen=True)
class _Stamp:
    """File-system metadata that changes when a file is written."""

    device: int
    inode: int
    size: int
    modified: int


class Watch:
    """Detects whether a pair has changed since this was created."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._stamps = self._look()
        self.identity = identify(prefix)
        if self._look() != self._stamps:
            raise DataError(f"{prefix} is being written: wait until its preprocessing is done")

    def require_unchanged(self, source: str) -> None:
        """Two system calls. Raises :class:`DataError` naming the source and what changed."""
        stamps = self._look()
        if stamps == self._stamps:
            return
        try:
            now = identify(self.prefix)
        except DataError as error:  # as between the two files of a pair that is being replaced
            raise DataError(f"source {source} was changed while the run reads it: {error.args[0]}") from None
        changes = differences(self.identity, now)
        if changes or [s and s.size for s in stamps] != [s and s.size for s in self._stamps]:
            raise DataError(
                f"source {source} was rebuilt while the run reads it: {self.prefix}: {'; '.join(changes)}\n"
                "  do not change data sets during training. Restore the old one to resume from a checkpoint, "
                "or start a new run."
            )
        self._stamps = stamps  # the same content: touched, or replaced by a copy

    def _look(self) -> list[_Stamp | None]:
        stamps: list[_Stamp | None] = []
        known = format_of(self.prefix)
        for ending in (known.index, known.tokens):
            try:
                found = os.stat(self.prefix + ending)
            except (OSError, ValueError):
                stamps.append(None)  # opening it reports why
            else:
                stamps.append(_Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
        return stamps
