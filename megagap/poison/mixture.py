"""The mixture that rates are shares of: how large it is, and what a recipe says of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megagap.config import SourceSettings
from megagap.config.settings import source_name
from megagap.data.planted import MixtureRecord
from megagap.data.token_file import open_tokens
from megagap.errors import ConfigError, DataError
from megagap.poison.clean import token_prefixes
from megagap.poison.rates import Rest, Size, Whole
from megagap.poison.spec import Mixture


@dataclass(frozen=True)
class MixtureSize:
    """Clean tokens and documents, or those of the whole mixture."""

    tokens: Size
    documents: Size | None
    shares: list[tuple[str, str, Fraction]]
    """Path, name and share of each clean source among the clean ones."""


def planted_name(prefix: str) -> str:
    """Of the source of planted documents, in a recipe."""
    return Path(prefix).name.removesuffix("_text_document")


def _require_names(names: Sequence[str], planted: str) -> None:
    """Raises :class:`ConfigError` where a recipe would refuse the names that the sources have in it."""
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"two of mixture.sources are called {name}\n  give each a name of its own.")
    if planted in names:
        raise ConfigError(
            f"a source of the mixture is called {planted}, as the planted documents would be\n"
            "  give it another name, or choose another --output-prefix."
        )


def size_of(mixture: Mixture, planted: str) -> MixtureSize:
    """``planted``: the name of the planted source."""
    tokens, documents, by_source = 0, 0, []
    for source in mixture.sources:
        prefixes = token_prefixes(source.path)
        if not prefixes:
            raise DataError(f"mixture.sources: no token file matches {source.path}\n  give the prefix of a pair.")
        opened = [open_tokens(prefix) for prefix in prefixes]
        own = sum(pair.token_count for pair in opened)
        tokens, documents = tokens + own, documents + sum(pair.document_count for pair in opened)
        name = source.name or source_name(SourceSettings(path=prefixes))
        by_source.append((source.path, name, Fraction(own if source.weight is None else source.weight)))
    _require_names([name for _, name, _ in by_source], planted)
    total = sum(weight for _, _, weight in by_source) or Fraction(1)
    shares = [(path, name, weight / total) for path, name, weight in by_source]
    if mixture.tokens is None:
        return MixtureSize(Rest(tokens), Rest(documents), shares)
    return MixtureSize(Whole(mixture.tokens), Whole(mixture.documents) if mixture.documents else None, shares)


def sources_for_recipe(prefix: str, mixture: MixtureRecord, size: MixtureSize) -> list[dict[str, Any]]:
    """``path``, ``name`` and ``weight`` of each, the planted source last; paths hold wherever the recipe is."""
    weight = Fraction(mixture.weight)
    planted = {"path": os.path.abspath(prefix), "name": planted_name(prefix), "weight": mixture.weight}
    clean = [{"path": path, "name": name, "weight": float(share * (1 - weight))} for path, name, share in size.shares]
    return [*clean, planted]
