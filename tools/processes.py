"""Processes and their descendants."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All living processes that descend from ``pid``. torchrun's workers are in sessions of their own."""
    children: dict[int, list[int]] = {}
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            # The name in parentheses may hold anything; the parent is the second field after it.
            stat = Path("/proc", number, "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        except OSError:  # it has ended since
            continue
        children.setdefault(int(stat.split()[1]), []).append(int(number))
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return found


def kill_tree(pid: int) -> None:
    """SIGKILL for ``pid`` and all its descendants."""
    for one in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
