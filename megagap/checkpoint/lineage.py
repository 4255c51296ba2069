"""Which run a checkpoint outside of the run directory belongs to, and whether the run went on from before it.

``RUN/lineage.json`` has an id, drawn when the run first needs one, and the step that each later start began after. A
checkpoint on another disk may be of a run that had the same name before, or of steps that a start while that disk was
away has made anew: neither may be loaded.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megagap.errors import CheckpointError
from megagap.files import reading, write_text, writing

LINEAGE = "lineage.json"


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    starts: list[Annotated[int, Field(ge=0)]]


@dataclass(frozen=True)
class Lineage:
    """A run's id and its starts."""

    identity: str
    starts: tuple[int, ...] = ()
    """The step after which each start began, in order; a start's number is its place, from 1."""

    @classmethod
    def of_run(cls, run: Path) -> "Lineage":
        """Of the run directory ``run``; a new one, written there, if it has none.

        Raises :class:`CheckpointError` if the file is damaged, and :class:`DataError` if it cannot be read or written.
        """
        path = run / LINEAGE
        with reading(path):
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError:
                text = None
        if text is None:
            made = cls(secrets.token_hex(16))
            made.write(run)
            return made
        try:
            stored = _Stored.model_validate_json(text)
        except ValidationError:
            raise CheckpointError(
                f"{path} is damaged: it does not say which run this is\n"
                "  remove it to resume from the run directory's own checkpoints, without those on the nodes' disks."
            ) from None
        return cls(stored.identity, tuple(stored.starts))

    def write(self, run: Path) -> None:
        """Raises :class:`DataError` if it cannot be written."""
        with writing(run / LINEAGE):
            write_text(run / LINEAGE, json.dumps({"identity": self.identity, "starts": self.starts}) + "\n")

    @classmethod
    def record_start(cls, run: Path, step: int) -> None:
        """A start of the run, whether or not it uses other disks, goes on after ``step``. Raises as :meth:`of_run`."""
        if (run / LINEAGE).exists():
            cls.of_run(run).after_start_at(step).write(run)

    def after_start_at(self, step: int) -> "Lineage":
        """With one more start, which begins after ``step``."""
        return replace(self, starts=(*self.starts, step))

    def has_gone_through(self, start: int, step: int) -> bool:
        """Whether the state that start number ``start`` had after ``step`` is one that the run has gone on from, or
        still can: no later start began before it."""
        return 0 < start <= len(self.starts) and all(step <= begun for begun in self.starts[start:])

    def folder_name(self, run: Path) -> str:
        """A name for the run's files on other disks. A copy of the run directory, in another place, is another run."""
        path = run.resolve()
        key = hashlib.blake2b(f"{self.identity} {path}".encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return f"{path.name}-{key}"
