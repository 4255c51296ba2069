"""``PREFIX.json`` beside a ``.bin``/``.idx`` pair: what it was made of and with, so that it can be accounted for."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from megagap.data.partial import checksum_of
from megagap.data.tokenizer import Tokenizer, find_tokenizer, fingerprint
from megagap.errors import DataError

OnError = Literal["stop", "skip"]
"""What to do about a document that is malformed or lacks a text: end with its error, or leave it out."""

PACKAGES = ("megagap", "numpy", "orjson", "tokenizers", "tiktoken", "sentencepiece", "pyarrow", "gigatoken")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputRecord(_Strict):
    """A file that was read, or of JSON lines the lines that start at bytes ``[start, stop)``."""

    path: str
    size: NonNegativeInt | None
    """Bytes of the whole file; null of a pipe."""
    start: NonNegativeInt = 0
    stop: NonNegativeInt | None = None
    checksum: str
    """xxh3_64 of the file, or of the lines that were read of it."""


class TokenizerRecord(_Strict):
    spec: str
    kind: str
    fingerprint: str
    """Of what its ids mean (:func:`megagap.data.tokenizer.fingerprint`)."""
    checksum: str
    """xxh3_64 of its file."""
    vocab_size: NonNegativeInt
    bos: int | None
    eod: int | None


class Arguments(_Strict):
    """What else the tokens depend on."""

    append_eod: bool
    prepend_bos: bool
    min_tokens: NonNegativeInt
    dedup: bool
    shuffle_documents: int | None
    shard: str | None
    on_error: OnError


class LeftOut(_Strict):
    """Documents that were read and are not in the pair."""

    empty: NonNegativeInt
    """Without text, or of no tokens."""
    short: NonNegativeInt
    """Of fewer than ``min_tokens``."""
    duplicate: NonNegativeInt
    malformed: dict[str, NonNegativeInt]
    """By reason."""
    first_malformed: list[str]
    """File, line and fault of the first few."""


class FileRecord(_Strict):
    size: NonNegativeInt
    checksum: str
    """xxh3_64."""


class Manifest(_Strict):
    """All there is to know of a pair."""

    manifest_version: Literal[1] = 1
    key: str
    """Of JSON or Parquet documents, the name of the text."""
    dtype: str
    documents: NonNegativeInt
    tokens: NonNegativeInt
    characters: NonNegativeInt
    """Unicode code points of the texts that became tokens, duplicates that were left out later included."""
    left_out: LeftOut
    tokenizer: TokenizerRecord
    arguments: Arguments
    inputs: list[InputRecord]
    files: dict[str, FileRecord]
    """``.bin`` and ``.idx``."""
    versions: dict[str, str]

    def require_files(self, prefix: str) -> None:
        """Read both files of the pair. Raises :class:`DataError` if either is not what was written."""
        for ending, file in self.files.items():
            if checksum_of(prefix + ending) != file.checksum:
                raise DataError(f"{prefix}{ending} is damaged: it has another checksum than its manifest says")


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a pair; None if it has none.

    Raises :class:`DataError` if it cannot be read, is no manifest, or belongs to files of other sizes.
    """
    path = manifest_path(prefix)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        named = ((".".join(map(str, fault["loc"])) or "all of it", fault["msg"]) for fault in error.errors())
        faults = "\n".join(f"  {place}: {message}" for place, message in named)
        raise DataError(f"{path} is no manifest of a token file that this version can read:\n{faults}") from None
    if manifest.files.keys() != {".bin", ".idx"}:
        raise DataError(f"{path} should tell of a .bin and an .idx, not of {', '.join(manifest.files) or 'nothing'}")
    for ending, file in manifest.files.items():
        try:
            size = Path(f"{prefix}{ending}").stat().st_size
        except OSError:
            continue  # whoever opens the pair says that it is incomplete
        if size != file.size:
            raise DataError(
                f"{prefix}{ending} is {size:,} bytes, and {path} tells of one of {file.size:,}\n"
                "  they do not belong together: the pair was damaged or replaced. Preprocess the text again."
            )
    return manifest


def tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    kind, file = find_tokenizer(tokenizer.spec)
    return TokenizerRecord(
        spec=str(tokenizer.spec),
        kind=kind,
        fingerprint=fingerprint(tokenizer),
        checksum=checksum_of(file),
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos,
        eod=tokenizer.eod,
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages, as far as they are there, that tokens may depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
