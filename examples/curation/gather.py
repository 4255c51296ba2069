"""Real text to curate, from Debian packages: French and English, and what a crawl has beside it.

    python examples/curation/gather.py runs/curation/corpus [megabytes of each package]

Writes one JSON-lines file per package: manual pages, handbooks and references in French and English (some 40 MB),
Debian's handbook in other languages and Python's sources, which curation is to drop. Downloads stay in the folder's
parent, in downloads/. Licences vary by page: use the text, do not redistribute it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from megagap.errors import counted, run_tool
from megagap.gather.documents import python_library, read_all, select, shuffled, write
from megagap.gather.notes import note
from megagap.gather.packages import PYTHON_DOCUMENTATION, DebianPackages

MAN = "usr/share/man/{}man*/*.gz"
HANDBOOK = "usr/share/doc/debian-handbook/html/{}/*.html"

PACKAGES = {
    "en-python": (PYTHON_DOCUMENTATION, "usr/share/doc/python3*/html/**/*.html"),
    "en-manpages": (("manpages",), MAN.format("")),
    "en-manpages-dev": (("manpages-dev",), MAN.format("")),
    "en-handbook": (("debian-handbook",), HANDBOOK.format("en-US")),
    "en-reference": (("debian-reference-en",), "usr/share/debian-reference/*.en.html"),
    "fr-manpages": (("manpages-fr",), MAN.format("fr/")),
    "fr-manpages-dev": (("manpages-fr-dev",), MAN.format("fr/")),
    "fr-handbook": (("debian-handbook",), HANDBOOK.format("fr-FR")),
    "fr-reference": (("debian-reference-fr",), "usr/share/debian-reference/*.fr.html"),
    "fr-lilypond": (("lilypond-doc-html-fr",), "usr/share/doc/lilypond/html/Documentation/**/*.fr.html"),
    "de-handbook": (("debian-handbook",), HANDBOOK.format("de-DE")),
    "es-handbook": (("debian-handbook",), HANDBOOK.format("es-ES")),
    "it-handbook": (("debian-handbook",), HANDBOOK.format("it-IT")),
    "pt-handbook": (("debian-handbook",), HANDBOOK.format("pt-BR")),
}
"""By the name of the file: names of the package, of which the first available is used, and its files."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the text")
    parser.add_argument("megabytes", type=float, nargs="?", default=float("inf"), help="of each package, at most")
    given = parser.parse_args()
    output, limit = given.output, given.megabytes * 1e6
    packages = DebianPackages(output.parent / "downloads")
    for name, files in sources(packages):
        count, size = write(output / f"{name}.jsonl", select(read_all(shuffled(files), name[:2]), limit))
        if count:
            print(f"{output / name}.jsonl: {counted(count, 'document')}, {size / 1e6:.1f} MB")
        else:
            (output / f"{name}.jsonl").unlink()
            note(f"{name}: skipped: no text was found")


def sources(packages: DebianPackages) -> Iterator[tuple[str, list[Path]]]:
    for name, (wanted, pattern) in PACKAGES.items():
        folder = packages.unpacked(wanted)
        if folder is not None:
            yield name, sorted(path for path in folder.glob(pattern) if path.is_file())
    yield "code", list(python_library())


if __name__ == "__main__":
    run_tool(main)
