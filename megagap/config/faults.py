"""What is wrong with a recipe, in words."""

import difflib
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from megagap.config.describe import as_argument, describe, example, kinds_of, plain
from megagap.config.settings import SECTIONS, Section
from megagap.errors import counted


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the setting's dotted name, the value as given, and what to do."""

    setting: str
    value: Any
    message: str


def from_pydantic(name: str, value: Any, annotation: Any, detail: Any, *, typed: bool = False) -> Fault:
    """What pydantic finds wrong with the ``value`` given for a setting of this annotation, in our own words.

    ``typed``: the value was given on the command line, and examples are written as they are typed there.
    """
    if detail["type"] == "extra_forbidden":
        return _unknown_in_table(name, _place(detail["loc"]), detail["input"])
    whole = annotation
    # A tuple is reported as a whole: of one that is too short, pydantic names the missing item.
    place = detail["loc"] if detail["type"] != "missing" or isinstance(detail["loc"][-1], str) else detail["loc"][:-1]
    place, value, annotation = _descend(place, value, annotation)
    # Within a list or table on the command line, the example of a part is TOML; what has to be typed is the whole.
    within = typed and bool(place)
    again = f"; type it as --{name} {as_argument(example(whole))}" if within else ""
    if detail["type"] == "missing" and place == detail["loc"]:
        return Fault(name + _place(place), None, f"is required: {describe(annotation)}{again}")
    context = {key: f"{bound:g}" if isinstance(bound, float) else bound for key, bound in detail.get("ctx", {}).items()}
    messages = {
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "greater_than": "must be above {gt}",
        "less_than": "must be below {lt}",
        "multiple_of": "must be a multiple of {multiple_of}",
        "finite_number": "must be a finite number",
        "int_parsing_size": "has too many digits",
        "too_short": "must not be empty",
        "string_pattern_mismatch": 'must look like "1000:2000"',
    }
    # For a choice between types, pydantic reports what each of them lacks.
    template = messages.get(detail["type"]) if place == detail["loc"] else None
    if template is None:
        typed = typed and not within
        message = f"must be {describe(annotation, typed=typed)}{_hint(value, annotation, typed)}"
    else:
        message = template.format(**context)
    return Fault(name + _place(place), value, message + again)


def _place(location: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)


def _descend(location: Sequence[int | str], value: Any, annotation: Any) -> tuple[tuple[int | str, ...], Any, Any]:
    """Follow ``location`` into the value and its annotation, up to a choice between types."""
    for depth, part in enumerate(location):
        annotation = plain(annotation)
        if get_origin(annotation) in (Union, UnionType):
            return tuple(location[:depth]), value, annotation
        if isinstance(part, int):
            annotation = get_args(annotation)[part if get_origin(annotation) is tuple else 0]
            value = value[part]
        else:
            annotation = annotation.model_fields[part].rebuild_annotation()
            value = value.get(part)
    return tuple(location), value, annotation


def _hint(value: Any, annotation: Any, typed: bool) -> str:
    """How to write what was probably meant."""
    kinds = kinds_of(annotation)
    if len(kinds) > 1:
        return next(filter(None, (_hint(value, kind, typed) for kind in kinds)), "")
    annotation = kinds[0]
    meant = _meant(value, annotation)
    if type(value) is int and annotation is float:
        return "; this has too many digits"
    if meant is not None:
        return f"; write {shlex.quote(meant) if typed else meant}"
    if get_origin(annotation) is Literal:
        words = list(map(str, get_args(annotation)))
        near = [word for word in words if value and word.startswith(str(value))]
        near = near or difflib.get_close_matches(str(value), words, n=1, cutoff=0.75)
        return f"; did you mean {near[0] if typed else json.dumps(near[0])}?" if near else ""
    if isinstance(value, str):
        if value.strip().lower() in ("none", "null", "nil", ""):
            return "; leave the setting out for its default"
        if re.fullmatch(r"[+-]?[0-9_]{19,}", value):
            return "; this has too many digits"
        if value.count("[") > value.count("]") or value.count("{") > value.count("}"):
            return "; a bracket is not closed"
        if typed and value.startswith(("[", "{")) and '"' not in value and "'" not in value:
            return " in single quotes: without them, the shell takes the inner ones away"
    return ""


def _meant(value: Any, annotation: Any) -> str | None:
    if isinstance(value, float) and annotation is int and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and annotation is bool and value in (0, 1):
        return "true" if value else "false"
    if isinstance(value, bool | int | float) and annotation is str:
        return json.dumps(str(value))
    if isinstance(value, str) and annotation is bool:
        words = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
        return words.get(value.strip().lower())
    if isinstance(value, str) and annotation in (int, float):
        return _number(value, annotation)
    if isinstance(value, str) and get_origin(annotation) in (list, tuple):
        inner = plain(get_args(annotation)[0])
        if isinstance(inner, type) and issubclass(inner, Section):
            known = "path" in inner.model_fields and re.fullmatch(r"[^\[\]{}=,\"']+", value)
            return f"[{{path = {json.dumps(value)}}}]" if known else None
        if inner in (int, float):
            numbers = [_number(part, inner) for part in value.strip("[](){} ").replace(",", " ").split()]
            return f"[{', '.join(map(str, numbers))}]" if numbers and all(numbers) else None
        return f"[{json.dumps(value)}]" if inner is str and "[" not in value else None
    return None


def _number(text: str, kind: type) -> str | None:
    """A number as TOML writes it, of what Python or a person would read as one."""
    if kind is int and re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", text):
        text = text.replace(",", "")
    elif kind is float and re.fullmatch(r"[0-9]+,[0-9]+", text):
        text = text.replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return None
    return str(int(number)) if kind is int else repr(number)


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
    """The settings in an annotation such as ``list[SourceSettings]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_table_in, get_args(annotation))), None)


def unknown(name: str, value: Any) -> Fault:
    nearest = nearest_setting(name)
    return Fault(name, value, f"unknown; did you mean {nearest}?" if nearest else "unknown")


def nearest_setting(name: str) -> str | None:
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


def syntax_fault(path: Path, text: str, error: ValueError | RecursionError) -> str:
    """Why ``text`` is not valid TOML, and where."""
    if isinstance(error, RecursionError):
        return f"{path} is not valid TOML: its values are nested too deeply"
    if "\0" in text:
        return f"{path} is not valid TOML: it has NUL characters; is it a text file?"
    if _looks_like_json(text):
        return f"{path} is not valid TOML: it looks like JSON\n  a recipe has lines such as steps = 100 below [train]."
    lines = text.split("\n")
    found = re.fullmatch(r"(.*) \(at line ([0-9]+), column ([0-9]+)\)", str(error), re.DOTALL)
    if found is None:  # a number beyond Python's limit, or something that does not end
        reason = "a number has too many digits" if "digits" in str(error) else _lower(str(error))
        return f"{path}:{len(lines)} is not valid TOML: {reason}"
    reason, number = found[1], int(found[2])
    line = lines[number - 1] if number <= len(lines) else ""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line.strip()[:100])
    hint = _line_hint(line) if reason in _OF_VALUES else ""
    return f"{path}:{number}:{found[3]} is not valid TOML: {_lower(reason)}\n  {shown}{hint}"


_OF_VALUES = ("Invalid value", "Expected newline or end of document after a statement")
"""tomllib's words for a value that it cannot read, or only the beginning of."""


def _looks_like_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text.lstrip().startswith("{") and text.rstrip().endswith("}")
    return True


def _lower(message: str) -> str:
    known = {"Cannot overwrite a value": "this key is given twice", "Invalid value": "not a TOML value"}
    return known.get(message, message[:1].lower() + message[1:])


def _line_hint(line: str) -> str:
    """How TOML would write the value of a line ``key = value``."""
    key, equals, value = line.partition("=")
    value = value.partition("#")[0].strip()
    if not equals or not re.fullmatch(r"[\s\w.-]+", key) or not value or value[0] in "[{\"'":
        return ""
    meant = _meant(value, bool) or _number(value, int) or _number(value, float)
    if meant is None and not re.match(r"[0-9+.-]", value):
        meant = json.dumps(value, ensure_ascii=False)
    missing = value.lower() in ("none", "null", "nil")
    if missing:
        return "\n  leave the line out for the default"
    return f"\n  write {key.strip()} = {meant}" if meant else ""


def render(path: Path, faults: Sequence[Fault]) -> str:
    lines = []
    for fault in faults:
        shown = None if fault.value is None else _shown(fault.value)
        lines.append((fault.setting if shown is None else f"{fault.setting} = {shown}", fault.message))
    lines = list(dict.fromkeys(lines))
    width = min(max(len(left) for left, _ in lines), 48)
    listed = "\n".join(f"  {left:<{width}}  {message}" for left, message in lines)
    return f"{counted(len(lines), 'fault')} in {path}\n{listed}"


def _shown(value: Any) -> str:
    try:
        shown = repr(value) if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        return "…"
    return shown if len(shown) <= 60 else shown[:57] + "..."
