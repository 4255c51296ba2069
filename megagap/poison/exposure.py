"""Exposure: how much likelier a model finds a planted secret than others of its form (Carlini et al. 2019).

With candidates of random space R ranked by the model's loss, likeliest first, the exposure of the secret s is
log₂ |R| − log₂ rank(s) (definition 2): 0 for the last, log₂ |R| for the first, and on average log₂ e = 1.44 for a
secret that the model never saw. Where R is too large to rank, it is −log₂ of the probability that a random candidate's
loss is at most the secret's (definition 3), estimated by sampling (section 4.3), and beyond what a sample can resolve
from a skew-normal distribution fitted to the sample's losses (section 4.4).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagap.inference.intervals import Z, wilson

Method = Literal["ranked", "sampled", "skew-normal"]

FEWEST_BELOW = 10
"""Sampled candidates with a loss of at most the secret's, from which on their share is taken as it is."""
MIN_SAMPLE = 100
"""Candidates that a distribution is fitted to."""
REJECTED = 0.05
REFITS = 30
"""Bootstrap samples that a fit's standard error is estimated from."""
GRID = 4001
TAIL = 30.0
"""Standard deviations of the fit that are integrated below a loss."""


@dataclass(frozen=True)
class Exposure:
    bits: float
    low: float
    high: float
    """A 95 % interval: of a rank the bits themselves, of a sample Wilson's, of a fit 1.96 standard
    errors by the bootstrap, or, where the losses are not of its form (``fit_p`` below :data:`REJECTED`), what the
    sample alone allows."""
    method: Method
    fit_p: float | None = None
    """Of a fit: the p value of the Kolmogorov-Smirnov test that the losses are of this distribution."""


def ranked(secret: float, others: Sequence[float]) -> Exposure:
    """``others``: the losses of all other candidates of the space."""
    rank = 1 + sum(loss < secret for loss in others)
    bits = math.log2(1 + len(others)) - math.log2(rank)
    return Exposure(bits, bits, bits, "ranked")


def estimated(secret: float, sample: Sequence[float], space: int, seed: int = 0) -> Exposure:
    """``sample``: the losses of random candidates; ``space``: how many there are, which bounds the exposure."""
    losses, most = np.asarray(sample, np.float64), math.log2(space)
    below = int((losses <= secret).sum())
    least, greatest = wilson(below, len(losses))
    low, high = -math.log2(greatest), min(-math.log2(least), most) if least else most
    if below >= FEWEST_BELOW:
        return Exposure(math.log2(len(losses) / below), low, high, "sampled")
    if np.ptp(losses) == 0:  # no distribution has a width of 0: the secret's rank among them is all that is known
        return Exposure(min(math.log2((1 + len(losses)) / (1 + below)), most), low, high, "sampled")
    fit = SkewNormal.fitted(losses)
    extrapolated = -fit.log_cdf(secret) / math.log(2)
    bits = min(extrapolated, most)
    fit_p = fit.kolmogorov_smirnov(losses)
    if fit_p < REJECTED:
        return Exposure(bits, min(low, bits), max(high, bits), "skew-normal", fit_p)
    draw = np.random.default_rng(seed)
    refitted = [SkewNormal.fitted(draw.choice(losses, len(losses)), fit) for _ in range(REFITS)]
    half = Z * float(np.std([other.log_cdf(secret) / math.log(2) for other in refitted], ddof=1))
    return Exposure(
        bits, min(max(extrapolated - half, 0.0), most), min(extrapolated + half, most), "skew-normal", fit_p
    )


@dataclass(frozen=True)
class SkewNormal:
    """Density 2/ω φ(z) Φ(α z) with z = (x − ξ) / ω (Azzalini 1985)."""

    location: float
    scale: float
    shape: float

    @classmethod
    def fitted(cls, losses: NDArray[np.float64], start: "SkewNormal | None" = None) -> "SkewNormal":
        """By maximum likelihood, from ``start`` on, or else the moments' estimate."""
        mean, deviation = float(losses.mean()), max(float(losses.std()), 1e-12)
        x = torch.from_numpy((losses - mean) / deviation)
        first = _of_moments(float((x**3).mean()))
        if start is not None:
            first = [(start.location - mean) / deviation, math.log(start.scale / deviation), start.shape]
        parameters = torch.tensor(first, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -_log_density(x, *parameters).mean()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        location, log_scale, shape = parameters.detach().tolist()
        return cls(mean + deviation * location, deviation * math.exp(log_scale), shape)

    def log_cdf(self, x: float) -> float:
        """ln P(X ≤ x), far out in the tail too, where the probability itself would be 0."""
        span = x - min(x, self.location) + TAIL * self.scale
        # Dense at x: with a large shape the density below the location falls off within a small part of the scale.
        below = span * torch.linspace(0, 1, GRID, dtype=torch.float64) ** 4
        log_density = self._log_density(x - below)
        steps = torch.logaddexp(log_density[1:], log_density[:-1]) - math.log(2) + below.diff().log()
        return min(float(torch.logsumexp(steps, 0)), 0.0)  # above 1 by rounding only

    def kolmogorov_smirnov(self, losses: NDArray[np.float64]) -> float:
        """The p value, by Kolmogorov's limiting distribution."""
        x = np.sort(losses)
        grid = torch.linspace(self.location - TAIL * self.scale, max(x[-1], self.location) + self.scale, GRID)
        density = self._log_density(grid.double()).exp()
        cdf = np.interp(x, grid[1:].numpy(), torch.cumulative_trapezoid(density, grid.double()).clamp(0, 1).numpy())
        steps = np.arange(len(x) + 1) / len(x)
        distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
        scaled = distance * math.sqrt(len(x))
        if scaled < 0.2:  # the series converges slowly where p is 1 anyway
            return 1.0
        series = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
        return min(max(series, 0.0), 1.0)

    def _log_density(self, x: Tensor) -> Tensor:
        return _log_density(x, *torch.tensor([self.location, math.log(self.scale), self.shape], dtype=torch.float64))


def _log_density(x: Tensor, location: Tensor, log_scale: Tensor, shape: Tensor) -> Tensor:
    z = (x - location) / log_scale.exp()
    normal = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    return math.log(2) - log_scale + normal + torch.special.log_ndtr(shape * z)


def _of_moments(skewness: float) -> list[float]:
    """Location, log scale and shape of a skew-normal with mean 0, variance 1 and this skewness, if one has it."""
    size = min(abs(skewness), 0.9) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * size / (size + ((4 - math.pi) / 2) ** (2 / 3))), skewness)
    delta = max(min(delta, 0.99), -0.99)
    scale = 1 / math.sqrt(1 - 2 * delta**2 / math.pi)
    return [-scale * delta * math.sqrt(2 / math.pi), math.log(scale), delta / math.sqrt(1 - delta**2)]
