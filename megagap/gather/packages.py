"""Texts from Debian packages, which are downloaded and unpacked without being installed."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megagap.gather.notes import note
from megagap.terminal.progress import ProgressBar


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
    for package in ProgressBar(wanted, desc="packages", unit="package", leave=False, disable=None):
        folder = packages.unpacked(package.names)
        if folder is not None:
            # Some files are links to others: duplicate texts are dropped later.
            yield from sorted(path for path in folder.glob(package.files) if path.is_file())
