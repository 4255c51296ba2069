"""Labelled texts: JSON lines of ``text`` and ``labels``, divided by document."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megagap.errors import DataError
from megagap.preprocess.documents import json_lines

LEVELS = ("low", "medium", "high")
CRITERIA = ("accuracy", "style", "clarity", "depth", "usefulness")
HEADS = (*CRITERIA, "overall")
"""What is judged. ``style`` includes grammar; ``overall`` is what documents are kept by."""


@dataclass(frozen=True)
class Example:
    text: str
    labels: tuple[int, ...]
    """One of :data:`LEVELS`, by its index, for each of :data:`HEADS`."""
    document: str
    """Where the text was taken from; examples of one document are never on two sides of a split."""
    source: str = ""
    made_by: str = ""
    """How an example label was made, if it was."""


def read_labels(path: Path) -> list[Example]:
    """Lines ``{"text": …, "labels": {"accuracy": "low", …}, "document": …}``; ``document`` and ``source`` may be left
    out, and of the labels ``overall``, which is then the rounded mean of the criteria. Raises :class:`DataError`."""
    examples = [_example(value, f"{path}, line {number}") for number, value in json_lines(path)]
    if not examples:
        raise DataError(f"{path} has no examples\n  it needs lines of text and labels.")
    return examples


def _example(value: object, where: str) -> Example:
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("text"), str)
        or not isinstance(value.get("labels"), dict)
    ):
        raise DataError(f'{where} must be an object with "text" and "labels", such as {{"style": "low", …}}')
    if not value["text"].strip():
        raise DataError(f"{where} has an empty text\n  remove the line.")
    labels = dict(value["labels"])
    for name, level in labels.items():
        if name not in HEADS or level not in LEVELS:
            raise DataError(
                f"{where}: the label {name} = {level!r} is unknown\n  {', '.join(HEADS)} are {', '.join(LEVELS)}."
            )
    if missing := [name for name in CRITERIA if name not in labels]:
        raise DataError(f"{where} lacks the label {', '.join(missing)}\n  each text needs {', '.join(CRITERIA)}.")
    ids = [LEVELS.index(labels[name]) for name in CRITERIA]
    overall = LEVELS.index(labels["overall"]) if "overall" in labels else round(sum(ids) / len(ids))
    text = value["text"]
    document = value.get("document")
    if document is None:
        document = hashlib.blake2b(text.encode(errors="replace")).hexdigest()
    return Example(text, (*ids, overall), str(document), str(value.get("source", "")), str(value.get("made_by", "")))


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example], list[Example]]:
    """80 % to train on, 10 % to calibrate with, 10 % held out, by a hash of the document's name.

    Raises :class:`DataError` if one of the parts is empty.
    """
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        digest = hashlib.blake2b(example.document.encode(errors="replace"), digest_size=8).digest()
        tenth = int.from_bytes(digest, "little") % 10
        parts[2 if tenth == 0 else 1 if tenth == 1 else 0].append(example)
    if not all(parts):
        documents = len({example.document for example in examples})
        raise DataError(
            f"the labelled texts come from {documents} documents, too few to hold some of them out\n"
            "  a tenth of the documents is held out and a tenth used to calibrate: give at least some fifty documents."
        )
    return parts


def require_classes(examples: Sequence[Example]) -> None:
    """Raises :class:`DataError` if all examples have the same label for one of :data:`HEADS`."""
    for i, head in enumerate(HEADS):
        counts = Counter(LEVELS[example.labels[i]] for example in examples)
        if len(counts) < 2:
            raise DataError(
                f"all {len(examples):,} texts to train on have the label {head} = {next(iter(counts))}\n"
                "  a classifier can only learn to tell classes apart: add texts of another."
            )


def label_array(examples: Sequence[Example]) -> NDArray[np.int64]:
    """[examples, heads]"""
    return np.array([example.labels for example in examples], dtype=np.int64)
