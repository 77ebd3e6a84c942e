"""Epsilon is what dp-accounting says, never less, and noise is calibrated to the whole plan."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant

from fedkd.errors import ConfigError
from fedkd.privacy.events import Event, calibrate, epsilon, exceeds, merge, rdp_epsilon

GRID = [
    (0.8, 0.05, 20), (1.0, 0.01, 1000), (1.0, 0.1, 10), (2.0, 0.05, 500), (2.0, 0.5, 30), (4.0, 1.0, 10),
    (4.0, 0.2, 1000), (1.5, 1.0, 1),
]  # fmt: skip
SLOW_GRID = [(0.7, 0.01, 200), (0.7, 0.1, 20), (0.9, 0.02, 3000), (1.0, 0.1, 300), (0.6, 0.3, 5), (8.0, 0.7, 2000)]


def theirs(events: list[tuple[float, float, int]], delta: float, relation: str = "ADD_OR_REMOVE_ONE") -> float:
    accountant = PLDAccountant(getattr(NeighboringRelation, relation))
    for sigma, q, steps in events:
        event = dp_accounting.GaussianDpEvent(sigma)
        sampled = event if q == 1 else dp_accounting.PoissonSampledDpEvent(q, event)
        accountant.compose(sampled, steps)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("sigma", "q", "steps"), GRID)
def test_epsilon_is_within_002_of_dp_accountings_pld_and_never_below(sigma: float, q: float, steps: int) -> None:
    mine, reference = epsilon([Event(sigma=sigma, q=q, count=steps)], 1e-5), theirs([(sigma, q, steps)], 1e-5)
    assert reference - 1e-9 <= mine <= reference + 0.02
    assert rdp_epsilon([Event(sigma=sigma, q=q, count=steps)], 1e-5) >= mine - 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "q", "steps"), SLOW_GRID)
def test_the_same_on_a_wider_grid(sigma: float, q: float, steps: int) -> None:
    test_epsilon_is_within_002_of_dp_accountings_pld_and_never_below(sigma, q, steps)


def test_values_known_from_elsewhere() -> None:
    assert epsilon([Event(sigma=1, q=0.1, count=10)], 1e-5) == pytest.approx(2.86, abs=0.02)
    assert epsilon([Event(sigma=4, count=10)], 1e-5) == pytest.approx(3.34, abs=0.02)


@pytest.mark.parametrize(("sigma", "q", "steps"), [(4.0, 1.0, 10), (3.0, 0.1, 50)])
def test_replace_one_is_accounted_as_such(sigma: float, q: float, steps: int) -> None:
    """dp-accounting's RDP accountant ignores the relation; its PLD, and ours, do not."""
    events = [Event(sigma=sigma, q=q, count=steps)]
    reference = theirs([(sigma, q, steps)], 1e-5, "REPLACE_ONE")
    assert reference - 1e-9 <= epsilon(events, 1e-5, "replace_one") <= reference + 0.02
    assert epsilon(events, 1e-5, "replace_one") > epsilon(events, 1e-5)
    assert rdp_epsilon(events, 1e-5, "replace_one") >= epsilon(events, 1e-5, "replace_one") - 1e-6


def test_the_reach_of_a_replacement_is_what_the_mechanism_says() -> None:
    by_root_two = epsilon([Event(sigma=4, count=10, reach=math.sqrt(2))], 1e-5, "replace_one")
    assert by_root_two == pytest.approx(epsilon([Event(sigma=4 / math.sqrt(2), count=10)], 1e-5), abs=1e-3)


def test_events_compose_whatever_their_order() -> None:
    a, b, c = Event(sigma=2, q=0.1, count=20), Event(sigma=5, count=3), Event(sigma=2, q=0.1, count=80)
    assert merge([a, b, c]) == merge([c, a, b])
    together = epsilon([a, b, c], 1e-5)
    assert together == epsilon([c, b, a], 1e-5)
    reference = theirs([(2, 0.1, 100), (5, 1, 3)], 1e-5)
    assert reference - 1e-9 <= together <= reference + 0.02


def test_no_noise_is_no_privacy_and_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0 and epsilon([Event(sigma=1, count=0)], 1e-5) == 0
    assert epsilon([Event(sigma=0)], 1e-5) == math.inf
    assert epsilon([Event(sigma=0, q=0.1), Event(sigma=5)], 1e-5) == math.inf
    assert exceeds([Event(sigma=0)], 1e9, 1e-5)


def test_curves_compose_with_gaussians_and_keep_their_relation() -> None:
    gaussian = Event(sigma=4, count=10)
    curve = Event(rdp=tuple((float(a), a * 10 / 32) for a in range(2, 600)), relation="add_remove")
    assert epsilon([curve], 1e-5) == pytest.approx(rdp_epsilon([gaussian], 1e-5), rel=1e-6)
    both = epsilon([curve, gaussian], 1e-5)
    assert both == pytest.approx(rdp_epsilon([gaussian.times(2)], 1e-5), rel=1e-6)
    assert epsilon([curve], 1e-5, "replace_one") == math.inf


@pytest.mark.parametrize("target", [1.0, 8.0])
@pytest.mark.parametrize("relation", ["add_remove", "replace_one"])
def test_calibration_meets_its_target_from_below_and_closely(target: float, relation: str) -> None:
    def build(sigma: float) -> list[Event]:
        return [Event(sigma=sigma, q=0.1, count=20)]

    sigma = calibrate(build, target, 1e-5, relation)  # type: ignore[arg-type]
    assert target * 0.99 <= epsilon(build(sigma), 1e-5, relation) <= target  # type: ignore[arg-type]


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be kept"):
        calibrate(lambda sigma: [Event(sigma=sigma, count=10_000_000)], 0.001, 1e-9)
    with pytest.raises(ConfigError, match="delta"):
        calibrate(lambda sigma: [Event(sigma=sigma)], 1.0, 1.5)
    with pytest.raises(ConfigError, match="above 0"):
        calibrate(lambda sigma: [Event(sigma=sigma)], 0.0, 1e-5)


def test_events_survive_json_and_refuse_nonsense() -> None:
    for event in (
        Event(sigma=1.25, q=0.1, count=3, reach=1.5),
        Event(rdp=((2.0, 0.1), (4.0, 0.3)), relation="add_remove", count=2),
    ):
        assert Event.from_json(event.to_json()) == event
    for bad in ({"kind": "other"}, {"kind": "gaussian", "sigma": "x", "q": 1, "count": 1, "reach": 2}, {}):
        with pytest.raises(ConfigError):
            Event.from_json(bad)
    for wrong in ({"sigma": -1}, {"sigma": math.nan}, {"q": 1.5}, {"count": -1}, {"reach": 3}):
        with pytest.raises(ConfigError):
            Event(**wrong)
