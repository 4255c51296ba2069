"""Files that appear under their name only when whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagap.errors import DataError


def partial_name(path: str | Path) -> Path:
    """Where to write what will be renamed to ``path``; matches neither ``*.bin`` nor ``*.idx``."""
    return Path(f"{path}.partial-{os.getpid()}")


def publish(partial: Path, path: str | Path) -> None:
    """Rename ``partial``, whose contents have been synced, to ``path``, and make the rename itself durable."""
    os.replace(partial, path)
    folder = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``, replacing what was there in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, replacing what was there in one step."""
    partial = partial_name(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: str | Path) -> None:
    """Make a folder that a user named, and those above it. Raises :class:`DataError` if that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {folder}: {error.strerror}") from None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """For a block that writes a file that a user named: its folder is made.

    Raises :class:`DataError` naming the file where the system refuses that, or the block.
    """
    make_folder(Path(path).parent)
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None
