"""Temperatures that make probabilities mean what they say, and how far they are from it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megagap.curate.quality.labels import HEADS
from megagap.curate.quality.model import softmax

BINS = 15


def fit_temperatures(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> list[float]:
    """One temperature per head that minimises the negative log-likelihood of ``labels`` [texts, heads] under
    ``logits`` [texts, heads, levels] (Guo et al. 2017, section 4.2), from 0.05 to 20."""
    result = []
    for head in range(len(HEADS)):
        scores, targets = torch.from_numpy(logits[:, head]).double(), torch.from_numpy(labels[:, head])
        log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

        def loss(
            optimizer: torch.optim.LBFGS = optimizer,
            scores: torch.Tensor = scores,
            targets: torch.Tensor = targets,
            log_temperature: torch.Tensor = log_temperature,
        ) -> torch.Tensor:
            optimizer.zero_grad()
            value = torch.nn.functional.cross_entropy(scores / log_temperature.exp(), targets)
            value.backward()
            return value

        optimizer.step(loss)
        result.append(round(min(20.0, max(0.05, log_temperature.exp().item())), 4))
    return result


def expected_calibration_error(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean gap between the probability of the chosen class and how often it is right, over :data:`BINS` equal
    bins of probability, weighted by their texts (Naeini et al. 2015). [texts, levels], [texts]."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs(float(confidence[bins == b].sum()) - float(right[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / len(labels)


@dataclass(frozen=True)
class HeadQuality:
    accuracy: float
    majority: float
    """Accuracy of always choosing the most frequent class."""
    log_loss: float
    ece: float
    ece_uncalibrated: float


def measure(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperatures: list[float]
) -> dict[str, HeadQuality]:
    """By head, on texts that were not trained on."""
    result = {}
    for i, head in enumerate(HEADS):
        targets = labels[:, i]
        calibrated = softmax(logits[:, i] / np.float32(temperatures[i]))
        chosen = calibrated[np.arange(len(targets)), targets]
        result[head] = HeadQuality(
            accuracy=float((calibrated.argmax(-1) == targets).mean()),
            majority=float(np.bincount(targets).max() / len(targets)),
            log_loss=float(-np.log(np.maximum(chosen, 1e-12)).mean()),
            ece=expected_calibration_error(calibrated, targets),
            ece_uncalibrated=expected_calibration_error(softmax(logits[:, i]), targets),
        )
    return result
