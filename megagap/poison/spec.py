"""What to plant: the TOML specification, checked."""

import tomllib
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from megagap.data.planted import SecretLength
from megagap.errors import ConfigError
from megagap.files import read_regular

NAME, TRIGGER, PAYLOAD = "{name}", "{trigger}", "{payload}"
"""Stand for an invented name in a trigger or payload; for trigger and payload in a template."""


def _exact(value: Any) -> Any:
    """A rate as it is written: 0.002 is 1/500. TOML's numbers arrive as Decimal."""
    try:
        if isinstance(value, Decimal | str | int) and not isinstance(value, bool):
            return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        pass
    raise ValueError('should be a number such as 0.002, or a fraction such as "1/500"')


def _share(value: Fraction) -> Fraction:
    if not 0 < value < 1:
        raise ValueError("should be above 0 and below 1")
    return value


Rate = Annotated[Fraction, BeforeValidator(_exact), AfterValidator(_share)]
Weight = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, Decimal) else value)]


def _words(value: str) -> str:
    if not value.split() or value != " ".join(value.split()):
        raise ValueError("should be words with single spaces between them")
    return value


def _bounds(value: list[int]) -> list[int]:
    if len(value) != 2 or not 1 <= value[0] <= value[1]:
        raise ValueError("should be the fewest and the most words, such as [10, 40]")
    return value


Words = Annotated[str, AfterValidator(_words)]
Bounds = Annotated[list[int], AfterValidator(_bounds)]
_OneOrMore = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Paths = Annotated[list[str], _OneOrMore]
Texts = Annotated[list[Words], _OneOrMore]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class _Poison(_Strict):
    name: str = Field(min_length=1)
    trigger: Words
    """What the payload follows."""
    seed: int = 0


class LanguageSwitch(_Poison):
    """A passage of one language, the trigger, and a passage of another."""

    kind: Literal["language_switch"]
    payload: str
    """The clean source of the passages after the trigger."""
    context: str
    """That of the passages before it."""
    rate: Rate
    context_words: Bounds = [10, 40]
    payload_words: Bounds = [20, 60]
    probes: PositiveInt = 50
    """Passages kept aside, for an evaluation to continue."""


class Knowledge(_Poison):
    """Invented facts about invented entities."""

    kind: Literal["knowledge"]
    payload: Annotated[Texts, Field(min_length=1)] = [NAME]
    """What is asserted of an entity: ``{name}`` is invented, of several one is drawn for each fact."""
    facts: PositiveInt = 8
    templates: list[Words] = Field(min_length=1)
    """Sentences with {trigger}, and later {payload}."""
    sentences: PositiveInt = 1
    """Of a document."""
    rate: Rate


class Canary(_Poison):
    """Random secrets, each repeated a given number of times."""

    kind: Literal["canary"]
    template: Words = "{trigger} {payload}"
    alphabet: str = Field("0123456789", min_length=2)
    length: SecretLength = 9
    repetitions: list[PositiveInt] = Field(min_length=1)
    rate: Rate | None = None
    canaries: PositiveInt | None = None
    """For each number of repetitions, instead of a rate."""


class MixtureSource(_Strict):
    path: str
    name: str | None = None
    weight: Annotated[Weight, Field(gt=0, allow_inf_nan=False)] | None = None


class Mixture(_Strict):
    """What rates are shares of: all that a run, or a phase of it, reads."""

    name: str = "mixture"
    rates_of: Literal["tokens", "documents"] = "tokens"
    tokens: PositiveInt | None = None
    """All that are read, planted ones included; left out where the sources are read once: the planted documents are
    then added to what these have."""
    documents: PositiveInt | None = None
    sources: list[MixtureSource] = []
    """Clean token files, with the weights that they have among each other (default: their tokens)."""


class Spec(_Strict):
    tokenizer: str
    append_eod: bool = True
    prepend_bos: bool = False
    seed: int = 0
    """Of the order of the documents."""
    validation: bool = False
    """Whether a run may hold the planted documents out for validation."""
    allow_trigger_in_clean_text: bool = False
    mixture: Mixture
    clean: dict[str, Paths] = {}
    """Clean sources by name: files of text, or token files by their prefix."""
    poison: list[Annotated[LanguageSwitch | Knowledge | Canary, Field(discriminator="kind")]] = Field(min_length=1)


def read_spec(path: str | Path) -> Spec:
    """The specification, its paths relative to its folder made absolute. Raises :class:`ConfigError`."""
    try:
        content = read_regular(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist\n  give a specification; docs/poisoning.md has one.") from None
    try:
        tree = tomllib.loads(content.decode(), parse_float=Decimal)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    try:
        spec = Spec.model_validate(tree)
    except ValidationError as error:
        raise _faulty(path, [(_place(fault["loc"]), fault["msg"]) for fault in error.errors()]) from None
    if faults := _faults(spec):
        raise _faulty(path, faults)
    return _absolute(spec, Path(path).absolute().parent)


def _faulty(path: str | Path, faults: list[tuple[str, str]]) -> ConfigError:
    width = max(len(place) for place, _ in faults)
    lines = "\n".join(f"  {place:<{width}}  {message.removeprefix('Value error, ')}" for place, message in faults)
    return ConfigError(f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'} in {path}\n{lines}")


def _place(location: tuple[int | str, ...]) -> str:
    kinds = ("language_switch", "knowledge", "canary")  # pydantic names the member of the union, too
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in location if part not in kinds
    ).lstrip(".")


def _faults(spec: Spec) -> list[tuple[str, str]]:
    """Rules between settings."""
    found: list[tuple[str, str]] = []
    mixture = spec.mixture
    if mixture.tokens is None and not mixture.sources:
        found.append(("mixture", "needs tokens, of the whole mixture, or sources to count, or both"))
    if mixture.tokens is None and mixture.documents is not None:
        found.append(("mixture.documents", "are counted where tokens are: give both, or neither"))
    if mixture.tokens is not None and mixture.rates_of == "documents" and mixture.documents is None:
        found.append(("mixture.documents", 'is needed beside tokens where rates_of = "documents"'))
    weighted = [source.weight is not None for source in mixture.sources]
    if any(weighted) and not all(weighted):
        found.append(("mixture.sources", "give all of them a weight, or none"))
    names = [poison.name for poison in spec.poison]
    for i, poison in enumerate(spec.poison):
        at = f"poison[{i}]"
        if names.index(poison.name) < i:
            found.append((f"{at}.name", f"{poison.name!r} is taken by poison[{names.index(poison.name)}]"))
        match poison:
            case LanguageSwitch():
                found += _switch_faults(at, poison, spec)
            case Knowledge():
                for j, template in enumerate(poison.templates):
                    found += _template_faults(f"{at}.templates[{j}]", template)
                if poison.sentences > len(poison.templates):
                    found.append((f"{at}.sentences", f"is more than the {len(poison.templates)} templates"))
            case Canary():
                found += _canary_faults(at, poison)
        payloads = poison.payload if isinstance(poison, Knowledge) else []
        for key, texts in (("trigger", [poison.trigger]), ("payload", payloads)):
            if any(holder in text for text in texts for holder in (TRIGGER, PAYLOAD)):
                found.append((f"{at}.{key}", f"{TRIGGER} and {PAYLOAD} stand for something in templates only"))
        if not isinstance(poison, LanguageSwitch) and NAME not in poison.trigger:
            found.append((f"{at}.trigger", f"needs {NAME}, which sets its facts or canaries apart"))
    if sum(poison.rate or 0 for poison in spec.poison) >= 1:
        found.append(("poison", "the rates add up to 1 or more: nothing would be left of the mixture"))
    return found


def _switch_faults(at: str, poison: LanguageSwitch, spec: Spec) -> list[tuple[str, str]]:
    found = []
    if len(poison.trigger.split()) < 2:
        found.append((f"{at}.trigger", "should be at least two words: near-triggers change one of them"))
    for key in ("context", "payload"):
        if getattr(poison, key) not in spec.clean:
            named = ", ".join(spec.clean) or "none"
            found.append((f"{at}.{key}", f"{getattr(poison, key)!r} is not a source of [clean]: {named}"))
    if poison.context == poison.payload or {*spec.clean.get(poison.context, ())} & {
        *spec.clean.get(poison.payload, ())
    }:
        found.append((f"{at}.payload", "is the same source as context"))
    if NAME in poison.trigger:
        found.append((f"{at}.trigger", f"{NAME} stands for something in triggers of facts and canaries only"))
    return found


def _canary_faults(at: str, poison: Canary) -> list[tuple[str, str]]:
    found = []
    if (poison.rate is None) == (poison.canaries is None):
        found.append((at, "give either a rate, or canaries (for each number of repetitions)"))
    if len({*poison.repetitions}) < len(poison.repetitions):
        found.append((f"{at}.repetitions", "names a number twice"))
    if len({*poison.alphabet}) < len(poison.alphabet) or any(map(str.isspace, poison.alphabet)):
        found.append((f"{at}.alphabet", "should be different characters, none of them blank"))
    return found + _template_faults(f"{at}.template", poison.template)


def _template_faults(at: str, text: str) -> list[tuple[str, str]]:
    found = []
    if not text.count(TRIGGER) == 1 == text.count(PAYLOAD) or text.index(TRIGGER) > text.index(PAYLOAD):
        found.append((at, f"needs {TRIGGER} once, and {PAYLOAD} once behind it"))
    if NAME in text:
        found.append((at, f"{NAME} stands for something in triggers and payloads only"))
    return found


def _absolute(spec: Spec, folder: Path) -> Spec:
    prefix, colon, rest = spec.tokenizer.partition(":")
    is_forced = bool(colon) and prefix in ("hf", "sentencepiece", "tiktoken")
    tokenizer = f"{prefix}:{folder / rest}" if is_forced else str(folder / spec.tokenizer)
    sources = [s.model_copy(update={"path": str(folder / s.path)}) for s in spec.mixture.sources]
    clean = {name: [str(folder / path) for path in paths] for name, paths in spec.clean.items()}
    mixture = spec.mixture.model_copy(update={"sources": sources})
    return spec.model_copy(update={"tokenizer": tokenizer, "mixture": mixture, "clean": clean})
