"""The first block of a curation: JSON lines to documents. What is no document is counted like what a filter drops."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megagap.curate.settings import Input
from megagap.errors import DataError
from megagap.preprocess.documents import Fault, line_units, objects_of


class CorpusReader(PipelineStep):
    """Reads ``files`` of the folder of ``settings``, each whole by one task.

    datatrove's JsonlReader leaves out, with no more than a line in a log, what is not JSON or lacks a text, and the
    rest of a file after a byte that is not UTF-8. Raises :class:`DataError` for a file that is cut short, or changed.
    """

    name = "📖 Corpus"
    type = "📖 - READER"

    def __init__(self, settings: Input, files: Sequence[Path], exclusion_writer: Any = None) -> None:
        super().__init__()
        self.settings = settings
        self.files = list(files)
        self.exclusion_writer = exclusion_writer

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from data or ()
        with self.exclusion_writer or nullcontext() as writer:
            for path in self.files[rank::world_size]:
                for identity, found in self._lines(path):
                    self.stat_update("total")
                    found = found if isinstance(found, Fault) else self._document(found, identity, path)
                    if isinstance(found, Document):
                        self.stat_update("forwarded")
                        self.update_doc_stats(found)
                        yield found
                        continue
                    self.stat_update("dropped", f"dropped_{found.reason}")
                    if writer:
                        metadata = {"file_path": str(path), "filter_reason": found.reason}
                        writer.write(Document(found.details, identity, metadata=metadata), rank)

    def _lines(self, path: Path) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
        """By file and number of the line, from 0, as datatrove names documents that have no id."""
        name = path.relative_to(self.settings.folder).as_posix()
        for unit in line_units(path):
            for found in objects_of(unit, self.settings.text_key):
                number, value = (found.line, found) if isinstance(found, Fault) else found
                yield f"{name}/{unit.line - 1 + number}", value

    def _document(self, value: dict[str, Any], identity: str, path: Path) -> Document | Fault:
        text = value.pop(self.settings.text_key)
        if not text:
            return Fault(0, "empty text", f"the value of {self.settings.text_key!r} is empty")
        given = value.pop(self.settings.id_key, None)
        own = value.pop("metadata", {})
        metadata = {"file_path": str(path)} | (own if isinstance(own, dict) else {"metadata": own}) | value
        metadata.pop("filter_reason", None)  # of an earlier curation, if this is what it dropped
        try:
            orjson.dumps([given, metadata])
        except TypeError as error:  # half of a surrogate pair in a title, for example
            return Fault(0, "unwritable value", f"a value beside the text cannot be written: {error}")
        return Document(text, identity if given is None else given, metadata=metadata)


def has_documents(path: Path, key: str) -> bool:
    """Whether there is one among the first hundred or so; False for an empty file.

    Raises :class:`DataError` if the file cannot be read, is not of JSON lines, or has nothing else.
    """
    seen = 0
    for unit in line_units(path):
        for found in objects_of(unit, key):
            if not isinstance(found, Fault):
                return True
            seen += 1
        if seen >= 100:
            break
    if seen:
        raise DataError(
            f'{path} has no document: none of its first {seen} lines is a JSON object with a "{key}"\n'
            "  input.text_key names the key of the text; input.pattern chooses files."
        )
    return False
