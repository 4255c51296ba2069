"""What is kept of a step that is reported or skipped: why, what it was trained on, and its batch."""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from megagap.data.samples import Sample, TrainingData
from megagap.files import write_bytes, writing
from megagap.observe.run_directory import RunDirectory

log = logging.getLogger(__name__)

Numbers = Mapping[str, Sequence[float]]
"""Of a step, as its host copy is read (:class:`megagap.training.step.HostCopy`)."""


class Reason(StrEnum):
    """Why a step is reported or skipped, as events name it."""

    NOT_FINITE = "loss or gradient norm not finite"
    OVERFLOW = "gradients overflowed fp16; the loss scale is halved"
    NO_GRADIENT = "no gradient"
    NOT_REPEATED = "two computations of the step differ"
    SPIKE = "spike in loss or gradient norm"


def reason_of(numbers: Numbers) -> Reason | None:
    """Why a step is to be reported or was skipped; None where there is nothing to say."""
    (loss,), (norm,) = numbers["loss"], numbers["grad_norm"]
    overflows = math.isfinite(loss) and not math.isfinite(norm) and any(scale > 1 for scale in numbers["loss_scale"])
    if overflows and not any(numbers["differing"]):
        return Reason.OVERFLOW
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return Reason.NOT_FINITE
    if norm == 0 and loss != 0:
        return Reason.NO_GRADIENT
    if any(numbers["differing"]):
        return Reason.NOT_REPEATED
    return Reason.SPIKE if any(numbers["spike"]) else None


class Evidence:
    """Collects it for the events, on the rank that writes the run directory."""

    def __init__(self, run: RunDirectory, data: TrainingData, layers: Sequence[str]) -> None:
        """``layers``: names of those whose gradient norms are known."""
        self.run, self.data, self.layers = run, data, layers

    def of_step(self, step: int, numbers: Numbers) -> dict[str, Any]:
        """The details of the event of ``step``, whose batch is saved: ``guard/step_NNNNNNNN.npz`` in the run directory
        holds ``samples``, int64 [n], their ``sources`` [n], and ``tokens``, uint32 [n, s + 1].

        Raises :class:`DataError` if the data can no longer be read or the file cannot be written.
        """
        if not self.run.is_writer:
            return {}
        moment = self.data.timeline.at(step)
        samples = [self.data.sample(position) for position in range(moment.first_sample, moment.consumed_samples)]
        file = self.run.path / "guard" / f"step_{step:08}.npz"
        save_batch(file, samples)
        layer, norm = self._largest(numbers["layer_norms"])
        (loss,), (total,) = numbers["loss"], numbers["grad_norm"]
        details: dict[str, Any] = {
            "reason": reason_of(numbers),
            "loss": _finite(loss),
            "grad_norm": _finite(total),
            **{
                f"{name}_zscore": _finite(z) for name, z in zip(("loss", "grad_norm"), numbers["zscores"], strict=False)
            },
            "layer": layer,
            "layer_grad_norm": norm,
            "samples": ranges([sample.sample for sample in samples]),
            "sources": by_source(samples),
            "batch": str(file.relative_to(self.run.path)),
        }
        if any(numbers["differing"]):
            details["ranks"] = [rank for rank, differs in enumerate(numbers["differing"]) if differs]
        log.warning("step %d: %s", step, _described(details))
        return details

    def _largest(self, norms: Sequence[float]) -> tuple[str | None, float | None]:
        """The layer with the largest gradient, and its norm: of several that are not finite the last, since a backward
        pass carries them towards the first."""
        if not norms:
            return None, None
        _, index = max((norm if math.isfinite(norm) else math.inf, i) for i, norm in enumerate(norms))
        return self.layers[index], _finite(norms[index])


def save_batch(file: Path, samples: Sequence[Sample]) -> None:
    """Write the samples of a step. Raises :class:`DataError` naming the file if it cannot be written."""
    content = io.BytesIO()
    np.savez_compressed(
        content,
        samples=np.array([sample.sample for sample in samples]),
        sources=np.array([sample.source for sample in samples]),
        tokens=np.stack([sample.tokens for sample in samples]).astype(np.uint32),
    )
    with writing(file):
        write_bytes(file, content.getvalue())


def ranges(numbers: Sequence[int]) -> list[str]:
    """Ascending sample numbers as ``train.skip_samples`` takes them: ``["384:400"]``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return [f"{start}:{stop}" for start, stop in found]


def by_source(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The documents of each source that the samples have tokens of, and the files that they lie in."""
    found: dict[str, tuple[set[str], set[int]]] = {}
    for sample in samples:
        files, documents = found.setdefault(sample.source, (set(), set()))
        files.update(sample.files)
        documents.update(sample.documents)
    return [
        {"source": source, "files": sorted(files), "documents": sorted(documents)}
        for source, (files, documents) in found.items()
    ]


def _described(details: Mapping[str, Any]) -> str:
    ranks = f" on ranks {', '.join(map(str, details['ranks']))}" if "ranks" in details else ""
    layer = f"; the largest gradient is that of {details['layer']}" if details["layer"] else ""
    return (
        f"{details['reason']}{ranks} (loss {details['loss']}, gradient norm {details['grad_norm']}){layer}; "
        f"samples {', '.join(details['samples'])}, saved as {details['batch']}"
    )


def _finite(number: float) -> float | None:
    """JSON has no others."""
    return number if math.isfinite(number) else None
