"""Exposure is what Carlini et al. (2019) define, exactly where all candidates are ranked, and closely elsewhere."""

import math

import numpy as np
import pytest
import torch

from megagap.poison.exposure import SkewNormal, estimated, ranked


def skewed(count: int, shape: float, seed: int = 0) -> np.ndarray:
    """Draws of a skew-normal: δ |u| + √(1 − δ²) v of standard normal u, v."""
    draw = np.random.default_rng(seed)
    delta = shape / math.sqrt(1 + shape**2)
    return delta * np.abs(draw.normal(size=count)) + math.sqrt(1 - delta**2) * draw.normal(size=count)


def test_ranked_exposure_is_the_definition_by_brute_force():
    losses = np.random.default_rng(1).normal(20, 3, 1000)
    order = sorted(range(1000), key=lambda i: losses[i])
    for i in (order[0], order[1], order[499], order[999]):
        others = [loss for j, loss in enumerate(losses) if j != i]
        expected = math.log2(1000) - math.log2(order.index(i) + 1)
        found = ranked(losses[i], others)
        assert found.bits == found.low == found.high == pytest.approx(expected) and found.method == "ranked"


def test_a_secret_that_was_never_seen_has_an_exposure_of_log2_e_on_average():
    draw = np.random.default_rng(2)
    found = [ranked(*_first_and_rest(draw.normal(size=256))).bits for _ in range(2000)]
    assert np.mean(found) == pytest.approx(math.log2(math.e), abs=0.12)


def _first_and_rest(values):
    return values[0], values[1:].tolist()


def test_sampled_exposure_is_near_the_ranked_one_and_its_interval_has_it():
    everything = skewed(100_000, 2.0)
    secret = float(np.quantile(everything, 0.05))
    exact = ranked(secret, everything.tolist())
    found = estimated(secret, skewed(1000, 2.0, seed=5).tolist(), 100_001)
    assert found.method == "sampled"
    assert found.low <= exact.bits <= found.high and found.bits == pytest.approx(exact.bits, abs=0.5)


def test_beyond_the_sample_it_is_extrapolated_by_a_skew_normal():
    everything = skewed(1_000_000, 2.0)
    secret = float(np.sort(everything)[20])
    exact = math.log2(1_000_001) - math.log2(21)
    found = estimated(secret, skewed(1000, 2.0, seed=5).tolist(), 10**9)
    assert found.method == "skew-normal" and found.fit_p > 0.05
    assert found.bits == pytest.approx(exact, abs=2.5) and found.low <= found.bits <= found.high
    far = estimated(-100.0, skewed(1000, 2.0, seed=5).tolist(), 10**6)
    assert far.bits == pytest.approx(math.log2(10**6)), "no more than the space has"


def test_where_no_distribution_fits_the_interval_is_what_the_sample_allows():
    """An exponential's losses have a least one, which a skew-normal knows nothing of."""
    losses = 20 + np.random.default_rng(0).exponential(size=1000)
    found = estimated(19.0, losses.tolist(), 10**6)
    assert found.method == "skew-normal" and found.fit_p < 0.05
    # None of a thousand: Wilson's interval of the share ends at z² / (n + z²).
    assert found.low == pytest.approx(math.log2((1000 + 1.96**2) / 1.96**2), abs=1e-4)
    assert found.high == pytest.approx(math.log2(10**6))


@pytest.mark.parametrize(("secret", "bits"), [(1.0, math.log2(1001)), (2.0, 0.0)])
def test_losses_that_are_all_the_same_tell_a_rank_only(secret, bits):
    found = estimated(secret, [2.0] * 1000, 10**6)
    assert found.method == "sampled" and found.bits == pytest.approx(bits) and found.low <= bits <= found.high


@pytest.mark.parametrize(
    ("shape", "z", "bits"), [(20.0, -1.0, -303.8919), (50.0, -0.3, -177.4968), (200.0, -0.05, -88.1177)]
)
def test_the_distribution_function_is_exact_where_it_falls_off_steeply(shape, z, bits):
    """By mpmath, with 40 digits."""
    assert SkewNormal(20.0, 3.0, shape).log_cdf(20 + 3 * z) / math.log(2) == pytest.approx(bits, abs=0.02)


@pytest.mark.parametrize("x", [-12.0, -3.0, 0.0, 1.5, 8.0])
def test_the_distribution_function_is_the_one_known_in_closed_form(x):
    """With shape 1 it is Φ(x)² and with shape 0 Φ(x) (Azzalini 1985), far out in the tails, too."""
    normal = float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))
    assert SkewNormal(3.0, 2.0, 1.0).log_cdf(3 + 2 * x) == pytest.approx(2 * normal, abs=1e-3, rel=1e-3)
    assert SkewNormal(3.0, 2.0, 0.0).log_cdf(3 + 2 * x) == pytest.approx(normal, abs=1e-3, rel=1e-3)


@pytest.mark.parametrize("shape", [-3.0, 0.0, 4.0])
def test_a_fit_finds_the_distribution_that_losses_were_drawn_from(shape):
    losses = 40 + 5 * skewed(4000, shape)
    fit = SkewNormal.fitted(losses)
    for share in (0.02, 0.3, 0.9):
        assert math.exp(fit.log_cdf(float(np.quantile(losses, share)))) == pytest.approx(share, abs=0.02)
    assert fit.kolmogorov_smirnov(losses) > 0.05
    assert fit.kolmogorov_smirnov(np.concatenate([losses, np.full(2000, 90.0)])) < 1e-6
