"""Gather real text on this machine for a first training run: one JSON-lines file per language.

code is Python's own standard library. English and French are manual pages, Debian's handbook and reference, and the
documentation of Python and LilyPond, from Debian packages that are downloaded and unpacked without being installed.
Licences vary by document: use it, but do not redistribute it.
"""

import argparse
import ast
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from text_from_markup import html_to_text, roff_to_text
from tqdm import tqdm

from megagap.errors import DataError, printable, run_tool
from megagap.files import make_folder, partial_name, publish, writing

EXAMPLES = """
examples:
  python tools/gather_text.py --output runs/quickstart/corpus
  python tools/gather_text.py --output corpus --languages fr,code --megabytes 5
      at most 5 MB of each; downloads stay in corpus/downloads, and a second call needs no network
"""


@dataclass(frozen=True)
class Package:
    """A Debian package and the files in it that are text of one language."""

    names: tuple[str, ...]
    """The first one available is used: names change with the release."""
    files: str
    """Glob within the unpacked package."""


PYTHON_DOCUMENTATION = tuple(f"python3.{minor}-doc" for minor in (11, 12, 13, 10, 9))
PACKAGES = {
    "en": (
        Package(PYTHON_DOCUMENTATION, "usr/share/doc/python3*/html/**/*.html"),
        Package(("manpages",), "usr/share/man/man*/*.gz"),
        Package(("manpages-dev",), "usr/share/man/man*/*.gz"),
        Package(("debian-handbook",), "usr/share/doc/debian-handbook/html/en-US/*.html"),
        Package(("debian-reference-en",), "usr/share/debian-reference/*.en.html"),
    ),
    "fr": (
        Package(("manpages-fr",), "usr/share/man/fr/man*/*.gz"),
        Package(("manpages-fr-dev",), "usr/share/man/fr/man*/*.gz"),
        Package(("debian-handbook",), "usr/share/doc/debian-handbook/html/fr-FR/*.html"),
        Package(("debian-reference-fr",), "usr/share/debian-reference/*.fr.html"),
        Package(("lilypond-doc-html-fr",), "usr/share/doc/lilypond/html/Documentation/**/*.fr.html"),
    ),
}
LANGUAGES = ("en", "fr", "code")

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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for LANGUAGE.jsonl")
    parser.add_argument(
        "--languages",
        type=languages,
        default=LANGUAGES,
        metavar="L,…",
        help=f"of {', '.join(LANGUAGES)} (default: all)",
    )
    parser.add_argument(
        "--megabytes",
        type=megabytes,
        default=float("inf"),
        metavar="N",
        help="at most this many megabytes per language (default: all)",
    )
    given = parser.parse_args(argv)
    written = gather(given.output, given.languages, given.megabytes * 1e6)
    if not written:
        raise DataError(f"no text was found for {', '.join(given.languages)}\n  give your own files instead.")


def languages(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in chosen if name not in LANGUAGES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; possible: {', '.join(LANGUAGES)}")
    return chosen


def megabytes(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return number


def gather(output: Path, chosen: tuple[str, ...], limit: float) -> list[Path]:
    """Write LANGUAGE.jsonl for each language of which there is text, at most ``limit`` bytes of text each."""
    make_folder(output)
    packages = DebianPackages(output / "downloads")
    written = []
    for language in chosen:
        path = output / f"{language}.jsonl"
        files = list(python_library()) if language == "code" else list(package_files(packages, PACKAGES[language]))
        count, size = write(path, select(read_all(shuffled(files), language), limit))
        if not count and language == "en":
            note("en: using the documentation in Python's standard library instead")
            count, size = write(path, select(python_docstrings(), limit))
        if not count:
            path.unlink()
            note(f"{language}: skipped: no text was found")
            continue
        written.append(path)
        print(f"{path}: {count:,} document{'s' * (count != 1)}, {size / 1e6:.1f} MB of text")
    return written


def note(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- sources


class DebianPackages:
    """Downloads Debian packages and unpacks them under ``folder``, without installing and without root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._updated = False

    def unpacked(self, names: tuple[str, ...]) -> Path | None:
        """The folder of the first package that is available; None, and a note, if none is."""
        for name in names:
            if (self.folder / name).is_dir():
                return self.folder / name
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            note(f"{names[0]}: skipped: this machine has no apt-get")
            return None
        reasons = []
        for name in names:
            reason = self._fetch(name)
            if not reason:
                return self.folder / name
            reasons.append(reason)
        note(f"{names[0]}: skipped: {reasons[0]}")
        return None

    def _fetch(self, name: str) -> str:
        """Download and unpack; the reason if that fails, else nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=self.folder) as temporary:
            download = ["apt-get", "download", name]
            reason = self._run(download, temporary)
            # A fresh machine has no lists of packages, and only root may fetch them.
            if reason and not self._updated and os.geteuid() == 0:
                self._updated = True
                self._run(["apt-get", "update"], temporary)
                reason = self._run(download, temporary)
            archives = list(Path(temporary).glob("*.deb"))
            if reason or not archives:
                return reason or "apt-get downloaded nothing"
            whole = Path(temporary) / "unpacked"
            reason = self._run(["dpkg-deb", "--extract", str(archives[0]), str(whole)], temporary)
            if not reason:
                whole.rename(self.folder / name)
            return reason

    def _run(self, command: list[str], folder: str) -> str:
        options = ["-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=1"]
        if os.geteuid() == 0:
            options += ["-o", "APT::Sandbox::User=root"]  # apt's own user may not write here
        command = [command[0], *options, *command[1:]] if command[0] == "apt-get" else command
        try:
            done = subprocess.run(
                command, cwd=folder, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, timeout=300
            )
        except subprocess.TimeoutExpired:
            return f"{command[0]} took more than 5 minutes"
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"{command[0]}: {lines[-1]}" if done.returncode else ""


def package_files(packages: DebianPackages, wanted: tuple[Package, ...]) -> Iterator[Path]:
    for package in tqdm(wanted, desc="packages", unit="package", leave=False, disable=None):
        folder = packages.unpacked(package.names)
        if folder is not None:
            # Some files are links to others: duplicate texts are dropped later.
            yield from sorted(path for path in folder.glob(package.files) if path.is_file())


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


# -------------------------------------------------------------------------------------------------------- documents


def shuffled(files: list[Path]) -> list[Path]:
    """An order that depends on the names only, without regard to folders."""
    return sorted(files, key=lambda path: hashlib.blake2b(source_of(path).encode()).digest())


def read_all(files: list[Path], language: str) -> Iterator[Document]:
    for path in tqdm(files, desc=language, unit="file", leave=False, disable=None):
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


if __name__ == "__main__":
    run_tool(main)
