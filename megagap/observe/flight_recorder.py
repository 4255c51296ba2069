"""What torch itself knows of this process's collectives: those of NCCL and gloo that it has begun and not finished.

Its flight recorder keeps the last ones of every process group (``TORCH_FR_BUFFER_SIZE``, 2,000). Spans say what the
host waits for; where that is the device, this tells which collective the device stands in.
"""

import json
from pathlib import Path
from typing import Any

from megagap.files import write_text

RECORDS = "flight_recorder"
"""Folder of the logs, with a file for each rank, of the last hang or loss."""

LAST = 64
"""Finished collectives that are kept beside the others."""


def save_record(path: Path) -> None:
    """Write torch's record, in its own form, as JSON. Raises OSError, or RuntimeError where torch keeps none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(recorded(), indent=1) + "\n")


def recorded() -> dict[str, Any]:
    """Raises RuntimeError where torch keeps none.

    ``entries``: the collectives, oldest first; ``pg_status``, by group: the numbers of the last ones that were
    enqueued, started and completed; ``pg_config``: the ranks of each group."""
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]
    except ImportError as error:
        raise RuntimeError("this torch has no flight recorder") from error
    found: dict[str, Any] = json.loads(_dump_fr_trace_json())
    entries = found["entries"]
    last = len(entries) - LAST
    return found | {
        "entries": [entry for number, entry in enumerate(entries) if number >= last or not entry["retired"]]
    }
