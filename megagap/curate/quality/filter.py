"""The classifier as a block of datatrove."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datatrove.pipeline.filters.base_filter import BaseFilter

from megagap.curate.quality.labels import HEADS, LEVELS
from megagap.curate.quality.model import QualityModel, load_quality_model

if TYPE_CHECKING:
    from datatrove.data import Document


class QualityFilter(BaseFilter):
    """Leaves out documents whose most probable overall level is in ``drop``.

    Sets ``quality`` (that level) and ``quality_scores`` (for each head the expected level, from 0 low to 2 high) in
    their metadata. One thread: a task has one core, and results do not depend on how many cores a machine has.
    """

    name = "🎓 Quality classifier"

    def __init__(self, model: str, drop: Collection[str], batch_size: int = 32, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer, batch_size)
        self.model = model
        self.drop = list(drop)
        self._loaded: QualityModel | None = None

    def filter(self, doc: "Document") -> Any:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: "list[Document]") -> list[Any]:
        if self._loaded is None:  # in the task's process
            torch.set_num_threads(1)
            self._loaded = load_quality_model(Path(self.model))
        probabilities = self._loaded.probabilities([doc.text for doc in batch], self.batch_size)
        expected = probabilities @ [0.0, 1.0, 2.0]
        verdicts: list[Any] = []
        for doc, scores, overall in zip(batch, expected, probabilities[:, -1], strict=True):
            level = LEVELS[int(overall.argmax())]
            doc.metadata["quality"] = level
            doc.metadata["quality_scores"] = {
                head: round(float(score), 3) for head, score in zip(HEADS, scores, strict=True)
            }
            self.stat_update(f"quality_{level}")
            verdicts.append((False, level) if level in self.drop else True)
        return verdicts
