"""From a TOML recipe and overrides to checked, resolved settings."""

import glob
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megagap.config.faults import Fault, from_pydantic, render, unknown
from megagap.config.phases import spans, steps_for
from megagap.config.rules import check_rules
from megagap.config.settings import PLANNED, SECTIONS, Phase, Section, Settings, Source, source_name
from megagap.errors import ConfigError
from megagap.files import pair_prefix

_Section = TypeVar("_Section", bound=Section)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None, *, needs_data: bool = True
) -> Settings:
    """Read a TOML recipe and ``section.key=value`` overrides into checked, resolved settings.

    ``world_size``: the number of processes, if known; the layout is then checked against it. ``needs_data``: whether
    ``data.sources`` must be given, and the tokenizer be there if one is.
    Raises :class:`ConfigError` with every fault found.
    """
    path = Path(path)
    tree = _read_toml(path)
    faults = [fault for override in overrides for fault in _apply_override(tree, override)]
    faults += _set_planned_aside(tree)
    faults += _apply_preset(tree)
    values, section_faults = _validate(tree)
    faults += section_faults
    faults += check_rules(values, world_size, needs_data)
    faults += _tokenizer_exists(values.get("data.tokenizer"), path.parent) if needs_data else []
    if faults:
        raise ConfigError(render(path, faults))
    return _resolve(Settings.model_validate(tree), path)


def parse_overrides(arguments: Sequence[str]) -> list[str]:
    """``--section.key value`` and ``--section.key=value`` of a command line as ``section.key=value``."""
    overrides = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--") or "." not in argument:
            raise ConfigError(f"unexpected argument {argument!r}: settings are given as --section.key value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            try:
                value = next(remaining)
            except StopIteration:
                raise ConfigError(f"--{name} needs a value") from None
        overrides.append(f"{name}={value}")
    return overrides


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> Iterator[Fault]:
    name, _, text = override.partition("=")
    section, _, key = name.partition(".")
    field = SECTIONS[section].model_fields.get(key) if section in SECTIONS else None
    if field is None and key not in PLANNED.get(section, ()):
        yield unknown(name, text)
        return
    if not isinstance(tree.setdefault(section, {}), dict):
        return  # reported by _validate
    tree[section][key] = text if field and field.annotation is str else _parse_value(text)


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _set_planned_aside(tree: dict[str, Any]) -> Iterator[Fault]:
    """Settings to come leave the tree: given their one value they say nothing."""
    for section, planned in PLANNED.items():
        given = tree.get(section)
        for key, only in planned.items():
            if not isinstance(given, dict) or key not in given:
                continue
            value = given.pop(key)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                yield Fault(f"{section}.{key}", value, f"not yet supported; only {json.dumps(only)} is")


def _apply_preset(tree: dict[str, Any]) -> Iterator[Fault]:
    model = tree.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(name, str) or not name:
        return  # no preset, or one that _validate reports
    presets = tomllib.loads(files("megagap.model").joinpath("presets.toml").read_text(encoding="utf-8"))
    if name not in presets:
        yield Fault("model.preset", name, f"unknown; possible: {', '.join(presets)}")
        return
    tree["model"] = presets[name] | model


def _validate(tree: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """Validate setting by setting, so that rules can run on whatever is sound.

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
                    hint = " (or choose a model.preset)" if section == "model" else ""
                    faults.append(Fault(name, None, f"is required{hint}"))
                else:
                    values[name] = field.get_default(call_default_factory=True)
                continue
            annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(
                annotation,
                config=None if _is_section(field.annotation) else ConfigDict(strict=_is_strict(field.metadata)),
            )
            try:
                values[name] = adapter.validate_python(given[key])
            except ValidationError as error:
                faults += [from_pydantic(name, detail) for detail in error.errors()]
    return values, faults


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_strict(metadata: Iterable[Any]) -> bool:
    return not any(getattr(item, "strict", None) is False for item in metadata)


def _resolve(settings: Settings, recipe: Path) -> Settings:
    """Fill in what depends on other settings, and make paths absolute."""
    model, parallel, data, train = settings.model, settings.parallel, settings.data, settings.train
    plan = spans(data, train, model.rope_theta)
    tokens = steps_for(plan, train.global_batch_size, train.tokens)
    folder = recipe.parent.resolve()
    return _with(
        settings,
        model=_with(model, head_dim=model.head_dim or model.hidden_size // model.num_attention_heads),
        parallel=_with(
            parallel,
            sequence_parallel=parallel.tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel,
            layers_per_stage=parallel.layers_per_stage or spread_layers(model.num_hidden_layers, parallel.pp),
        ),
        data=_with(
            data,
            tokenizer="{}{}".format(*_find_tokenizer(data.tokenizer, folder)) if data.tokenizer else "",
            sources=[_resolve_source(source, folder) for source in data.sources],
            phases=[_resolve_phase(phase, folder, settings) for phase in data.phases],
            validation=[_resolve_source(source, folder) for source in data.validation],
        ),
        train=_with(train, steps=train.steps or tokens or plan[-1].first + plan[-1].steps, tokens=0),
        run=_with(settings.run, dir=str(Path(settings.run.dir or Path("runs") / recipe.stem).resolve())),
    )


def _with(section: _Section, **changes: Any) -> _Section:
    return section.model_copy(update=changes)


def _resolve_source(source: Source, folder: Path) -> Source:
    paths = []
    for pattern in source.paths:
        pattern = pair_prefix(pattern) if glob.has_magic(pattern) else pattern
        full = pair_prefix(folder / pattern)
        matches: list[str] = []
        if glob.has_magic(pattern) and not Path(full + ".idx").exists():
            # A pattern names prefixes, the files carry an ending: match on the index files.
            found = glob.glob(pattern + ".idx", root_dir=folder)
            matches = sorted(str(folder / name).removesuffix(".idx") for name in found)
        paths += matches or [full]
    return _with(source, path=paths, name=source_name(source))


def _resolve_phase(phase: Phase, folder: Path, settings: Settings) -> Phase:
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
    if spec and not os.path.exists(place := _find_tokenizer(spec, folder.resolve())[1]):
        yield Fault("data.tokenizer", spec, f"there is no {place}; paths are relative to the recipe")


def spread_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage; what does not divide goes to the earlier stages."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]
