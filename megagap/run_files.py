"""Names of the files of a run directory, for those who read a run; :mod:`megagap.observe.run_directory` writes it."""

from pathlib import Path

CONFIG = "config.toml"
ENVIRONMENT = "environment.json"
EVENTS = "events.jsonl"
LOCK = "lock"
METRICS = "metrics.jsonl"
STATUS = "status.json"


def is_run(path: Path) -> bool:
    """Whether this is the directory of a run that has started."""
    return (path / CONFIG).is_file() and (path / STATUS).is_file()
