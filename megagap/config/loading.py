"""From a TOML recipe and overrides to checked, resolved settings."""

import glob
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megagap.config.describe import annotation_of, as_argument, example, kinds_of
from megagap.config.faults import Fault, from_pydantic, nearest_setting, render, syntax_fault, unknown
from megagap.config.model_section import FindModel, apply_preset, find_stored, missing_settings, origin_notes
from megagap.config.paths import absolute, run_directory, unusable_text
from megagap.config.rules import check_rules
from megagap.config.settings import (
    PLANNED,
    SECTIONS,
    Optim,
    PhaseSettings,
    Section,
    Settings,
    SourceSettings,
    source_name,
)
from megagap.config.timeline import run_length, timeline_of_data
from megagap.errors import CheckpointError, ConfigError, system_reason
from megagap.parallel.schedule import choose
from megagap.run_files import CONFIG
from megagap.token_formats import FORMATS, find_format, matching_prefixes, pair_prefix

MAX_RECIPE_BYTES = 1 << 24
"""Larger files are something else; some devices and pipes have no end."""

_Section = TypeVar("_Section", bound=Section)


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    *,
    needs_data: bool = True,
    find_model: FindModel | None = None,
) -> Settings:
    """Read a TOML recipe and ``section.key=value`` overrides into checked, resolved settings.

    ``world_size``: the number of processes, if known; the layout is then checked against it. ``needs_data``: whether
    ``data.sources`` must be given, and the tokenizer be there if one is. ``find_model``: where settings of ``[model]``
    come from that the recipe leaves out; None: it must give them.
    Raises :class:`ConfigError` with every fault found, and :class:`CheckpointError` if that is the only one.
    """
    path = Path(path)
    tree = _read_toml(path)
    faults = [fault for override in overrides for fault in _apply_override(tree, override)]
    typed = {override.partition("=")[0] for override in overrides}
    faults += _set_planned_aside(tree)
    faults += apply_preset(tree)
    stored, unreadable = None, None
    try:
        stored = find_stored(tree, path, find_model) if find_model else None
    except CheckpointError as error:
        unreadable = error
    if stored:
        tree["model"] = stored.settings.model_dump(mode="json", exclude={"preset"}) | tree.get("model", {})
    values, section_faults = _validate(tree, typed)
    faults += section_faults
    faults += check_rules(values, world_size, needs_data)
    folder = absolute(path.parent, "the recipe's folder")
    faults += _tokenizer_exists(values.get("data.tokenizer"), folder) if needs_data else []
    if unreadable:
        if not faults:
            raise unreadable
        faults.append(Fault("model", None, f"is to come from a checkpoint: {unreadable.args[0]}"))
    else:
        faults += missing_settings(tree, path)
    if faults:
        raise ConfigError(render(path, faults))
    given = Settings.model_validate(tree)
    settings = _resolve(given, folder, path)
    for place in (
        settings.run.dir,
        settings.data.tokenizer,
        *(path for source in _all_sources(settings) for path in source.paths),
        *settings.data.tasks,
    ):
        if fault := unusable_text(place):
            raise ConfigError(f"the path {place} {fault}")
    return settings.with_notes([*origin_notes(stored, given.model), *_ending_notes(given, folder)])


def _ending_notes(settings: Settings, folder: Path) -> Iterator[str]:
    """On sources that are named by one of their files."""
    endings = {ending for known in FORMATS for ending in (known.index, known.tokens)}
    for name in dict.fromkeys(path for source in _all_sources(settings) for path in source.paths):
        ending = Path(name).suffix
        if ending in endings and pair_prefix(folder / name) != str(folder / name):
            yield f"the source {name} is named by one of its files: leave {ending} out, the prefix names the pair"


def parse_overrides(arguments: Sequence[str]) -> list[str]:
    """``--section.key value`` and ``--section.key=value`` of a command line as ``section.key=value``.

    Raises :class:`ConfigError` for what is neither, for a setting without a value, and for one given twice.
    """
    values: dict[str, str] = {}
    remaining = list(reversed(arguments))
    while remaining:
        argument = remaining.pop()
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or "." not in name:
            raise ConfigError(_split_by_shell(values, argument) or _unexpected(argument, name))
        if not equals:
            if not remaining or re.match(r"--[A-Za-z_]+[.=]", remaining[-1]):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE, or --{name}=VALUE")
            value = remaining.pop()
        if values.setdefault(name, value) != value:
            raise ConfigError(f"--{name} is given twice, {values[name]} and {value}: keep one of them")
    return [f"{name}={value}" for name, value in values.items()]


def _split_by_shell(values: dict[str, str], argument: str) -> str | None:
    """What an unexpected ``argument`` means after a list that the shell has split at its blanks."""
    name = next(reversed(values), "")
    section, _, key = name.partition(".")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if argument.startswith("--") or field is None or get_origin(kinds_of(field.annotation)[0]) not in (list, tuple):
        return None
    typed = as_argument(example(annotation_of(field)))
    return f"unexpected argument {argument!r} after --{name} {values[name]}: quote a list as one, --{name} {typed}"


def override_faults(override: str) -> list[Fault]:
    """What is wrong with a ``section.key=value`` by itself, whatever the other settings are."""
    name, tree = override.partition("=")[0], dict[str, Any]()
    faults = [*_apply_override(tree, override), *_set_planned_aside(tree)]
    return faults + [fault for fault in _validate(tree)[1] if re.match(rf"{re.escape(name)}(?![\w-])", fault.setting)]


def _unexpected(argument: str, name: str) -> str:
    usual = f"unexpected argument {argument!r}: settings are given as --section.key value"
    name = name.lstrip("-").replace("-", "_")
    section, _, key = name.partition(".")
    known = section in SECTIONS and key in SECTIONS[section].model_fields
    nearest = name if known else nearest_setting(name) if argument.startswith("-") else None
    if section in SECTIONS and not known:
        return f"{usual}\n  settings of {section}: {', '.join(SECTIONS[section].model_fields)}"
    return f"{usual}\n  did you mean --{nearest}?" if nearest else usual


def _read_toml(path: Path) -> dict[str, Any]:
    if os.path.isdir(path):
        within = path / CONFIG
        hint = f"; the recipe of that run is {within}" if within.is_file() else ""
        raise ConfigError(f"cannot read the recipe {path}: it is a folder\n  name a TOML file{hint}.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECIPE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = system_reason(error, path) if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the recipe {path}: {reason}") from None
    if len(content) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{path} is not valid TOML: it is larger than {MAX_RECIPE_BYTES >> 20} MiB; is it a recipe?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        reason = "it is UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {content[error.start]:#04x}"
        raise ConfigError(
            f"{path}:{line} is not valid TOML: it is not UTF-8 text ({reason})\n"
            "  give a recipe such as examples/recipes/quickstart.toml, saved as UTF-8."
        ) from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(syntax_fault(path, text, error)) from None


def _apply_override(tree: dict[str, Any], override: str) -> Iterator[Fault]:
    name, _, text = override.partition("=")
    section, _, key = name.partition(".")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if field is None and key not in PLANNED.get(section, ()):
        yield unknown(name, text)
        return
    if not isinstance(tree.setdefault(section, {}), dict):
        return  # reported by _validate
    value = _parse_value(text)
    # Text needs no quotes on a command line: a name such as 2026 or true is text too.
    tree[section][key] = value if field is None or field.annotation is not str or isinstance(value, str) else text


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is not TOML."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _set_planned_aside(tree: dict[str, Any]) -> Iterator[Fault]:
    """Remove planned settings from the tree: given their one value, they change nothing."""
    for section, planned in PLANNED.items():
        given = tree.get(section)
        for key, only in planned.items():
            if not isinstance(given, dict) or key not in given:
                continue
            value = given.pop(key)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                yield Fault(f"{section}.{key}", value, f"not yet supported (planned); only {json.dumps(only)} is")


def _validate(tree: dict[str, Any], typed: Collection[str] = ()) -> tuple[dict[str, Any], list[Fault]]:
    """Validate setting by setting, so that rules can run on whatever is sound.

    ``typed``: settings that were given on the command line. What is missing of ``[model]`` is not checked here.
    Returns the sound values by dotted name, defaults included, and the faults.
    """
    values: dict[str, Any] = {}
    faults: list[Fault] = []
    for section in tree.keys() - SECTIONS.keys():
        faults.append(unknown(section, tree[section]))
    for section, kind in SECTIONS.items():
        given = tree.get(section, {})
        if not isinstance(given, dict):
            faults.append(Fault(section, given, "must be a table of settings"))
            continue
        faults += [unknown(f"{section}.{key}", given[key]) for key in given if key not in kind.model_fields]
        for key, field in kind.model_fields.items():
            name = f"{section}.{key}"
            if key not in given:
                if field.is_required():
                    faults += [Fault(name, None, "is required")] if section != "model" else []
                else:
                    values[name] = field.get_default(call_default_factory=True)
                continue
            if unusable := unusable_text(given[key]):
                faults.append(Fault(name, given[key], unusable))
                continue
            annotation = annotation_of(field)
            adapter: TypeAdapter[Any] = TypeAdapter(
                annotation,
                config=None if _is_section(field.annotation) else ConfigDict(strict=True),
            )
            try:
                values[name] = adapter.validate_python(given[key])
            except ValidationError as error:
                faults += [
                    from_pydantic(name, given[key], annotation, detail, typed=name in typed)
                    for detail in error.errors()
                ]
    return values, faults


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _all_sources(settings: Settings) -> list[SourceSettings]:
    return [*settings.data.sources, *settings.data.validation, *sum((p.sources for p in settings.data.phases), [])]


def _resolve(settings: Settings, folder: Path, recipe: Path) -> Settings:
    """Fill in what depends on other settings, and make paths absolute."""
    model, parallel, data, train = settings.model, settings.parallel, settings.data, settings.train
    optim, is_pure = settings.optim, settings.train.precision == "bf16-pure"
    steps = run_length(timeline_of_data(data, train), train.steps, train.tokens)
    schedule, chunks = choose(parallel.schedule, parallel.vpp)
    return _with(
        settings,
        model=_with(model, head_dim=model.head_dim or model.hidden_size // model.num_attention_heads),
        parallel=_with(
            parallel,
            sequence_parallel=parallel.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
            vpp=chunks,
            schedule=schedule,
            layers_per_stage=[len(stage.layers) for stage in settings.placement.stages],
        ),
        data=_with(
            data,
            tokenizer="{}{}".format(*_find_tokenizer(data.tokenizer, folder)) if data.tokenizer else "",
            sources=[_resolve_source(source, folder) for source in data.sources],
            phases=[_resolve_phase(phase, folder, settings) for phase in data.phases],
            validation=[_resolve_source(source, folder) for source in data.validation],
            tasks=[str(folder / path) for path in data.tasks],
        ),
        train=_with(train, steps=steps, tokens=0),
        optim=_with(
            optim,
            moments_dtype=optim.moments_dtype or ("bf16" if is_pure else "fp32"),
            rounding=optim.rounding or (_rounding_of(optim) if is_pure else None),
        ),
        run=_with(settings.run, dir=str(run_directory(settings.run.dir, recipe))),
    )


def _rounding_of(optim: Optim) -> str:
    return "kahan" if optim.name == "muon" else "stochastic"


def _with(section: _Section, **changes: Any) -> _Section:
    return section.model_copy(update=changes)


def _resolve_source(source: SourceSettings, folder: Path) -> SourceSettings:
    paths = []
    for pattern in source.paths:
        pattern = pair_prefix(pattern) if glob.has_magic(pattern) else pattern
        full = pair_prefix(folder / pattern)
        matches: list[str] = []
        if glob.has_magic(pattern) and find_format(full) is None:
            matches = [str(folder / name) for name in matching_prefixes(pattern, folder)]
        paths += matches or [full]
    return _with(source, path=paths, name=source_name(source))


def _resolve_phase(phase: PhaseSettings, folder: Path, settings: Settings) -> PhaseSettings:
    return _with(
        phase,
        sources=[_resolve_source(source, folder) for source in phase.sources],
        sequence_length=phase.sequence_length or settings.train.sequence_length,
        rope_theta=phase.rope_theta or settings.model.rope_theta,
    )


def _find_tokenizer(spec: str, folder: Path) -> tuple[str, Path]:
    """The kind with its colon, such as ``hf:``, if the specification forces one, and the place."""
    kind = next((kind for kind in ("hf:", "sentencepiece:", "tiktoken:") if spec.startswith(kind)), "")
    return kind, folder / spec.removeprefix(kind)


def _tokenizer_exists(spec: str | None, folder: Path) -> Iterator[Fault]:
    if spec and not os.path.exists(place := _find_tokenizer(spec, folder)[1]):
        yield Fault("data.tokenizer", spec, f"{place} does not exist; paths are relative to the recipe")
