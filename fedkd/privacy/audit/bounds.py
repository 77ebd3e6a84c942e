"""Lower bounds on epsilon from attacks, at a stated confidence, and how well an attack does.

Two ways. *One run*: T. Steinke, M. Nasr, M. Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023,
https://arxiv.org/abs/2305.08846: m canaries are put in or left out by fair coins in one run, and an attacker guesses r of
the coins. *Many runs*: the mechanism is run many times with and without one canary, and a threshold on what it releases
tells the two apart; M. Nasr et al., "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023,
https://arxiv.org/abs/2302.07956.

A bound above the claim refutes the claim (or, in 1 - confidence of all audits, is bad luck); one below proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

CONFIDENCE = 0.95
LARGEST = 50.0
"""No audit of fewer than e^50 canaries finds more."""


def shared(tests: int) -> float:
    """Return the confidence of each of ``tests`` tests that are wrong together in 1 - CONFIDENCE at most (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, tests)


Scores = NDArray[np.floating]
Coins = NDArray[np.bool_]


# ---- how well an attack does ------------------------------------------------------------------------------------------
def auc(scores: Scores, inside: Coins) -> float:
    """Return the probability that a member scores above a non-member, ties counted half; NaN without both kinds."""
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if not n_in or not n_out:
        return math.nan
    ranks = stats.rankdata(scores)
    return float((ranks[inside].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


def tpr_at(scores: Scores, inside: Coins, fpr: float = 0.01) -> float:
    """Return the largest share of members found at a share of at most ``fpr`` of false alarms; NaN without both kinds."""
    members, others = np.sort(scores[inside]), np.sort(scores[~inside])
    if not len(members) or not len(others):
        return math.nan
    # A threshold is just above the highest non-member that must not be called a member.
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = others[len(others) - 1 - allowed] if allowed < len(others) else -math.inf
    return float((members > threshold).mean())


# ---- one run --------------------------------------------------------------------------------------------------------
def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float = 0.0) -> float:
    """Return the largest probability with which an (epsilon, delta)-DP run lets ``right`` or more of ``guesses`` be right.

    Theorem 5.2 of Steinke et al.: beta + 2 m delta max_{1<=i<=v} P[v - i <= B < v] / i with B ~ Bin(r, e^eps/(1+e^eps)).
    """
    if not 0 <= right <= guesses <= canaries or epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(f"expected 0 <= right <= guesses <= canaries, got {right}, {guesses}, {canaries}")
    q = float(special.expit(epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, q))
    if delta == 0 or right == 0:
        return beta
    at_least = stats.binom.sf(np.arange(right) - 1, guesses, q)[::-1]  # P[B >= v - i] for i = 1 .. v
    share = (at_least - beta) / np.arange(1, right + 1)
    return float(min(1.0, beta + 2 * canaries * delta * max(0.0, float(share.max()))))


def one_run_bound(canaries: int, guesses: int, right: int, delta: float = 0.0, confidence: float = CONFIDENCE) -> float:
    """Return the largest epsilon that the guesses refute at ``confidence``; 0 where they refute none."""
    level = 1 - confidence

    def surplus(epsilon: float) -> float:
        return one_run_p_value(canaries, guesses, right, epsilon, delta) - level

    if guesses == 0 or surplus(0.0) >= 0:
        return 0.0
    if surplus(LARGEST) < 0:
        return LARGEST
    return float(optimize.brentq(surplus, 0.0, LARGEST, xtol=1e-6))


SHARES = (0.1, 0.2, 0.5, 1.0)
"""Shares of the canaries that are guessed. All are tried, and each has a fourth of the error probability (Bonferroni)."""


@dataclass(frozen=True)
class OneRun:
    """What the one-run audit found: the best of its tries, each of which paid for all of them."""

    epsilon: float
    canaries: int
    guesses: int
    right: int


def one_run(scores: Scores, inside: Coins, delta: float = 0.0, confidence: float = CONFIDENCE) -> OneRun:
    """Bound epsilon from the canaries' scores: the highest are guessed to be in, as many of the lowest to be out.

    The number of guesses is fixed beforehand by ``SHARES``; ties fall by position, which is independent of the coins.
    """
    m = len(scores)
    order = np.argsort(scores, kind="stable")
    best = OneRun(0.0, m, 0, 0)
    for share in SHARES:
        half = math.floor(share * m / 2)
        if not half:
            continue
        right = int((~inside[order[:half]]).sum() + inside[order[m - half :]].sum())
        bound = one_run_bound(m, 2 * half, right, delta, 1 - (1 - confidence) / len(SHARES))
        if bound > best.epsilon or not best.guesses:
            best = OneRun(bound, m, 2 * half, right)
    return best


# ---- many runs ------------------------------------------------------------------------------------------------------
def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta at ``epsilon`` of a Gaussian mechanism of sensitivity/noise ``mu`` (Balle & Wang 2018, theorem 8)."""
    if mu <= 0:
        return 0.0
    first = stats.norm.cdf(mu / 2 - epsilon / mu)
    second = math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
    return float(first - second)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at ``delta`` of a Gaussian mechanism of sensitivity/noise ``mu``."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
    return float(optimize.brentq(lambda e: gaussian_delta(mu, e) - delta, 0.0, high, xtol=1e-9))


def clopper_pearson_upper(errors: int, trials: int, confidence: float) -> float:
    """Return an upper bound on an error probability after ``errors`` in ``trials``."""
    return 1.0 if errors >= trials else float(stats.beta.ppf(confidence, errors + 1, trials - errors))


@dataclass(frozen=True)
class ManyRuns:
    """What the mechanism audit found.

    ``gaussian``: the bound if what is released trades false alarms against misses as a Gaussian mechanism does, which
    holds for sums with Gaussian noise. ``any_mechanism``: the bound without that assumption, from the error rates alone;
    ``runs`` of a side hold it below about log(runs).
    """

    gaussian: float
    any_mechanism: float
    mu: float
    false_alarms: float
    misses: float
    runs: int


def many_runs(
    absent: Scores, present: Scores, delta: float, confidence: float = CONFIDENCE, thresholds: int = 200
) -> ManyRuns:
    """Bound epsilon from a statistic of many releases without and with the canary.

    The threshold is chosen on the first tenth of the runs; the error rates are bounded on the rest alone, each with half of
    the error probability (Clopper and Pearson).
    """
    first0, first1 = len(absent) // 10, len(present) // 10
    grid = np.quantile(np.concatenate([absent[:first0], present[:first1]]), np.linspace(0.001, 0.999, thresholds))
    each = 1 - (1 - confidence) / 2

    def rates(threshold: float, out: Scores, within: Scores) -> tuple[float, float]:
        alarms, misses = int((out > threshold).sum()), int((within <= threshold).sum())
        return clopper_pearson_upper(alarms, len(out), each), clopper_pearson_upper(misses, len(within), each)

    def separation(alarm: float, miss: float) -> float:
        return float(stats.norm.isf(alarm) - stats.norm.ppf(miss))

    def plain(alarm: float, miss: float) -> float:
        found = [0.0]
        if 1 - delta - miss > 0:
            found.append(math.log((1 - delta - miss) / alarm))
        if 1 - delta - alarm > 0:
            found.append(math.log((1 - delta - alarm) / miss))
        return max(found)

    trial = [rates(t, absent[:first0], present[:first1]) for t in grid]
    # Where fewest errors are made both rates are best known; extreme thresholds win by luck alone.
    for_mu = grid[int(np.argmin([sum(pair) for pair in trial]))]
    for_any = grid[int(np.argmax([plain(*pair) for pair in trial]))]
    alarm, miss = rates(for_mu, absent[first0:], present[first1:])
    mu = max(0.0, separation(alarm, miss))
    return ManyRuns(
        gaussian=gaussian_epsilon(mu, delta),
        any_mechanism=plain(*rates(for_any, absent[first0:], present[first1:])),
        mu=mu,
        false_alarms=alarm,
        misses=miss,
        runs=min(len(absent), len(present)),
    )


def mean_total_variation(guess: Sequence[NDArray[np.float64]], truth: Sequence[NDArray[np.float64]]) -> float:
    """Return the mean over devices of half the L1 distance between two label distributions."""
    return float(np.mean([np.abs(g - t).sum() / 2 for g, t in zip(guess, truth, strict=True)]))
