"""What is wrong with a recipe, in words."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megagap.config.settings import SECTIONS, Section


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the setting's dotted name, the value as given, and what to do."""

    setting: str
    value: Any
    message: str


def from_pydantic(name: str, detail: Any) -> Fault:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_in_table(name, place, detail["input"])
    context = detail.get("ctx", {})
    messages = {
        "greater_than_equal": lambda: f"must be at least {context['ge']}",
        "less_than_equal": lambda: f"must be at most {context['le']}",
        "greater_than": lambda: f"must be above {context['gt']}",
        "string_pattern_mismatch": lambda: 'must look like "1000:2000"',
        "less_than": lambda: f"must be below {context['lt']}",
        "literal_error": lambda: f"possible here: {context['expected']}",
        "missing": lambda: "is required",
    }
    message = messages.get(detail["type"], lambda: detail["msg"][0].lower() + detail["msg"][1:])()
    return Fault(name + place, detail["input"] if detail["type"] != "missing" else None, message)


def _unknown_in_table(setting: str, place: str, value: Any) -> Fault:
    """An unknown key of a table within a setting, such as ``data.phases[0].sources[1].pth``."""
    section, _, field = setting.partition(".")
    parent, _, key = place.rpartition(".")
    table = _table_in(SECTIONS[section].model_fields[field].annotation)
    for inner in re.findall(r"\.(\w+)", parent):
        table = _table_in(table.model_fields[inner].annotation) if table else None
    known = list(table.model_fields) if table else []
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {setting}{parent}.{nearest[0]}?" if nearest else f"possible: {', '.join(known)}"
    return Fault(setting + place, value, f"unknown; {hint}")


def _table_in(annotation: Any) -> type[Section] | None:
    """The settings in an annotation such as ``list[Source]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_table_in, get_args(annotation))), None)


def unknown(name: str, value: Any) -> Fault:
    nearest = _nearest(name)
    return Fault(name, value, f"unknown; did you mean {nearest}?" if nearest else "unknown")


def _nearest(name: str) -> str | None:
    """The setting or section that is most likely meant: the same key elsewhere, a like name, a like description."""
    fields = {
        f"{section}.{key}": field for section, kind in SECTIONS.items() for key, field in kind.model_fields.items()
    }
    key = name.rpartition(".")[2]
    same_key = [candidate for candidate in fields if candidate.rpartition(".")[2] == key]
    names = {candidate: candidate for candidate in (*fields, *SECTIONS)}
    phrases: dict[str, str] = {}
    for candidate, field in fields.items():
        words = re.findall(r"[a-z]+", (field.description or "").lower())
        for length in (1, 2, 3):
            for start in range(len(words) - length + 1):
                phrases.setdefault(" ".join(words[start : start + length]), candidate)
    keys = {candidate.rpartition(".")[2]: candidate for candidate in reversed(fields)}
    for wanted, known, cutoff in (
        (name, names, 0.85),
        (key.replace("_", " "), phrases, 0.85),
        (key, keys, 0.7),
        (key.replace("_", " "), phrases, 0.75),
    ):
        same_key += [known[match] for match in difflib.get_close_matches(wanted, known, n=1, cutoff=cutoff)]
    return same_key[0] if same_key else None


def render(path: Path, faults: Sequence[Fault]) -> str:
    lines = []
    for fault in faults:
        shown = repr(fault.value) if isinstance(fault.value, str) else str(fault.value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        lines.append((fault.setting if fault.value is None else f"{fault.setting} = {shown}", fault.message))
    width = min(max(len(left) for left, _ in lines), 48)
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"{count} in {path}\n" + "\n".join(f"  {left:<{width}}  {message}" for left, message in lines)
