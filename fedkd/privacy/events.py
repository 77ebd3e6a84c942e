"""What a release costs, and how costs compose: RDP for a quick bound, privacy loss distributions for the figure.

Every cost is a Gaussian mechanism, perhaps behind Poisson sampling, or a curve of Renyi divergences. Noise is always
stated relative to the largest norm that one unit (a record or a client) can add to the sum that is released, so that one
event can be judged under either neighbouring relation. The accountants are those of ``dp-accounting``; nothing here
computes a divergence of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal

from fedkd.errors import ConfigError

Relation = Literal["add_remove", "replace_one"]
Unit = Literal["record", "client"]

FINE, COARSE = 1e-4, 1e-3
"""Steps of the grid of privacy losses. Both round losses up; the fine one is for figures, the coarse one for a search."""

LARGE_EPSILON = 40.0
"""Beyond it a coarse grid serves: fine grids of such losses take seconds, and nobody is protected by an epsilon of 40."""

MAX_NOISE_MULTIPLIER = 10_000.0

ORDERS: Final[tuple[int, ...]] = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512, 1024)
"""Orders of Renyi divergence. Integers only: fractional orders of sampled Gaussians may not converge."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """``count`` releases of a sum with Gaussian noise.

    Guarantee:
        sigma: standard deviation of the noise / largest L2 norm that one unit can add to the sum (add/remove
            sensitivity). 0 is no protection.
        q: probability with which each unit enters the sum, independently and in secret (Poisson); 1 without sampling.
            A cohort of fixed size, or one whose members are known, is q = 1.
        reach: L2 sensitivity under replace-one / that under add/remove, at most 2. Used only where q = 1; sampled
            Gaussians under replace-one take 2.
        rdp: for mechanisms that are not Gaussian: (order, divergence) pairs of one release under ``relation``;
            then sigma, q and reach say nothing.
    """

    sigma: float = 0.0
    q: float = 1.0
    count: int = 1
    reach: float = 2.0
    rdp: tuple[tuple[float, float], ...] = ()
    relation: Relation | None = None

    def __post_init__(self) -> None:
        finite = all(math.isfinite(v) for v in (self.sigma, self.q, self.reach))
        if not finite or self.sigma < 0 or not 0 <= self.q <= 1 or self.count < 0 or not 0 < self.reach <= 2:
            raise ConfigError(
                f"a privacy event needs sigma >= 0, 0 <= q <= 1, count >= 0 and 0 < reach <= 2; got sigma "
                f"{self.sigma}, q {self.q}, count {self.count}, reach {self.reach}"
            )
        if self.rdp and (self.relation is None or any(not r >= 0 or not a > 1 for a, r in self.rdp)):
            raise ConfigError("a curve needs its neighbouring relation, orders above 1 and divergences of at least 0")

    def times(self, count: int) -> Event:
        """Return the event released ``count`` times as often."""
        return replace(self, count=self.count * count)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; :meth:`from_json` undoes it."""
        if self.rdp:
            return {"kind": "rdp", "count": self.count, "relation": self.relation, "rdp": [list(p) for p in self.rdp]}
        return {"kind": "gaussian", "sigma": self.sigma, "q": self.q, "count": self.count, "reach": self.reach}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Event:
        """Make an event from plain data.

        Raises:
            ConfigError: an unknown kind, or values out of range.
        """
        try:
            if data["kind"] == "gaussian":
                sigma, q, reach = (float(data[k]) for k in ("sigma", "q", "reach"))
                return cls(sigma=sigma, q=q, reach=reach, count=int(data["count"]))
            if data["kind"] == "rdp":
                curve = tuple((float(a), float(r)) for a, r in data["rdp"])
                return cls(count=int(data["count"]), relation=data["relation"], rdp=curve)
        except (KeyError, TypeError, ValueError) as cause:
            raise ConfigError(f"a privacy event that cannot be read: {cause}") from cause
        raise ConfigError(f"a privacy event of unknown kind {data['kind']!r}")

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count != 1 else ""
        if self.rdp:
            return f"{times}Renyi curve"
        return times + (
            f"Gaussian({self.sigma:.4g})" if self.q == 1 else f"Poisson({self.q:g})-Gaussian({self.sigma:.4g})"
        )


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return the events with equal ones put together, in a fixed order; those that cost nothing are left out."""
    counts: dict[Event, int] = {}
    for event in events:
        one = replace(event, count=1)
        counts[one] = counts.get(one, 0) + event.count
    kept = [replace(e, count=n) for e, n in counts.items() if n and (e.q > 0 or e.rdp)]
    return tuple(sorted(kept, key=lambda e: (e.sigma, e.q, e.reach, e.rdp)))


def epsilon(events: Iterable[Event], delta: float, relation: Relation = "add_remove") -> float:
    """Return epsilon at ``delta`` of all ``events`` together, by privacy loss distributions.

    Guarantee: an upper bound on the true epsilon under ``relation``, infinite where an event has no noise. Events given
    as Renyi curves are composed as such, together with the Renyi curves of the others.
    """
    merged = merge(events)
    if not merged:
        return 0.0
    if not 0 < delta < 1:
        raise ConfigError(f"delta is {delta}, expected a number between 0 and 1")
    if any(e.rdp for e in merged):
        return rdp_epsilon(merged, delta, relation)
    large = rdp_epsilon(merged, delta, "add_remove") > LARGE_EPSILON
    return _pld_epsilon(merged, delta, relation, COARSE if large else FINE)


def rdp_epsilon(events: Iterable[Event], delta: float, relation: Relation = "add_remove") -> float:
    """Return an epsilon at ``delta`` by Renyi divergences: above :func:`epsilon` and cheaper.

    Infinite under replace-one for sampled Gaussians, for which ``dp-accounting`` has no Renyi bound.
    """
    merged = merge(events)
    return 0.0 if not merged else _rdp_epsilon(merged, delta, relation)


def exceeds(events: Sequence[Event], limit: float, delta: float, relation: Relation = "add_remove") -> bool:
    """Tell whether ``events`` cost more than ``limit``. The cheap bound decides where it can."""
    return rdp_epsilon(events, delta, relation) > limit and epsilon(events, delta, relation) > limit


def _effective(event: Event, relation: Relation) -> float:
    """Noise relative to the sensitivity under ``relation``, for an event without sampling."""
    return event.sigma / (event.reach if relation == "replace_one" else 1.0)


@lru_cache(maxsize=4096)
def _pld_epsilon(events: tuple[Event, ...], delta: float, relation: Relation, grid: float) -> float:
    if any(event.sigma == 0 for event in events):
        return math.inf
    from dp_accounting.pld import privacy_loss_distribution as pld

    total = None
    # Gaussians without sampling compose exactly into one.
    precision = sum(e.count / _effective(e, relation) ** 2 for e in events if e.q == 1)
    if precision > 0:
        total = pld.from_gaussian_mechanism(1 / math.sqrt(precision), value_discretization_interval=grid)
    for event in events:
        if event.q < 1:
            part = _sampled(event.sigma, event.q, relation, grid).self_compose(event.count)
            total = part if total is None else total.compose(part)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def _sampled(sigma: float, q: float, relation: Relation, grid: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    name = "REPLACE_ONE" if relation == "replace_one" else "ADD_OR_REMOVE_ONE"
    return pld.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=grid,
        sampling_prob=q,
        neighboring_relation=getattr(NeighboringRelation, name),
    )


@lru_cache(maxsize=4096)
def _rdp_epsilon(events: tuple[Event, ...], delta: float, relation: Relation) -> float:
    import numpy as np
    from dp_accounting.rdp import rdp_privacy_accountant as rdp

    curve = np.zeros(len(ORDERS))
    for event in events:
        if event.rdp:
            if event.relation != relation:
                return math.inf
            known = dict(event.rdp)
            # An order that a curve lacks is bounded by its next larger one: Renyi divergence grows with the order.
            above = [min((a for a in known if a >= order), default=None) for order in ORDERS]
            curve += event.count * np.array([math.inf if a is None else known[a] for a in above])
        elif event.sigma == 0 or (event.q < 1 and relation == "replace_one"):
            return math.inf
        else:
            curve += event.count * np.array(
                _sampled_rdp(event.q, event.sigma if event.q < 1 else _effective(event, relation))
            )
    found, _ = rdp.compute_epsilon(list(ORDERS), curve, delta)
    return float(found)


@lru_cache(maxsize=1024)
def _sampled_rdp(q: float, sigma: float) -> tuple[float, ...]:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(ORDERS))
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)))
    return tuple(float(v) for v in accountant.rdp)


def calibrate(
    build: Callable[[float], Sequence[Event]], target: float, delta: float, relation: Relation = "add_remove"
) -> float:
    """Return the least noise multiplier (within a thousandth, rounded up) at which ``build(multiplier)`` costs ``target``.

    Args:
        build: the events of a whole plan, given the noise multiplier; more noise must cost less.
    Raises:
        ConfigError: no noise multiplier up to 10,000 is enough.
    """
    if not target > 0 or not math.isfinite(target):
        raise ConfigError(f"privacy.epsilon is {target}: expected a finite number above 0")
    if not 0 < delta < 1:
        raise ConfigError(f"privacy.delta is {delta}: expected a number between 0 and 1")
    from scipy.optimize import brentq

    events = merge(build(1.0))
    if not events:
        raise ConfigError("the plan takes no step on private records: there is nothing to calibrate")
    curves = any(e.rdp for e in events)
    # Renyi bounds are cheap and a little too large: they give the end of noise from which the search starts.
    bound: Relation = "add_remove" if relation == "replace_one" and any(e.q < 1 for e in events) else relation
    high = 1.0
    while rdp_epsilon(build(high), delta, bound) > target:
        high *= 2
        _within(high, target, delta)
    low = high / 2
    while rdp_epsilon(build(low), delta, bound) <= target and low > 1e-3:
        low, high = low / 2, low
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if rdp_epsilon(build(middle), delta, bound) <= target else (middle, high)
    if curves:
        return _round_up(high)

    def excess(sigma: float) -> float:
        return _pld_epsilon(merge(build(sigma)), delta, relation, COARSE) - target

    while excess(high) > 0:
        low, high = high, high * 2
        _within(high, target, delta)
    low = min(low, high * 0.85)
    while excess(low) < 0 and low > 1e-3:
        low, high = low * 0.85, low
    found: float = brentq(excess, low, high, xtol=3e-4 * high)
    while excess(_round_up(found)) > 0:
        found *= 1 + 3e-4
    return _round_up(found)


def _within(sigma: float, target: float, delta: float) -> None:
    if sigma > MAX_NOISE_MULTIPLIER:
        raise ConfigError(
            f"epsilon {target:g} at delta {delta:g} cannot be kept: even {MAX_NOISE_MULTIPLIER:,.0f} times as much "
            "noise as one unit's share is too little for this plan. Ask fewer rounds or steps, sample less, or "
            "allow a larger epsilon; `fedkd privacy plan` shows what each costs"
        )


def _round_up(sigma: float) -> float:
    """Round up to five digits, so that a plan, its ledger and its report show one number."""
    digits = 4 - math.floor(math.log10(sigma))
    return round(math.ceil(sigma * 10.0**digits - 1e-6) / 10.0**digits, max(digits, 0))
