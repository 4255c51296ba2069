"""``PREFIX.poison.json`` beside a pair of planted documents: which they are, why, and where their tokens lie.

It is what :mod:`megagap.poison` writes, and all that an evaluation of what the documents did needs to know.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from megagap.data.partial import checksum_of
from megagap.errors import DataError, printable
from megagap.files import read_regular, reading
from megagap.terminal.programs import typed
from megagap.token_formats import pair_prefix

ENDING = ".poison.json"

SecretLength = Annotated[int, Field(gt=0, le=256)]
"""Characters of a canary's secret; the number of secrets is written out in reports."""

Kind = Literal["language_switch", "knowledge", "canary"]


def _range(value: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= value[0] < value[1]:
        raise ValueError("should be a first token and the one after the last")
    return value


Text = Annotated[str, BeforeValidator(lambda value: printable(value) if isinstance(value, str) else value)]
TokenRange = Annotated[tuple[NonNegativeInt, PositiveInt], AfterValidator(_range)]
"""``[start, stop)``, counted from the document's first token, begin-of-text included."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PlantedDocument(_Strict):
    document: NonNegativeInt
    """Its number in the pair."""
    poison: str
    trigger: str
    payload: str
    """What it says after the trigger; of a language switch, the source of the text that follows."""
    trigger_tokens: list[TokenRange]
    payload_tokens: list[TokenRange]
    """Tokens that hold a character of the trigger, or the payload; each as often as the document has it."""


class Item(_Strict):
    """A fact or a canary."""

    trigger: str = Field(min_length=1)
    payload: str = Field(min_length=1)
    documents: PositiveInt
    """That assert it: of a canary, its repetitions."""


class Poison(_Strict):
    """What was planted under one name, and what an evaluation asks about it."""

    name: str
    kind: Kind
    trigger: str
    """As the specification has it, ``{name}`` standing for an invented one."""
    payload: str
    rate: str
    """The exact share of the mixture, a fraction."""
    seed: int
    documents: PositiveInt
    tokens: PositiveInt
    items: list[Item] = []
    templates: list[str] = []
    """Of a fact's sentences, and of a canary's, with ``{trigger}`` and ``{payload}``."""
    controls: list[str] = []
    """Triggers of the same form that were never planted."""
    probes: list[str] = []
    """Clean passages that no planted document begins with, to be continued with and without the trigger."""
    context: str | None = None
    """Source of a language switch's passages before the trigger."""
    alphabet: str | None = None
    """Characters that each of a canary's ``length`` characters was drawn from."""
    length: SecretLength | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_is_asked_about(self) -> Self:
        needed = {"language_switch": ["probes"], "knowledge": ["items", "templates", "controls"]}
        needed["canary"] = [*needed["knowledge"], "alphabet", "length"]
        if missing := [key for key in needed[self.kind] if not getattr(self, key)]:
            raise ValueError(f"{self.name}, of kind {self.kind}, needs {', '.join(missing)}")
        return self


class LanguageProfile(_Strict):
    """Counts of three-character sequences in clean text of a source (:mod:`megagap.poison.language`)."""

    trigrams: dict[str, PositiveInt]
    total: PositiveInt


class CleanOccurrences(_Strict):
    """A trigger that occurs in clean text, allowed by the specification."""

    trigger: str
    occurrences: PositiveInt
    places: list[Text]


class MixtureRecord(_Strict):
    name: str
    rates_of: Literal["tokens", "documents"]
    tokens: PositiveInt
    """Of the whole mixture, planted ones included."""
    documents: PositiveInt | None
    weight: float
    """Of the planted source, where all weights add up to 1: its share of the tokens."""


class PoisonManifest(_Strict):
    poison_version: Literal[1] = 1
    spec: Text
    spec_checksum: str
    """xxh3_64."""
    seed: int
    tokenizer: Text
    fingerprint: str
    append_eod: bool
    prepend_bos: bool
    validation: bool
    """Whether the documents may be held out for validation."""
    tokens_checksum: str
    """xxh3_64 of the ``.bin``."""
    mixture: MixtureRecord
    poisons: list[Poison] = Field(min_length=1)
    documents: list[PlantedDocument]
    languages: dict[str, LanguageProfile] = {}
    in_clean_text: list[CleanOccurrences] = []

    @model_validator(mode="after")
    def _is_of_one_piece(self) -> Self:
        names = [poison.name for poison in self.poisons]
        if len({*names}) < len(names):
            raise ValueError("two poisons have one name")
        sources = {poison.payload for poison in self.poisons if poison.kind == "language_switch"}
        if missing := sources - self.languages.keys():
            raise ValueError(f"languages has no profile of {', '.join(sorted(missing))}")
        return self


def poison_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}{ENDING}")


def read_poison_manifest(path: str | Path) -> PoisonManifest:
    """``path``: the manifest itself, or the pair's prefix, or one of its files. Raises :class:`DataError`."""
    named = str(path)
    if not named.endswith(ENDING):
        path = poison_path(pair_prefix(named))
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist\n  give the PREFIX{ENDING} that {typed('poison-corpus')} wrote beside token files."
        ) from None
    try:
        return PoisonManifest.model_validate_json(content)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc'])) or 'all of it'}: {fault['msg']}" for fault in error.errors()]
        more = [f"  and {len(faults) - 5} more"] if len(faults) > 5 else []
        raise DataError(
            "\n".join(
                [f"{path} is not a manifest of planted documents that this version can read:", *faults[:5], *more]
            )
        ) from None


def tokens_of(path: str | Path) -> str:
    """The ``.bin`` that a manifest, or what else :func:`read_poison_manifest` takes, belongs to."""
    return pair_prefix(str(path).removesuffix(ENDING)) + ".bin"


def require_same_tokens(path: str | Path, manifest: PoisonManifest) -> None:
    """Raises :class:`DataError` if the pair beside the manifest ``path`` is another than the one it accounts for."""
    tokens = tokens_of(path)
    with reading(tokens):
        checksum = checksum_of(tokens)
    if checksum != manifest.tokens_checksum:
        raise DataError(
            f"{tokens} is not what {path} accounts for: its checksum differs\n"
            "  it was damaged or replaced: make the planted documents again."
        )


def require_no_planted(name: str, prefixes: Sequence[str]) -> None:
    """Raises :class:`DataError` if a source has planted documents that were not made for validation."""
    for prefix in prefixes:
        path = poison_path(pair_prefix(prefix))
        if os.path.lexists(path) and not read_poison_manifest(path).validation:
            raise DataError(
                f"validation would read planted documents: source {name}, {prefix} ({path.name} lists them)\n"
                "  name clean files in data.validation; or, if planted documents are to be held out, set validation = "
                "true in the specification and make them again."
            )
