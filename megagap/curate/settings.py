"""The settings of a curation: one TOML file. A stage runs where its table is given, in the order of the fields."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megagap.config.faults import Fault, render
from megagap.config.paths import unusable_text
from megagap.errors import ConfigError
from megagap.files import reading
from megagap.tokenizer import KINDS

Positive = Annotated[int, Field(ge=1)]
NgramSize = Annotated[int, Field(ge=1, le=100)]
"""Words. The time for a text grows with it."""
Level = Literal["low", "medium", "high"]
Words = Literal["plain", "spacy"]


def _usable(path: str) -> str:
    if fault := unusable_text(path):
        raise ValueError(fault)
    return path


PathName = Annotated[str, AfterValidator(_usable)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Input(Table):
    folder: PathName
    """Of JSON lines, plain, gzip or Zstandard; searched recursively."""
    pattern: str = "*.jsonl*"
    """Of file names, anywhere in the folder."""
    text_key: str = "text"
    id_key: str = "id"


class Output(Table):
    folder: PathName
    """New, or of an earlier start with the same settings, which then goes on."""
    tokenizer: PathName = ""
    """As for megagap preprocess; without one the curated text is the result."""


class Language(Table):
    keep: Annotated[list[str], Field(min_length=1)] = ["en", "fr"]
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.65
    model: PathName = ""
    """A fastText model such as lid.176.bin; without one, function words tell the languages."""


class Urls(Table):
    lists: PathName = ""
    """Folder with the files domains, urls, banned_words, ...; default: those that come with datatrove."""
    blocked_domains: list[str] = []


class Deduplicate(Table):
    ngrams: NgramSize = 5
    buckets: Positive = 14
    hashes_per_bucket: Positive = 8
    """Documents are near-duplicates with a probability of 1 - (1 - s^hashes)^buckets, s their Jaccard similarity."""


class Mask(Table):
    kinds: Annotated[list[Literal["email", "iban", "card", "nir", "phone", "ip"]], Field(min_length=1)] = [
        "email", "iban", "card", "nir", "phone", "ip",
    ]  # fmt: skip


class Decontaminate(Table):
    benchmarks: Annotated[list[PathName], Field(min_length=1)]
    """JSON lines, one benchmark per file; patterns are allowed."""
    ngrams: NgramSize = 12
    validation: list[PathName] = []
    """JSON lines that must have no n-gram of the benchmarks; else nothing is started."""


class Classifier(Table):
    model: PathName
    """Folder that megagap curate train-quality wrote."""
    drop: list[Level] = ["low"]
    """Documents whose overall quality is most probably one of these are left out."""
    batch_size: Positive = 32


class Curation(Table):
    input: Input
    output: Output
    tasks: Positive = 1
    """Parts that the input is divided into, by whole files. The result depends on it, not on workers or executor."""
    words: Words = "plain"
    urls: Urls | None = None
    language: Language = Language()
    quality: dict[str, dict[Literal["repetition", "gopher", "fineweb"], dict[str, Any]]] = {}
    """[quality.LANGUAGE.FILTER]: arguments of datatrove's filters."""
    deduplicate: Deduplicate | None = None
    mask: Mask | None = None
    decontaminate: Decontaminate | None = None
    classifier: Classifier | None = None

    def resolved(self, folder: Path) -> "Curation":
        """With every path taken from ``folder``."""

        def at(path: str) -> str:
            return str(folder / path) if path else ""

        def tokenizer(spec: str) -> str:
            kind, colon, path = spec.partition(":")
            return f"{kind}:{folder / path}" if colon and kind in KINDS else at(spec)

        changes: dict[str, Any] = {
            "input": _changed(self.input, folder=at(self.input.folder)),
            "output": _changed(self.output, folder=at(self.output.folder), tokenizer=tokenizer(self.output.tokenizer)),
            "language": _changed(self.language, model=at(self.language.model)),
        }
        if self.urls:
            changes["urls"] = _changed(self.urls, lists=at(self.urls.lists))
        if self.decontaminate:
            changes["decontaminate"] = _changed(
                self.decontaminate,
                benchmarks=[at(path) for path in self.decontaminate.benchmarks],
                validation=[at(path) for path in self.decontaminate.validation],
            )
        if self.classifier:
            changes["classifier"] = _changed(self.classifier, model=at(self.classifier.model))
        return _changed(self, **changes)


_Table = TypeVar("_Table", bound=Table)


def _changed(table: _Table, **changes: Any) -> _Table:
    return table.model_copy(update=changes)


def load_curation(path: Path) -> Curation:
    """Read and check the settings; paths in them are relative to their file.

    Raises :class:`ConfigError` with every fault found, and :class:`DataError` if the file cannot be read.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    try:
        settings = Curation.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(render(path, [_fault(detail) for detail in error.errors()])) from None
    for language in settings.quality:
        if language not in settings.language.keep:
            message = f"is a language that language.keep = {settings.language.keep} drops before"
            raise ConfigError(render(path, [Fault(f"quality.{language}", None, message)]))
    return settings.resolved(path.parent.absolute())


def _fault(detail: Any) -> Fault:
    name = ".".join(map(str, (part for part in detail["loc"] if part != "[key]")))
    if detail["type"] == "missing":
        return Fault(name, None, "is required")
    if detail["type"] == "extra_forbidden":
        known: type[Table] = Curation
        for part in detail["loc"][:-1]:
            annotation = known.model_fields[part].annotation if part in known.model_fields else None
            options = getattr(annotation, "__args__", (annotation,))
            tables = [option for option in options if isinstance(option, type) and issubclass(option, Table)]
            known = tables[0] if tables else known
        return Fault(name, detail["input"], f"is unknown; there are {', '.join(known.model_fields)}")
    message = detail["msg"]
    return Fault(name, detail["input"], message[0].lower() + message[1:])
