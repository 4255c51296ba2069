"""What a file contains, by how it starts: JSON lines, plain text, Parquet, or another format that is refused by name.

Content decides, not the name, with one exception: a file is plain text only if it is named ``*.txt`` and does not start
with a line that is a JSON object.
"""

import json
import os
import re
from shlex import quote
from typing import Self

from megagap.data import origin_map
from megagap.data.format import MAGIC
from megagap.data.manifest import RecordKind
from megagap.errors import DataError
from megagap.files import GIT_LFS_FAULT, GIT_LFS_POINTER

Kind = RecordKind
"""JSON lines, a plain text, the rows of a Parquet file."""

TEXT_ENDING = ".txt"
ENDINGS = (".jsonl", ".ndjson", ".jsonlines", TEXT_ENDING, ".parquet")
"""A file with one of these name endings, in lower or upper case, is meant to be text for training."""
COMPRESSED_ENDINGS = (".gz", ".gzip", ".zst", ".zstd")

LOOKED_AT = 1 << 16
"""Bytes at the start of a file that determine its kind."""

AS_JSON_LINES = 'write its texts as JSON lines, one object per line: {"text": "…"}'
FROM_ARROW = "write it as JSON lines first: datasets.load_from_disk(FOLDER).to_json('text.jsonl')"
PARQUET_MAGIC = b"PAR1"
ENCRYPTED_PARQUET_MAGIC = b"PARE"
UNREAD_COMPRESSION = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7-Zip",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
    b"\x1f\x9d": "compress",
    b"Rar!\x1a": "RAR",
}
OTHER_FORMATS = {
    MAGIC: ("is the index of a token file, not text", "train on it, or give the text that it was made from."),
    origin_map.MAGIC: ("is the map of a token file, not text", "train on it, or give the text that it was made from."),
    ENCRYPTED_PARQUET_MAGIC: ("is an encrypted Parquet file", "write it again without encryption."),
    b"ARROW1": ("is an Arrow file", FROM_ARROW),
    b"\xff\xff\xff\xff": ("is an Arrow file, such as datasets.save_to_disk writes", FROM_ARROW),
    b"%PDF-": ("is a PDF", "extract its text first."),
    b"SQLite format 3\x00": ("is an SQLite database", AS_JSON_LINES),
    b"\x89HDF": ("is an HDF5 file", AS_JSON_LINES),
    b"\x93NUMPY": ("is a numpy array", AS_JSON_LINES),
    b"Obj\x01": ("is an Avro file", AS_JSON_LINES),
    GIT_LFS_POINTER: GIT_LFS_FAULT,
    b"WARC/1.": ("is a web archive (WARC)", "extract the text of its pages first, such as with datatrove."),
}
"""By their first bytes: what they are, and what to do."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257

STARTS_AN_OBJECT = re.compile(rb'\{\s*"')
STARTS_AN_ARRAY = re.compile(rb'\[\s*([\[{"]|$)')
OBJECT_ON_A_LINE = re.compile(rb"^\s*\{", re.MULTILINE)


class NotTextError(DataError):
    """A file is something other than text for training; ``what`` says what, in a few words after its name."""

    what: str = ""

    @classmethod
    def of(cls, path: str, what: str, advice: str) -> Self:
        error = cls(f"{path} {what}\n  {advice}")
        error.what = what
        return error


def is_named_like_text(path: str) -> bool:
    """Whether the name says that a file is text for training."""
    return _without_compression(path).endswith(ENDINGS)


def _without_compression(path: str) -> str:
    name = path.lower()
    for ending in COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    return name


def kind_of(path: str, start: bytes, looked_at: int, any_text: bool) -> Kind:
    """The kind of a file whose content starts with ``start``.

    ``looked_at``: at least that many bytes, unless the file is shorter; 0 if it may be fewer, as from a pipe.
    ``any_text`` takes every file that does not start like JSON as plain text. Raises :class:`NotTextError`.
    """
    if start.startswith(PARQUET_MAGIC):
        return "rows"
    _refuse_other_formats(path, start)
    head = start.removeprefix(BYTE_ORDER_MARK).lstrip()
    line, end, _ = head.partition(b"\n")
    if _without_compression(path).endswith(TEXT_ENDING):
        if not end and looked_at and len(start) >= looked_at:  # only the start of a long line
            return "lines" if STARTS_AN_OBJECT.match(line) else "text"
        return "lines" if isinstance(parse_line(line), dict) else "text"
    if any_text and not head.startswith(b"{") and not re.match(rb"\[\s*\{", head):
        return "text"
    if looked_at:
        _refuse_other_texts(path, head)
    return "lines"


def _refuse_other_formats(path: str, start: bytes) -> None:
    for magic, name in UNREAD_COMPRESSION.items():
        if start.startswith(magic):
            what = f"is compressed with {name}, which is not supported; gzip and Zstandard are"
            raise NotTextError.of(path, what, "decompress it, or compress it with one of these.")
    for magic, (what, advice) in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise NotTextError.of(path, what, advice)
    if start.startswith(UTF16_MARKS):
        raise NotTextError.of(path, "is in UTF-16; only UTF-8 is supported", "convert it: iconv -f UTF-16 -t UTF-8")
    if start[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        raise NotTextError.of(path, "is a tar archive", "unpack it, and give the files.")
    seen = start[:4096]
    if seen.count(b"\0") * 10 > len(seen):
        prefix = path.removesuffix(".bin")
        if prefix != path and os.path.exists(f"{prefix}.idx"):
            what, advice = OTHER_FORMATS[MAGIC]
            raise NotTextError.of(path, what.replace("the index", "part"), advice)
        raise NotTextError.of(path, "is binary or in UTF-16, not text in UTF-8", AS_JSON_LINES)


def _refuse_other_texts(path: str, head: bytes) -> None:
    """``head``: the start of a file that should be JSON lines, without leading white space."""
    line, end, rest = head.partition(b"\n")
    first = parse_line(line)
    if isinstance(first, dict) or (isinstance(first, list) and rest.strip()):
        return  # an array on a line is a fault of that line, if others follow
    if isinstance(first, list) or STARTS_AN_ARRAY.match(line.strip()):
        what = "is a JSON array, not JSON lines: one object per line"
        raise NotTextError.of(path, what, f"convert it: jq -c '.[]' {quote(path)} > {quote(_stem(path))}.jsonl")
    if end and line.startswith(b"{") and _continues_below(line, rest):
        if b'"manifest_version"' in head:
            what = "is the manifest of a token file, not text"
            raise NotTextError.of(path, what, "give the text that it was made from.")
        what = "is JSON spread over several lines, not JSON lines: one object per line"
        raise NotTextError.of(path, what, f"convert it: jq -c . {quote(path)} > {quote(_stem(path))}.jsonl")
    if not head or OBJECT_ON_A_LINE.search(head):
        return
    if head.startswith(b"<"):
        raise NotTextError.of(path, "is HTML or XML, not JSON lines", f"extract its text, then {AS_JSON_LINES}")
    if path.lower().endswith((".csv", ".tsv")) or _is_table(line, rest):
        separator = ", sep='\\t'" if line.count(b"\t") > line.count(b",") else ""
        code = f"pandas.read_csv({path!r}{separator}).to_json({_stem(path) + '.jsonl'!r}, orient='records', lines=True)"
        raise NotTextError.of(path, "looks like CSV, not JSON lines", f"convert it: {code}")
    shown = line[:40].decode("utf-8", "backslashreplace")
    if path.lower().endswith((".parquet", *COMPRESSED_ENDINGS)):
        what = f"is not what its name says: it starts with {shown!r}"
        raise NotTextError.of(path, what, "the file is damaged or misnamed. Copy or create it again.")
    raise NotTextError.of(
        path,
        f"is not JSON lines: it starts with {shown!r}",
        'give one JSON object per line, {"text": "…"}, or name a plain text *.txt.',
    )


def parse_line(line: bytes) -> object:
    """A line parsed as JSON; None if it is not valid."""
    try:
        return json.loads(line, parse_int=float)  # an integer of more than 4,300 digits would be refused
    except (ValueError, RecursionError):
        return None


def _continues_below(line: bytes, rest: bytes) -> bool:
    """Whether an object begins on this line and ends on a later one: valid so far, but incomplete."""
    text = line.decode("utf-8", "replace").rstrip()
    try:
        json.loads(text, parse_int=float)
    except json.JSONDecodeError as error:
        following = rest.lstrip().partition(b"\n")[0]
        return error.pos >= len(text) and not isinstance(parse_line(following), dict)
    except RecursionError:
        pass
    return False


def _is_table(line: bytes, rest: bytes) -> bool:
    following = rest.partition(b"\n")[0]
    if any(byte < ord("\t") for byte in line):
        return False  # binary
    return any(0 < line.count(separator) == following.count(separator) for separator in (b",", b"\t", b";"))


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]
