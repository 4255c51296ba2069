"""Files that appear under their name only when whole."""

import os
from pathlib import Path


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
    partial = partial_name(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
