"""Names and paths of a recipe: what cannot be one, and where they lead."""

import os
from pathlib import Path
from typing import Any

from megagap.errors import ConfigError, is_unicode, system_reason


def unusable_text(value: Any) -> str:
    """What is wrong with a text, or one in a list or table: no file can have such a name, config.toml not hold it."""
    left = [value]  # not recursive: dotted keys nest as deep as a hostile file likes
    while left:
        item = left.pop()
        if isinstance(item, list | dict):
            left += item if isinstance(item, list) else item.values()
        elif isinstance(item, str) and "\0" in item:
            return "has a NUL character, which no name or path can have"
        elif isinstance(item, str) and not is_unicode(item):
            return "is not valid UTF-8, which config.toml cannot hold; rename the file or folder"
    return ""


def absolute(path: Path, what: str) -> Path:
    """Raises :class:`ConfigError` naming ``what``."""
    try:
        if not path.is_absolute():
            os.getcwd()
    except OSError:
        raise ConfigError(f"{what} {path} cannot be found: the working directory was removed; cd to another") from None
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # of Python up to 3.12, RuntimeError is links in a circle
        reason = system_reason(error) if isinstance(error, OSError) else "its links lead in a circle"
        raise ConfigError(f"{what} {path} cannot be found: {reason}") from None


def run_directory(given: str, recipe: Path) -> Path:
    return absolute(Path(given or Path("runs") / recipe.stem), "run.dir")
