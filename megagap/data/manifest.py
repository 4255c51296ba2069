"""``PREFIX.json`` beside a ``.bin``/``.idx`` pair: what it was made from and how."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import xxhash
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, NonNegativeInt, ValidationError

from megagap.data.format import DTYPE_OF_CODE
from megagap.data.origin_map import ENDING
from megagap.data.partial import checksum_of
from megagap.errors import DataError, printable
from megagap.files import read_regular, reading
from megagap.tokenizer import SpecialTokens, Tokenizer, find_tokenizer, fingerprint, usual_special_tokens

if TYPE_CHECKING:
    from megagap.tokenizer.huggingface import HuggingFaceTokenizer

OnError = Literal["stop", "skip"]
"""What to do about a document that is malformed or lacks a text: stop with an error, or leave it out."""

RecordKind = Literal["lines", "rows", "text"]
"""What the records of an input are."""

PACKAGES = ("megagap", "numpy", "orjson", "tokenizers", "tiktoken", "sentencepiece", "pyarrow", "gigatoken")


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _shard(value: str) -> str:
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError("should be I/N, part I of N from 0")
    return value


def _dtype(value: str) -> str:
    if value not in {dtype.name for dtype in DTYPE_OF_CODE.values()}:
        raise ValueError("is not a token dtype")
    return value


Text = Annotated[str, BeforeValidator(_printable)]
"""Text in which names of files may occur (:func:`megagap.errors.printable`)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class InputRecord(_Strict):
    """A file that was read, or of JSON lines the lines that start at bytes ``[start, stop)``."""

    path: Text
    size: NonNegativeInt | None
    """Bytes of the whole file as it is stored, compressed or not; null of a pipe."""
    start: NonNegativeInt = 0
    stop: NonNegativeInt | None = None
    checksum: str
    """xxh3_64 of the file, or of the lines that were read of it."""
    kind: RecordKind | None = None
    """What one record is: a line, a row, or the whole of a plain text; null where records were not counted."""
    records: NonNegativeInt | None = None
    """Lines or rows that were read, blank lines and documents that were left out included; 1 for a plain text."""


class UnreadRecord(_Strict):
    """A file, or a folder with all its contents, that was found among the inputs and was not read."""

    path: Text
    reason: Text


class TokenizerRecord(_Strict):
    spec: Text
    kind: str
    fingerprint: str
    """Checksum of what its ids mean (:func:`megagap.tokenizer.fingerprint`)."""
    checksum: str
    """xxh3_64 of its file."""
    effective: str | None = None
    """xxh3_64 of the ``tokenizer.json`` that gives the same ids without files beside it; null for other kinds."""
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
    shard: Annotated[str, AfterValidator(_shard)] | None
    """I/N: part I of N, from 0."""
    on_error: OnError
    special_tokens: SpecialTokens | None = None
    """What those written out in a text became; null in manifests older than this option."""


class LeftOut(_Strict):
    """Documents that were read and are not in the pair."""

    empty: NonNegativeInt
    """Without text, or of no tokens."""
    short: NonNegativeInt
    """Of fewer than ``min_tokens``."""
    duplicate: NonNegativeInt
    malformed: dict[Text, NonNegativeInt]
    """By reason."""
    first_malformed: list[Text]
    """File, line and fault of the first few."""


class FileRecord(_Strict):
    size: NonNegativeInt
    checksum: str
    """xxh3_64."""


class Manifest(_Strict):
    """All there is to know about a pair."""

    manifest_version: Literal[1] = 1
    key: Text
    """For JSON or Parquet documents, the key of the text."""
    dtype: Annotated[str, AfterValidator(_dtype)]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    characters: NonNegativeInt
    """Unicode code points of the texts that became tokens, duplicates that were left out later included."""
    text_bytes: NonNegativeInt | None = None
    """UTF-8 bytes of the texts of the pair; null where they were not counted, or repeated documents were left out."""
    content_bytes: NonNegativeInt | None = None
    """Bytes that were read of all inputs, uncompressed: of JSON lines whole lines, of Parquet files only the columns of
    the texts, as the files say. Null where they were not counted."""
    special_tokens_in_texts: NonNegativeInt | None = None
    """Special tokens written out in the texts that became tokens; null where they were not counted."""
    left_out: LeftOut
    tokenizer: TokenizerRecord
    arguments: Arguments
    inputs: list[InputRecord]
    unread: list[UnreadRecord] = []
    """Files among the inputs that are not text for training."""
    files: dict[str, FileRecord]
    """``.bin``, ``.idx`` and, where it is known from which records the documents came, ``.origins``."""
    versions: dict[str, str]

    @property
    def special_tokens(self) -> SpecialTokens:
        """What special tokens written out in a text became."""
        return self.arguments.special_tokens or usual_special_tokens(self.tokenizer.kind)

    def require_files(self, prefix: str) -> None:
        """Read all files of the pair. Raises :class:`DataError` if one is not what was written."""
        for ending, file in self.files.items():
            with reading(prefix + ending):
                checksum = checksum_of(prefix + ending)
            if checksum != file.checksum:
                raise DataError(f"{prefix}{ending} is damaged: its checksum is not the one in its manifest")


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a pair; None if it has none.

    Raises :class:`DataError` if it cannot be read, is not a manifest, or belongs to files of other sizes.
    """
    path = manifest_path(prefix)
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        named = ((".".join(map(str, fault["loc"])) or "all of it", fault["msg"]) for fault in error.errors())
        faults = "\n".join(f"  {place}: {message}" for place, message in named)
        raise DataError(
            f"{path} is not a token-file manifest that this version can read:\n{faults}\n"
            "  if it is something else, give it another name; without a manifest the pair can still be used."
        ) from None
    if manifest.files.keys() - {ENDING} != {".bin", ".idx"}:
        raise DataError(f"{path} should list a .bin and an .idx, not {', '.join(manifest.files) or 'nothing'}")
    for ending, file in manifest.files.items():
        try:
            size = Path(f"{prefix}{ending}").stat().st_size
        except OSError:
            continue  # whoever opens the pair reports that it is incomplete
        if size != file.size:
            raise DataError(
                f"{prefix}{ending} is {size:,} bytes, but {path} says {file.size:,}\n"
                "  they do not belong together: the pair was damaged or replaced. Preprocess the text again."
            )
    return manifest


def tokenizer_record(tokenizer: Tokenizer) -> TokenizerRecord:
    kind, file = find_tokenizer(tokenizer.spec)
    effective = None
    if kind == "hf":
        state = cast("HuggingFaceTokenizer", tokenizer).state()
        effective = xxhash.xxh3_64_hexdigest(json.dumps(state, sort_keys=True).encode())
    return TokenizerRecord(
        spec=str(tokenizer.spec),
        kind=kind,
        fingerprint=fingerprint(tokenizer),
        checksum=checksum_of(file),
        effective=effective,
        vocab_size=tokenizer.vocab_size,
        bos=tokenizer.bos,
        eod=tokenizer.eod,
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that tokens may depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
