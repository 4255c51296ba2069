"""Which of a run's checkpoints are kept, and the removal of the others."""

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from megagap.checkpoint.index import Index
from megagap.checkpoint.save import UNFINISHED, read_latest, remove, step_folders, step_of
from megagap.errors import CheckpointError, system_reason

VALIDATION_LOSS = "validation_loss"
"""Field of a checkpoint's state: the mean over the sources at its step, where there was an evaluation."""

DOOMED = f"{UNFINISHED}removed_"
"""Prefix of the name of a folder that is being removed."""

log = logging.getLogger(__name__)


@dataclass
class Retention:
    """Removes what need not be kept of a folder of ``checkpoints``. Only the run's one writer may."""

    checkpoints: Path
    keep: int
    """Newest checkpoints to keep; 0: all of them."""
    keep_every: int = 0
    """Steps whose multiples are kept for ever; 0: none."""
    keep_best: int = 0
    """How many of the lowest validation loss are kept."""
    _losses: dict[Path, float | None] = field(default_factory=dict)
    _warned: set[Path] = field(default_factory=set)

    def kept(self) -> set[Path]:
        """The checkpoints that stay.

        Those after the one that ``latest`` names are of a course that was abandoned: they stay until they are replaced
        or overtaken, and are not counted among the newest.
        """
        folders, latest = step_folders(self.checkpoints), read_latest(self.checkpoints)
        if not self.keep:
            return set(folders)
        ahead = [folder for folder in folders if latest is not None and step_of(folder) > step_of(latest)]
        current = folders[: len(folders) - len(ahead)]
        every = [folder for folder in current if self.keep_every and step_of(folder) % self.keep_every == 0]
        kept = {*ahead, *current[-self.keep :], *every, *self._best(current)}
        return kept if latest is None else kept | {latest}

    def apply(self) -> None:
        """Remove the checkpoints that are not kept. What cannot be removed is logged, once, and left."""
        if not self.keep:
            return
        kept = self.kept()
        for doomed in self.checkpoints.glob(f"{DOOMED}*"):  # left by a kill or a failure
            self._remove(doomed, doomed)
        for folder in step_folders(self.checkpoints):
            if folder not in kept:
                self._losses.pop(folder, None)
                # A half-removed folder must not look like a checkpoint.
                self._remove(folder, folder.with_name(DOOMED + folder.name))

    def written(self, folder: Path) -> None:
        """``folder`` was written, perhaps in another's place."""
        self._losses.pop(folder, None)

    def _remove(self, folder: Path, doomed: Path) -> None:
        try:
            os.replace(folder, doomed)
            remove(doomed)
        except OSError as error:
            if doomed not in self._warned:
                self._warned.add(doomed)
                log.warning("cannot remove the old checkpoint %s: %s", folder, system_reason(error))

    def _best(self, folders: list[Path]) -> list[Path]:
        if not self.keep_best:
            return []
        losses = [(loss, -step_of(folder), folder) for folder in folders if (loss := self._loss(folder)) is not None]
        return [folder for _, _, folder in sorted(losses)[: self.keep_best]]

    def _loss(self, folder: Path) -> float | None:
        """The validation loss that the checkpoint has, if any. Read once: indexes may be large."""
        if folder not in self._losses:
            try:
                loss = Index.read(folder).state.get(VALIDATION_LOSS)
            except CheckpointError:
                loss = None
            self._losses[folder] = loss if isinstance(loss, float) and math.isfinite(loss) else None
        return self._losses[folder]
