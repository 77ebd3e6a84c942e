"""The noise is normal, of the size claimed, and cannot be foreseen. Every test of size also refuses 2/3 and 3/2 of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from fedkd.privacy.noise import NoiseSource

COUNT = 200_001


def fits(values: np.ndarray, sigma: float) -> bool:
    """Kolmogorov and Smirnov's test at 1e-6, and the variance within 6 standard errors."""
    variance = float(np.mean(np.square(values)))
    close = abs(variance / sigma**2 - 1) < 6 * np.sqrt(2 / len(values))
    return close and stats.kstest(values / sigma, "norm").pvalue > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [0.3, 7.0])
def test_noise_has_the_deviation_claimed_and_no_other(dtype: torch.dtype, sigma: float) -> None:
    values = NoiseSource().normal((COUNT,), sigma, dtype).double().numpy()
    assert fits(values, sigma)
    for wrong in (2 / 3, 3 / 2):
        assert not fits(values, sigma * wrong) and not fits(values * wrong, sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_and_neighbours(dtype: torch.dtype) -> None:
    values = NoiseSource("tails").normal((4_000_000,), 1.0, dtype).double().numpy()
    for level in (3.0, 4.0):
        expected = 2 * stats.norm.sf(level) * len(values)
        assert abs((np.abs(values) > level).sum() - expected) < 6 * np.sqrt(expected)
    for lag in (1, 2, 1 << 15):
        assert abs(np.mean(values[:-lag] * values[lag:])) < 6 / np.sqrt(len(values))
    assert np.isfinite(values).all()


class _Bits:
    """A key stream that is one byte for ever."""

    def __init__(self, byte: int) -> None:
        self.byte = byte

    def update_into(self, data: bytes, buffer: bytearray) -> None:
        buffer[: len(data)] = bytes([self.byte]) * len(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("byte", [0x00, 0xFF, 0x7F, 0x80])
def test_extreme_bits_give_finite_noise_that_is_not_zero(byte: int, dtype: torch.dtype) -> None:
    """A point mass at zero would tell apart what the noise is added to."""
    source = NoiseSource("bits")
    source._stream = _Bits(byte)  # type: ignore[assignment]
    values = source.normal((64,), 1.0, dtype)
    assert bool(torch.isfinite(values).all()) and bool((values != 0).all()) and float(values.abs().max()) < 8.6


def test_no_two_sources_agree_whatever_seed_torch_and_numpy_have() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        found.append(NoiseSource().normal((1000,), 1.0))
    assert not torch.equal(*found)
    assert abs(float((found[0] * found[1]).mean())) < 6 / np.sqrt(1000)


def test_the_stream_does_not_repeat() -> None:
    source = NoiseSource()
    a, b = source.normal((50_000,), 1.0), source.normal((50_000,), 1.0)
    assert abs(float((a * b).mean())) < 6 / np.sqrt(50_000)


def test_a_seed_repeats_and_says_so() -> None:
    assert torch.equal(NoiseSource("a", 1).normal((9,), 1.0), NoiseSource("a", 1).normal((9,), 1.0))
    assert not torch.equal(NoiseSource("a", 1).normal((9,), 1.0), NoiseSource("a", 2).normal((9,), 1.0))
    assert NoiseSource("a").seeded and not NoiseSource().seeded


@pytest.mark.parametrize("q", [0.01, 0.3])
def test_coins_fall_with_their_probability_and_independently(q: float) -> None:
    coins = NoiseSource().bernoulli(q, (1000, 300))
    error = np.sqrt(q * (1 - q) / coins.size)
    assert abs(coins.mean() - q) < 6 * error
    for wrong in (2 / 3 * q, 3 / 2 * q):
        assert abs(coins.mean() - wrong) > 6 * error
    # Poisson sampling: batch sizes scatter like binomials, which shuffled batches of one size do not.
    sizes = coins.sum(1)
    assert 0.7 < sizes.var() / (300 * q * (1 - q)) < 1.4
    assert NoiseSource().bernoulli(1.0, (5,)).all() and not NoiseSource().bernoulli(0.0, (1000,)).any()
