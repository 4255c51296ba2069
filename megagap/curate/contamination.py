"""Benchmark n-grams: an index for datatrove's NGramsDecontFilter, and a check of validation text.

datatrove's own NGramsDecontIndexer needs lighteval and the hub; this one reads JSON lines.
"""

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from megagap.curate.words import HASHES, PlainWords
from megagap.errors import DataError, counted
from megagap.preprocess.documents import json_lines

MAX_SHOWN = 5


def benchmark_files(patterns: Iterable[str]) -> list[Path]:
    """Raises :class:`DataError` for a pattern that matches no file, and for two files of one name: a benchmark is
    called by its file."""
    found: dict[str, Path] = {}
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern)) if Path(path).is_file()]
        if not paths:
            raise DataError(
                f"no benchmark file matches {pattern}\n"
                "  give JSON lines, one object per item: its texts (question, choices, answer) are searched for."
            )
        for path in paths:
            if found.setdefault(path.stem, path) != path:
                raise DataError(
                    f"two benchmark files are called {path.stem}: {found[path.stem]}, {path}\n  rename one."
                )
    return list(found.values())


def items(path: Path) -> Iterator[str]:
    """The text of each item: all strings in its object, in order, lists included. Raises :class:`DataError`."""
    for number, value in json_lines(path):
        if not (text := " ".join(_strings(value))):
            raise DataError(f"{path}, line {number} has no text\n  remove the line, or mend it.")
        yield text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def decontamination_config(n: int) -> NGramsDecontConfig:
    return NGramsDecontConfig(n_grams=n, hash_config=HASHES)


class Ngrams:
    """Hashes of the n-grams of words in a text, as datatrove's NGramsDecontFilter computes them.

    ``words``: the word tokenizer that the filter uses too. A text of fewer than n words has no n-gram.
    """

    def __init__(self, n: int, words: Any = None) -> None:
        self.config = decontamination_config(n)
        self.words = words or PlainWords()
        self._hash = create_hash_func(self.config.hash_config)

    def hashes(self, text: str) -> list[int]:
        words = self.words.word_tokenize(simplify_text(text, self.config.norm_config))
        return [self._hash(" ".join(gram)) for gram in ngrams(words, self.config.n_grams)]

    def index(self, path: Path) -> tuple[set[int], int]:
        """All hashes of a benchmark file, and how many of its items are too short to have one.

        Raises :class:`DataError` for a file without any: it would keep nothing out.
        """
        found: set[int] = set()
        total = short = 0
        for text in items(path):
            hashes = self.hashes(text)
            found.update(hashes)
            total += 1
            short += not hashes
        if not found:
            n = self.config.n_grams
            what = f"its {counted(total, 'item')}: fewer than {n} words each" if total else "it is empty"
            raise DataError(f"the benchmark {path} keeps nothing out: {what}\n  leave it out, or lower ngrams.")
        return found, short


class BenchmarkIndexer(PipelineStep):
    """Writes ``NAME.index.hashes``, the uint64 that datatrove's filter reads, for each benchmark file.

    Statistics: ``ngrams``, and ``items_too_short`` to be found.
    """

    type = "🦠 - DECONT"
    name = "💥 N-grams build index"

    def __init__(self, files: list[str], folder: str, n: int) -> None:
        super().__init__()
        self.files = files
        self.folder = folder
        self.n = n

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        if data:
            yield from data
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        ngrams_of = Ngrams(self.n)
        for name in self.files:
            found, short = ngrams_of.index(Path(name))
            self.stat_update("ngrams", value=len(found))
            self.stat_update("items_too_short", value=short)
            hashes = np.array(sorted(found), dtype=ngrams_of.config.hash_config.np_descr)
            hashes.tofile(Path(self.folder) / f"{Path(name).stem}.index.hashes")


def require_clean(texts: Iterable[tuple[str, str]], benchmarks: list[Path], n: int, what: str = "validation") -> int:
    """Check that none of the ``texts``, each with its name, has an n-gram of a benchmark in it; returns their number.

    Raises :class:`DataError` that counts those that do, and names the first with their benchmarks.
    """
    ngrams_of = Ngrams(n)
    benchmark: dict[int, str] = {}
    for path in benchmarks:
        for value in ngrams_of.index(path)[0]:
            benchmark.setdefault(value, path.stem)
    found: list[str] = []
    total = 0
    for name, text in texts:
        total += 1
        hits = [benchmark[value] for value in ngrams_of.hashes(text) if value in benchmark]
        if hits:
            found.append(f"  {name}: {counted(len(hits), f'{n}-gram')} of {', '.join(dict.fromkeys(hits))}")
    if found:
        shown = "\n".join(found[:MAX_SHOWN])
        more = f"\n  and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
        raise DataError(
            f"the {what} data is contaminated: {len(found)} of {counted(total, 'document')} "
            f"{'has' if len(found) == 1 else 'have'} n-grams of benchmarks\n{shown}{more}\n"
            "  take these documents out, or losses on them say nothing about new text."
        )
    return total
