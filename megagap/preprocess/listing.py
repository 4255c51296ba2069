"""Which files a user's inputs refer to. Each file is read, refused, or left unread with a reason that is reported.

A file that was named is read or refused. Of those found in a folder or by a pattern, files that contain text for
training are read, whatever their names, and others are not; but one that is named like text (``*.jsonl``) and is not
is refused, and so is a folder that cannot be listed.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from megagap.errors import DataError, printable
from megagap.files import reading
from megagap.preprocess import parquet
from megagap.preprocess.inputs import GLANCE, READING_ERRORS, Input, open_content
from megagap.preprocess.kinds import TEXT_ENDING, NotTextError, is_named_like_text, parse_line

NAMED = 10
"""Files per reason that a note lists; the manifest lists all."""
LONGEST_LINE = 1 << 26
"""Bytes of a first line that are read to find its keys."""
UNFINISHED = re.compile(r"\.partial(\.[a-z]|-\d+$)")
"""In the names of files that a megagap tool is writing, or left unfinished."""

FileId = tuple[int, int]
"""Device and inode: the same for all names of a file."""


@dataclass(frozen=True)
class Unread:
    """A file, or a folder with all its contents, that is not read."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    inputs: list[Input]
    unread: list[Unread]
    again: list[str]
    """Files that are read once, though given by more than one name."""
    twice: list[str]
    """Files that are read more than once, because they were named more than once."""

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        notes = []
        if self.unread:
            reasons: dict[str, list[str]] = {}
            for file in self.unread:
                reasons.setdefault(file.reason, []).append(file.path)
            lines = [f"\n  {_some(paths)}: {reason}" for reason, paths in reasons.items()]
            notes.append(f"{_count(self.unread)} not read:{''.join(lines)}")
        if self.again:
            notes.append(f"{_count(self.again)} read once, though named more than once: {_some(self.again)}")
        if self.twice:
            notes.append(f"{_count(self.twice)} read again because named more than once: {_some(self.twice)}")
        if empty := [file.path for file in self.inputs if file.size == 0]:
            notes.append(f"{_count(empty)} empty: {_some(empty)}")
        return notes


def _count(names: Sequence[object]) -> str:
    return "1 file is" if len(names) == 1 else f"{len(names):,} files are"


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return printable(", ".join(names[:NAMED])) + (f" and {more:,} more" if more > 0 else "")


def find_inputs(names: Sequence[str | Path], keys: Sequence[str] = ("text",)) -> list[Input]:
    """The files that :func:`list_inputs` finds."""
    return list_inputs(names, keys).inputs


def list_inputs(
    names: Sequence[str | Path],
    keys: Sequence[str] = ("text",),
    is_output: Callable[[str], bool] = lambda path: False,
    any_text: bool = False,
) -> Listing:
    """The files that ``names`` mean, in their order: files, folders and glob patterns (all that these find, by path).

    Links are followed. ``is_output``: whether a file is output of this same command, which is skipped silently.
    ``keys`` are those of texts; ``any_text`` is that of :class:`Input`. Raises :class:`DataError` for a name without
    files to read, and for a file that cannot be read or is not text.
    """
    lister = _Lister(keys, is_output, any_text)
    for name in names:
        lister.add(str(name))
    unread = [Unread(path, reason) for path, reason in lister.unread.items()]
    return Listing(lister.inputs, unread, lister.again, lister.twice)


class _Lister:
    def __init__(self, keys: Sequence[str], is_output: Callable[[str], bool], any_text: bool) -> None:
        self.inputs: list[Input] = []
        self.unread: dict[str, str] = {}
        """Reasons by path."""
        self.again: list[str] = []
        self.twice: list[str] = []
        self._keys = keys
        self._is_output = is_output
        self._any_text = any_text
        self._folders: dict[FileId, str] = {}
        """Folders listed for the current name."""
        self._files: dict[FileId, str] = {}
        self._named: set[FileId] = set()

    def add(self, name: str) -> None:
        with reading(name):
            is_folder = os.path.isdir(name)
            is_pattern = not is_folder and has_magic(name) and not os.path.lexists(name)
        if not is_folder and not is_pattern:
            self._add_named(name)
            return
        self._folders = {}
        before = len(self.unread)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        root = "/" if name.startswith("/") else ""
        found = sorted({*(self._walk(name) if is_folder else self._match(root, parts))})
        count = sum([self._add_found(path) for path in found])
        if count:
            return
        what = f"the folder {name} contains no file to read" if is_folder else f"no file matches {name}"
        if found and is_pattern:
            what = f"no file that matches {name} can be read"
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in [*self.unread.items()][before:][:NAMED])
        raise DataError(what + (reasons or f"\n  text is read from JSON lines, Parquet and {TEXT_ENDING} files."))

    def _add_named(self, path: str) -> None:
        try:
            with reading(path):
                status = os.stat(path)
        except DataError:
            if os.path.exists(f"{path}.idx"):
                raise DataError(
                    f"{path} is the prefix of a token file, not text\n"
                    "  train on it, or give the text that it was made from."
                ) from None
            if path == "-":
                raise DataError("no such file: -\n  to read standard input, give /dev/stdin.") from None
            raise
        if self._is_output(path):
            return
        if not stat.S_ISREG(status.st_mode):
            with reading(path):
                if not os.access(path, os.R_OK):
                    raise PermissionError(0, "Permission denied")
            self.inputs.append(Input(path, None, any_text=self._any_text))
            return
        identity = (status.st_dev, status.st_ino)
        if identity in self._named:
            first = self._files[identity]
            self.twice.append(path if path == first else f"{path} (the same as {first})")
        elif identity in self._files:
            self._note_again(path, self._files[identity])
            return
        self._named.add(identity)
        self._take(path, status)

    def _add_found(self, path: str) -> bool:
        """Whether there is something to read, now or already."""
        if self._is_output(path):
            return False
        try:
            status = os.stat(path)
        except OSError as error:
            target = f"a link to {os.readlink(path)}: " if os.path.islink(path) else ""
            return self._skip(path, f"{target}{error.strerror}")
        if not stat.S_ISREG(status.st_mode):
            self._note_unread(path, "not a regular file")
            return False
        if UNFINISHED.search(os.path.basename(path)):
            self._note_unread(path, "an unfinished file of megagap")
            return False
        identity = (status.st_dev, status.st_ino)
        if identity in self._files:
            self._note_again(path, self._files[identity])
            return True
        if not status.st_size and not is_named_like_text(path):
            self._note_unread(path, "empty")
            return False
        if not is_named_like_text(path) and (reason := self._reason_against(path)):
            self._note_unread(path, reason)
            return False
        self._take(path, status)
        return True

    def _skip(self, path: str, reason: str) -> bool:
        if is_named_like_text(path):
            raise DataError(f"cannot read {path}: {reason}")
        self._note_unread(path, reason)
        return False

    def _take(self, path: str, status: os.stat_result) -> None:
        with open_content(path, self._any_text, GLANCE) as content:
            if content.kind == "rows":
                with parquet.open_table(path, self._keys):
                    pass  # a missing column is reported now, not when its turn comes
        self._files.setdefault((status.st_dev, status.st_ino), path)
        self.unread.pop(path, None)  # found earlier as one to skip, and now named
        self.inputs.append(Input(path, status.st_size, status.st_mtime_ns, any_text=self._any_text))

    def _reason_against(self, path: str) -> str | None:
        """Why a file that is not named like text is not read; None if it is text."""
        try:
            with open_content(path, buffer=GLANCE) as content:
                if content.kind != "lines":
                    return None
                line = b"\n"
                while line.isspace():
                    line = content.readline(LONGEST_LINE)
        except NotTextError as error:
            return error.what
        except DataError as error:
            fault = str(error.args[0]).partition("\n")[0]
            return fault.removeprefix(f"cannot read {path}: ").removeprefix(f"{path} ")
        except READING_ERRORS:
            return "damaged or cut short"
        document = parse_line(line)
        if not isinstance(document, dict):
            return "its first line is not a JSON object" if line else "it has only blank lines"
        if not any(key in document for key in self._keys):
            return f"its first line has no key {' or '.join(map(repr, self._keys))}"
        return None

    def _note_unread(self, path: str, reason: str) -> None:
        self.unread.setdefault(path, reason)

    def _note_again(self, path: str, first: str) -> None:
        if path != first:
            self._note_unread(path, f"the same file as {first}")
        elif path not in self.again:
            self.again.append(path)

    def _walk(self, folder: str) -> Iterator[str]:
        """The files in a folder and in those below it, but for hidden ones."""
        for name in self._entries(folder):
            path = os.path.join(folder, name)
            is_folder = os.path.isdir(path)
            if name.startswith((".", "_")):  # how Spark and others name files that are not data
                self._note_hidden(path)
            elif is_folder:
                yield from self._walk(path)
            else:
                yield path

    def _note_hidden(self, path: str) -> None:
        if not self._is_output(path):
            self._note_unread(os.path.join(path, "") if os.path.isdir(path) else path, "hidden")

    def _entries(self, folder: str) -> list[str]:
        """The names in a folder; none if it was already listed under another name, as through a link."""
        with reading(f"the folder {folder}"):
            status = os.stat(folder or ".")
            first = self._folders.setdefault((status.st_dev, status.st_ino), folder)
            if os.path.normpath(first) != os.path.normpath(folder):
                self._note_unread(os.path.join(folder, ""), f"the same folder as {first}")
                return []
            try:
                return sorted(os.listdir(folder or "."))
            except PermissionError as error:
                if os.path.basename(folder) != "lost+found":
                    raise
                self._note_unread(os.path.join(folder, ""), str(error.strerror))
                return []

    def _match(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        """The files below a folder that the parts of a pattern match, and those in the folders that they match."""
        part, *rest = parts
        if part == "**":
            # ** matches no folder, or each folder here and the same below it.
            yield from self._match(folder, rest or ["*"])
            following = parts
        else:
            following = rest
        for name in self._entries(folder) if has_magic(part) else [part]:
            path = os.path.join(folder, name)
            is_folder = os.path.isdir(path)
            if not (fnmatchcase(name, part) if part != "**" else is_folder) and name != part:
                continue
            if name.startswith(".") and not part.startswith("."):
                self._note_hidden(path)
            elif following and is_folder:
                yield from self._match(path, following)
            elif not following and os.path.lexists(path):
                yield from self._walk(path) if is_folder else [path]
