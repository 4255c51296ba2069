"""Folders that a tool writes for a user: new, and either complete or absent."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagap.errors import CheckpointError
from megagap.files import file_errors, partial_name, publish, require_writable_folder


def require_new(output: Path) -> None:
    """Raises :class:`CheckpointError` if ``output`` exists and is not an empty folder, or cannot be created."""
    if "\0" in str(output):
        raise CheckpointError(f"{str(output)!r} cannot be the name of a folder: it contains a NUL character")
    with file_errors(f"cannot write {output}", output, CheckpointError):
        if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output} exists and is not empty\n  choose another output, or remove it first.")
    require_writable_folder(output.absolute().parent, CheckpointError)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes ``output`` at the end of the block, or is removed on an error.

    Raises :class:`CheckpointError` naming ``output`` if the system refuses.
    """
    require_new(output)
    partial = partial_name(output)
    try:
        with file_errors(f"cannot write {output}", output, CheckpointError):
            partial.mkdir()
            yield partial
            publish(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
