"""Real text from this machine for a first training run: one JSON-lines file per language."""

from pathlib import Path

from megagap.errors import counted
from megagap.files import make_folder
from megagap.gather.documents import python_docstrings, python_library, read_all, select, shuffled, write
from megagap.gather.notes import note
from megagap.gather.packages import PACKAGES, DebianPackages, package_files

LANGUAGES = ("en", "fr", "code")


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
        print(f"{path}: {counted(count, 'document')}, {size / 1e6:.1f} MB of text")
    return written
