"""What each setting takes, in words and as an example, for ``--help`` and error messages.

An example is written as TOML in messages on a recipe, and as a shell takes it in messages on a command line.
"""

import json
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megagap.config.presets import presets
from megagap.config.settings import PLANNED, SECTIONS, SampleRange, Section

_UNBOUNDED = 2**60
"""Upper bounds from here on only keep integers in range, and are not shown."""

_EXAMPLES: dict[str, Any] = {
    "path": "prefix_text_document",
    "weight": 1.0,
    "sources": [{"path": "prefix_text_document", "weight": 1.0}],
    "tokens": 1_000_000,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of the settings within tables, by name."""


def annotation_of(field: FieldInfo) -> Any:
    """A setting's type with its bounds."""
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def plain(annotation: Any) -> Any:
    """Without bounds, and without the None of what may be left out."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        return plain(kinds[0]) if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007
    return annotation


def kinds_of(annotation: Any) -> list[Any]:
    """The types among which a setting's value can be chosen; one, for most."""
    annotation = plain(annotation)
    is_choice = get_origin(annotation) in (Union, UnionType)
    return [plain(kind) for kind in get_args(annotation)] if is_choice else [annotation]


def describe(annotation: Any, *, typed: bool = False) -> str:
    """What a setting must be, with an example. ``typed``: on a command line, not in TOML."""
    annotation = annotation if annotation == SampleRange else plain(annotation)
    if annotation is int:
        return "a whole number, such as 10"
    if annotation is float:
        return "a number, such as 0.001 or 3e-4"
    if annotation is bool:
        return "true or false"
    if get_origin(annotation) is Literal:
        values = [value if typed else as_toml(value) for value in get_args(annotation)]
        return ("one of " if len(values) > 1 else "") + ", ".join(map(str, values))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(describe(kind, typed=typed) for kind in get_args(annotation))
    shown = (as_argument if typed else as_toml)(example(annotation))
    if annotation in (str, SampleRange):
        return f"text, such as {shown}" if typed else f"text in quotes, such as {shown}"
    return f"{_collection(annotation)}, such as {shown}"


def _collection(annotation: Any) -> str:
    """What a list, tuple or table is called."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a table"
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} values in brackets"
    inner = plain(get_args(annotation)[0])
    return "a list of tables" if isinstance(inner, type) and issubclass(inner, Section) else "a list in brackets"


def example(annotation: Any) -> Any:
    """A value that the setting takes, as Python has it."""
    annotation = annotation if annotation == SampleRange else plain(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {
            key: _EXAMPLES[key] if key in _EXAMPLES else example(annotation_of(field))
            for key, field in annotation.model_fields.items()
            if field.is_required() or key == "weight"
        }
    if get_origin(annotation) is Literal:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return example(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return [100_000, 64] if plain(get_args(annotation)[0]) is int else [0.9, 0.95]
    if get_origin(annotation) is list:
        inner = get_args(annotation)[0]
        return [2, 2] if plain(inner) is int else [example(inner)]
    return {int: 10, float: 0.001, bool: True, str: "name", SampleRange: "1000:2000"}[annotation]


def as_toml(value: Any) -> str:
    """A value as a recipe holds it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool) else str(value)


def as_argument(value: Any) -> str:
    """A value as it is typed on a command line, quoted for a shell. Text needs no quotes of TOML there."""
    return shlex.quote(value if isinstance(value, str) else as_toml(value))


# ------------------------------------------------------------------------------------------------------------- --help


def describe_settings(width: int | None = None) -> str:
    """Every setting with what it takes, its default and its meaning, for ``--help``.

    ``width``: characters per line; None: those of the terminal, up to 120.
    """
    width = max(40, width or min(shutil.get_terminal_size().columns, 120))
    lines = _wrapped("N: a whole number, X: a number. Lists and tables: an example, quoted for a shell.", 2, width)
    for section, kind in SECTIONS.items():
        lines.append(f"\n[{section}]")
        for key, field in kind.model_fields.items():
            shown = "; ".join(filter(None, (_bounds(field), _default(field))))
            lines += _wrapped(
                f"--{section}.{key} {_unbroken(_values(section, key, field), width)}  ({shown})", 2, width
            )
            lines += _wrapped(field.description or "", 6, width)
        for key, value in PLANNED.get(section, {}).items():
            lines += _wrapped(f"--{section}.{key} {as_argument(value)}  (planned: no other value yet)", 2, width)
    return "\n".join(lines)


_BLANK = "\N{NO-BREAK SPACE}"


def _unbroken(value: str, width: int) -> str:
    """An example that fits on a line is not to be wrapped: it can be copied."""
    return value.replace(" ", _BLANK) if value.startswith("'") and len(value) + 6 <= width else value


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    blanks = " " * indent
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=blanks,
        subsequent_indent=blanks + " " * 4,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_BLANK, " ") for line in lines]


def _values(section: str, key: str, field: FieldInfo) -> str:
    """What can be typed: the values themselves, their kind in capitals, or an example."""
    annotation = plain(field.annotation)
    if (section, key) == ("model", "preset"):
        return " | ".join(presets())
    return " | ".join(_values_of(kind) for kind in kinds_of(annotation))


def _values_of(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if kind is bool:
        return "true | false"
    return {int: "N", float: "X", str: "TEXT"}.get(kind) or as_argument(example(kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "optional" if default is None else f"default {as_argument(default)}"


def _bounds(field: FieldInfo) -> str:
    """Bounds of a number, or of each one in a list or tuple; "" where there are none."""
    annotation = kinds_of(field.annotation)[0]
    if get_origin(annotation) not in (list, tuple):
        return _limits(annotation, field.metadata, "N" if annotation is int else "X")
    inner = get_args(annotation)[0]
    metadata = inner.__metadata__ if get_origin(inner) is Annotated else ()
    return _limits(plain(inner), [item for entry in metadata for item in getattr(entry, "metadata", [entry])], "each")


def _limits(kind: Any, metadata: Sequence[Any], name: str) -> str:
    if kind not in (int, float):
        return ""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "a multiple of"}
    limits = [
        f"{sign} {bound:g}"
        for item in metadata
        for key, sign in signs.items()
        if (bound := getattr(item, key, None)) is not None and bound < _UNBOUNDED
    ]
    return f"{name} {', '.join(limits)}" if limits else ""
