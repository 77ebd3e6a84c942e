"""Skellam noise: integers whose sum over devices is again Skellam, so that many small noises make the one that is wanted.

N. Agarwal, P. Kairouz, Z. Liu, "The Skellam Mechanism for Differentially Private Federated Learning", NeurIPS 2021,
https://arxiv.org/abs/2110.04995. Sk(mu) is the difference of two independent Poisson(mu/2) numbers: mean 0, variance mu,
P[k] = e^-mu I_|k|(mu). The distributed discrete Gaussian (Kairouz, Liu, Steinke, ICML 2021) serves the same end, but is
not closed under sums, so that its bound worsens with every device; hence one of the two is enough.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedkd.privacy.noise import NoiseSource

TAIL_BITS = 63
"""Noise is drawn on a grid of 2^-63: events rarer than that do not occur."""

MAX_VARIANCE = 1e9


@lru_cache(maxsize=64)
def _survival(variance: float) -> NDArray[np.uint64]:
    """Return floor(2^63 P[|X| >= k]) for k = 1, 2, ... until it is 0, falling.

    Summed from the tail up, so that small probabilities keep their relative precision (1e-13).
    """
    from scipy.special import ive

    # Beyond it the mass is below 2^-63 (Chernoff's bound for a Skellam number, rounded up generously).
    reach = math.ceil(10 * math.sqrt(variance) + 50)
    mass = ive(np.arange(reach + 1), variance)  # e^-mu I_k(mu): exponentially scaled, so that nothing overflows
    tail = 2 * np.cumsum(mass[::-1])[::-1][1:]
    scaled = np.minimum(tail, 1.0) * 2.0**TAIL_BITS
    found: NDArray[np.uint64] = scaled.astype(np.uint64)
    return found[found > 0]


def reach(variance: float) -> int:
    """Return the largest magnitude that :func:`draw` can give at this variance: wrap-around is not left to luck."""
    return len(_survival(variance)) if variance > 0 else 0


def draw(variance: float, count: int, source: NoiseSource) -> NDArray[np.int64]:
    """Return ``count`` independent Skellam numbers of ``variance``.

    Guarantee: each is within 2^-60 of Sk(variance) in total variation (grid and cut tail together) and within a factor
    1 ± 1e-12 inside, which is 1e-11 in delta for 20,000 numbers in each of 1,000 rounds. Randomness comes from ``source``
    alone, by comparison of whole integers: no floating-point number of low bits that tell the true value (Mironov 2012).
    """
    if not 0 <= variance <= MAX_VARIANCE:
        raise ValueError(f"the variance of Skellam noise must lie in [0, {MAX_VARIANCE:g}], got {variance}")
    if variance == 0:
        return np.zeros(count, np.int64)
    raw = source.bits(2 * count).astype(np.uint64)
    word = (raw[:count] << np.uint64(32)) | raw[count:]
    sign = (word >> np.uint64(63)).astype(np.int64)
    uniform = word & np.uint64(2**63 - 1)
    # |X| is the number of k with uniform < 2^63 P[|X| >= k].
    rising = _survival(variance)[::-1]
    size = len(rising) - np.searchsorted(rising, uniform, side="right").astype(np.int64)
    found: NDArray[np.int64] = np.where(sign == 1, -size, size)
    return found


def divergence(order: float, variance: float, l1: float, l2: float) -> float:
    """Return a bound on the Renyi divergence of ``order`` (an integer above 1) for Skellam noise on an integer vector.

    Corollary 3.6 of the paper in the integers' own scale: a D2²/(2mu) + min{((2a-1) D2² + 6 D1)/(4mu²), 3 D1/(2mu)}.

    Args:
        variance: mu, of the noise on one entry of the sum.
        l1, l2: norms that one unit can add to the sum at most.
    """
    if variance <= 0:
        return math.inf
    first = order * l2**2 / (2 * variance)
    return first + min(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))


def curve(orders: tuple[int, ...], variance: float, l1: float, l2: float) -> tuple[tuple[float, float], ...]:
    """Return (order, divergence) pairs, as a ledger's event takes them."""
    return tuple((float(a), divergence(a, variance, l1, l2)) for a in orders)
