"""Settings compared, and how a difference reads: the one place for refusals, the log and events."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SHOWN_CHARACTERS = 160
"""Longer values, such as lists of shards, are cut in messages; events have them whole."""


@dataclass(frozen=True)
class Change:
    """One setting with another value than before, as JSON values; None: not set."""

    setting: str
    before: Any
    after: Any
    note: str = ""
    """What follows from it, for messages."""

    def __str__(self) -> str:
        return f"{self.setting} was {shown(self.before)}, is {shown(self.after)}{self.note}"

    def as_dict(self) -> dict[str, Any]:
        return {"setting": self.setting, "before": self.before, "after": self.after}


def shown(value: Any) -> str:
    """A value as a recipe has it, cut if it is long."""
    if value is None:
        return "not set"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def differences(before: Any, after: Any, name: str = "") -> Iterator[Change]:
    """Every setting that differs between two trees of JSON values, in the order of ``after``.

    Lists of as many tables are compared table by table: ``data.sources[1].weight``.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in dict.fromkeys([*after, *before]):
            yield from differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    elif _are_tables(before) and _are_tables(after) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from differences(old, new, f"{name}[{i}]")
    elif before != after:
        yield Change(name, before, after)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
