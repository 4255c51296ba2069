"""Documents from text files: JSON lines, read in chunks that worker processes parse."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.errors import DataError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file, as bytes; ``first_line`` counts from 1."""

    path: str
    first_line: int
    lines: list[bytes]
    size: int

    def texts(self, key: str) -> Iterator[str]:
        """The text of each document. Raises :class:`DataError` naming file and line of a document that has none."""
        for number, line in enumerate(self.lines, start=self.first_line):
            if line.isspace():
                continue
            try:
                text = _text_of(line, key)
                text.encode()  # JSON may escape half of a surrogate pair, which is no text
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}, line {number}: {error}") from None
            yield text


def _text_of(line: bytes, key: str) -> str:
    try:
        document: Any = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError('not a JSON object such as {"text": "…"}')
    if key not in document:
        raise ValueError(f"the document has no key {key!r}; it has {', '.join(map(repr, document)) or 'none'}")
    text = document[key]
    if not isinstance(text, str):
        raise ValueError(f"the value of {key!r} is {type(text).__name__}, not text")
    return text


def total_size(paths: Sequence[str | Path]) -> int:
    """Bytes of all files. Raises :class:`DataError` for one that cannot be read, before any work is done."""
    total = 0
    for path in paths:
        try:
            with open(path, "rb") as file:
                total += file.seek(0, 2)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
    return total


def read_chunks(paths: Sequence[str | Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The lines of the files in order, in chunks of about ``chunk_bytes``; a line is never split."""
    for path in paths:
        with open(path, "rb") as file:
            first_line = 1
            # readlines stops once it has read that many bytes, at the end of a line.
            while lines := file.readlines(chunk_bytes):
                yield Chunk(str(path), first_line, lines, sum(map(len, lines)))
                first_line += len(lines)


def read_texts(paths: Sequence[str | Path], key: str) -> Iterator[str]:
    """Documents of JSON-lines files (``.jsonl``, ``.json``), and the lines of any other file as plain text."""
    for path in paths:
        is_json = Path(path).suffix in (".jsonl", ".json")
        for chunk in read_chunks([path]):
            if is_json:
                yield from chunk.texts(key)
            else:
                # A BPE is trained on words: where a plain text is cut does not matter, only that lines stay whole.
                yield b"".join(chunk.lines).decode("utf-8", errors="replace")
