"""How far a share or a mean that was measured on a few cases may be from the true one."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

LEVEL = 0.95
"""Of every interval: the share of repeated measurements whose interval has the true value."""
Z = 1.959963984540054
"""The standard normal distribution's quantile at (1 + LEVEL) / 2."""
RESAMPLES = 2000


def wilson(successes: int, cases: int) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927): from 0 to 1, and of some width even if all or none succeeded."""
    if not cases:
        return 0.0, 1.0
    share = successes / cases
    scale = 1 + Z**2 / cases
    centre = (share + Z**2 / (2 * cases)) / scale
    half = Z * sqrt(share * (1 - share) / cases + Z**2 / (4 * cases**2)) / scale
    return (0.0 if not successes else centre - half), (1.0 if successes == cases else centre + half)


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The percentile interval of a mean (Efron 1979), from means of as many values drawn with replacement."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share_of(successes: int, cases: int) -> dict[str, Any]:
    """For reports: ``{"value", "low", "high", "cases"}``; the value is null without cases."""
    low, high = wilson(successes, cases)
    return {"value": successes / cases if cases else None, "low": low, "high": high, "cases": cases}


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """For reports, as :func:`share_of`; of one value there is no interval."""
    if not values:
        return {"value": None, "low": None, "high": None, "cases": 0}
    low, high = bootstrap_mean(values) if len(values) > 1 else (None, None)
    return {"value": float(np.mean(values)), "low": low, "high": high, "cases": len(values)}
