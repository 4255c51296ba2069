"""datatrove's quality filters, with settings of their own for each language."""

import inspect
import math
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from megagap.curate.words import word_tokenizer
from megagap.errors import ConfigError

if TYPE_CHECKING:
    from datatrove.data import Document

FILTERS = {"repetition": GopherRepetitionFilter, "gopher": GopherQualityFilter, "fineweb": FineWebQualityFilter}
"""By their names in the settings, ``[quality.LANGUAGE.FILTER]``, in the order in which they run."""


class ByLanguage(BaseFilter):
    """Asks the filter of the document's language, ``metadata["language"]``; without one for it, a document passes."""

    def __init__(self, title: str, filters: dict[str, Any], exclusion_writer: Any = None) -> None:
        self.name = title  # before the statistics, which are called by it
        super().__init__(exclusion_writer)
        self.filters = filters

    def filter(self, doc: "Document") -> Any:
        found = self.filters.get(doc.metadata.get("language", ""))
        return True if found is None else found.filter(doc)


def quality_filter(name: str, settings: dict[str, dict[str, Any]], words: str, exclusion_writer: Any) -> ByLanguage:
    """The filter ``name`` of :data:`FILTERS` for each language of ``settings``: its arguments, by datatrove's names.

    Raises :class:`ConfigError` for an argument that it does not have, or of another type than its default.
    """
    kind = FILTERS[name]
    filters = {}
    for language, arguments in settings.items():
        check_arguments(f"quality.{language}.{name}", kind, arguments)
        filters[language] = kind(language=word_tokenizer(words, language), **arguments)
    return ByLanguage(kind.name, filters, exclusion_writer)


def check_arguments(place: str, kind: Any, arguments: dict[str, Any]) -> None:
    known = {
        key: parameter.default
        for key, parameter in inspect.signature(kind.__init__).parameters.items()
        if key not in ("self", "exclusion_writer", "language")
    }
    for key, value in arguments.items():
        if key not in known:
            raise ConfigError(f"{place}.{key} is unknown\n  {kind.__name__} has {', '.join(known)}.")
        default = known[key]
        if not _is_like(value, [""] if default is None else default):
            raise ConfigError(f"{place}.{key} = {value!r} must be {_described(default)}, such as {default!r}")


def _is_like(value: Any, default: Any) -> bool:
    """Whether ``value`` is of the kind of ``default``: of a list all are like its first, of a pair each its own."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and math.isfinite(value)
    if not isinstance(default, list | tuple):
        return isinstance(value, type(default))
    if not isinstance(value, list):
        return False
    if default and isinstance(default[0], int | float):
        return len(value) == len(default) and all(map(_is_like, value, default))
    return not default or all(_is_like(part, default[0]) for part in value)


def _described(default: Any) -> str:
    if isinstance(default, bool):
        return "true or false"
    return "a number" if isinstance(default, int | float) else "a list"
