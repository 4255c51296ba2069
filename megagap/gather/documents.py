"""Documents from files: read, chosen and written as JSON lines."""

import ast
import gzip
import hashlib
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagap.errors import printable
from megagap.files import partial_name, publish, writing
from megagap.gather.markup import html_to_text, roff_to_text
from megagap.gather.notes import note
from megagap.terminal.progress import ProgressBar

SHORTEST = 200
"""Minimum characters of a document; shorter ones are stubs or pages of links."""

NO_PROSE = re.compile(r"genindex|py-modindex|search\.html|contents\.html|_toc\.|_abt\.|-index\.|/index\.")
"""Pages that list other pages."""

TRANSLATORS_NOTE = re.compile(r"\n\n(?:TRADUCTION|COLOPHON)\n\n.*", re.DOTALL)
"""The same lines at the end of every manual page."""


@dataclass(frozen=True)
class Document:
    text: str
    source: str


def python_library() -> Iterator[Path]:
    """The sources of the running Python's standard library, without its tests and tables of data."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        if not skipped & set(path.relative_to(library).parts):
            yield path


def python_docstrings() -> Iterator[Document]:
    """English in Python itself: the topics of ``help()``, and the docstrings of each module."""
    try:
        from pydoc_data import topics
    except ImportError:
        pass
    else:
        yield from (Document(text, f"pydoc: {topic}") for topic, text in topics.topics.items())
    for path in python_library():
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        yield Document("\n\n".join(text for text in texts if text), f"docstrings: {path.name}")


def shuffled(files: list[Path]) -> list[Path]:
    """An order that depends on the names only, without regard to folders."""
    return sorted(files, key=lambda path: hashlib.blake2b(source_of(path).encode()).digest())


def read_all(files: list[Path], language: str) -> Iterator[Document]:
    for path in ProgressBar(files, desc=language, unit="file", leave=False, disable=None):
        if language == "code" or not NO_PROSE.search(str(path)):
            try:
                text = read_text(path)
            except (OSError, EOFError, zlib.error) as error:
                note(f"{path}: skipped: {error}")
                continue
            yield Document(text, source_of(path))


def read_text(path: Path) -> str:
    """The readable text of a page of HTML, a compressed manual page, or a plain file."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    if "\ufffd" in text:  # older pages are in Latin-1
        text = content.decode("latin-1")
    if path.suffix == ".html":
        return html_to_text(text)
    if path.suffix == ".gz":
        return TRANSLATORS_NOTE.sub("", roff_to_text(text))
    return text


def source_of(path: Path) -> str:
    """Where a document comes from, without the folder that it was unpacked to."""
    text = printable(str(path))
    return text.partition("/downloads/")[2] or text


def select(documents: Iterator[Document], limit: float) -> Iterator[Document]:
    """Different documents that are long enough, up to ``limit`` bytes of text."""
    seen: set[bytes] = set()
    size = 0
    for document in documents:
        content = document.text.encode()
        digest = hashlib.blake2b(content).digest()
        if len(document.text) < SHORTEST or digest in seen:
            continue
        seen.add(digest)
        size += len(content)
        if size > limit and len(seen) > 1:
            return
        yield document


def write(path: Path, documents: Iterator[Document]) -> tuple[int, int]:
    """Write JSON lines of ``text`` and ``source``; returns the number of documents and the bytes of text."""
    temporary = partial_name(path)
    count = size = 0
    try:
        with writing(path):
            with temporary.open("w", encoding="utf-8") as file:
                for document in documents:
                    count += 1
                    size += len(document.text.encode())
                    line = json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False)
                    file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count, size
