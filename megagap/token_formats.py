"""The formats of token files: the endings of their two files, and who reads them.

A new one is a reader, a subclass of :class:`megagap.data.token_file.TokenFile`, and a line in :data:`FORMATS`.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from megagap.files import require_name


@dataclass(frozen=True)
class TokenFormat:
    """Files ``PREFIX`` + ending, and the class that reads them."""

    index: str
    """Ending of the file that says where documents are: by this file a format is recognised."""
    tokens: str
    """Ending of the file with the tokens."""
    reader: str
    """``module:class``, imported when such a file is opened."""


FORMATS = [TokenFormat(".idx", ".bin", "megagap.data.indexed:IndexedDataset")]
"""In the order in which they are tried; the first is Megatron's, which preprocessing writes."""


def find_format(prefix: str) -> TokenFormat | None:
    """The format of the token file that is there; None if none is."""
    return next((known for known in FORMATS if os.path.exists(prefix + known.index)), None)


def format_of(prefix: str) -> TokenFormat:
    """The format of the token file that is there, or would be."""
    return find_format(prefix) or FORMATS[0]


def is_of_a_pair(path: Path) -> bool:
    """Whether it is one of the two files of a token file, both of which are there."""
    pairs = ((known.index, known.tokens) for known in FORMATS)
    return any(path.suffix in pair and all(path.with_suffix(ending).is_file() for ending in pair) for pair in pairs)


def pair_prefix(name: str | Path) -> str:
    """The prefix of a token file, given that prefix or the name of one of its files."""
    require_name(name)
    prefix = str(name)
    for ending in [ending for known in FORMATS for ending in (known.tokens, known.index)] + [".json", ".origins"]:
        stem = prefix.removesuffix(ending)
        if stem != prefix and find_format(prefix) is None:
            return stem
    return prefix


def matching_prefixes(pattern: str, folder: Path | None = None) -> list[str]:
    """The prefixes of the token files that a shell pattern of prefixes matches, as the pattern is written."""
    found: set[str] = set()
    for ending in (known.index for known in FORMATS):
        found |= {name.removesuffix(ending) for name in glob.glob(pattern + ending, root_dir=folder)}
    return sorted(found)
