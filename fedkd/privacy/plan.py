"""Before anything runs: what a plan costs, what one more round costs, and whether labels or votes are the better buy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedkd.errors import ConfigError
from fedkd.privacy.build import build
from fedkd.privacy.client_level import ClientLevel, largest_norm
from fedkd.privacy.config import PrivacyConfig
from fedkd.privacy.events import Event, Relation, calibrate, epsilon, merge
from fedkd.privacy.record_level import DpSgd
from fedkd.privacy.secure.mechanism import SecureSum, fewest

if TYPE_CHECKING:
    from fedkd.experiment import Experiment

Kind = Literal["dp_sgd", "labels", "votes"]
KINDS: tuple[Kind, ...] = ("dp_sgd", "labels", "votes")
GRID = (8.0, 4.0, 2.0, 1.0)

AGREEMENT = 0.6
"""Share of clients whose top class is the right one, if nobody says otherwise."""

CONFIDENCE = 0.45
"""Mean probability that clients give to the right class, if nobody says otherwise. Smaller than the agreement: a mean of
soft labels is flatter than a count of votes."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one mechanism costs in a plan; ``reason`` says why it cannot be used."""

    kind: Kind
    unit: str
    relation: Relation
    delta: float
    noise_multiplier: float = math.nan
    events: tuple[Event, ...] = ()
    one_round: float = math.nan
    plan: float = math.nan
    one_more: float = math.nan
    noise: str = ""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Buy:
    """What a budget buys with labels or votes: the best number of queries, and what it is worth.

    ``right``: chance that an answer is right; ``worth``: the number of clean labels that carry as much.
    """

    kind: Literal["labels", "votes"]
    epsilon: float
    queries: int
    deviation: float
    right: float
    worth: float


def cost(experiment: Experiment, kind: Kind, budget: float | None, *, clients: int, queries: int, classes: int) -> Cost:
    """Return what ``kind`` costs in the plan of ``experiment``.

    Args:
        budget: epsilon to calibrate to; None takes the experiment's own price.
    """
    own = experiment.privacy
    unit = "record" if kind == "dp_sgd" else "client"
    changes: dict[str, object] = {"kind": kind}
    if budget is not None:
        changes |= {"epsilon": budget, "noise_multiplier": None}
    if kind != own.kind:
        # The norms of gradients and of labels have nothing to do with one another.
        changes |= {"clip": None}
    try:
        privacy = PrivacyConfig(**{**own.model_dump(), **changes})
        privacy.check(experiment.method, experiment.population)
        changed = experiment.model_copy(update={"privacy": privacy})
        mechanism = build(changed, clients=clients, queries=queries, classes=classes)
    except ValueError as cause:
        return Cost(kind=kind, unit=unit, relation=own.relation, delta=own.delta, reason=_sentence(cause))
    if isinstance(mechanism, SecureSum) and not mechanism.noisy:
        mechanism = mechanism.inner  # masks cost nothing: devices pay for what they mask
    assert isinstance(mechanism, DpSgd | ClientLevel | SecureSum)
    rounds = mechanism.participations if isinstance(mechanism, DpSgd) else mechanism.rounds
    sigma = mechanism.noise_multiplier
    assert sigma is not None

    # Where a person's records may be on every device, everybody's releases are composed.
    devices = 1 if privacy.disjoint else clients

    def price(times: int) -> float:
        events = [e.times(devices) for e in mechanism.plan(sigma, times)]
        return epsilon(events, privacy.delta, privacy.relation)

    return Cost(
        kind=kind,
        unit=unit,
        relation=privacy.relation,
        delta=privacy.delta,
        noise_multiplier=sigma,
        events=merge(e.times(devices) for e in mechanism.plan(sigma)),
        one_round=price(1),
        plan=price(rounds),
        one_more=price(rounds + 1),
        noise=_noise(mechanism),
    )


def _sentence(cause: ValueError) -> str:
    errors = getattr(cause, "errors", None)
    text = str(errors()[0]["msg"]) if callable(errors) else str(cause)
    return " ".join(text.removeprefix("Value error, ").split())


def _noise(mechanism: DpSgd | ClientLevel | SecureSum) -> str:
    """What the noise is, in the units of what is released."""
    if isinstance(mechanism, SecureSum):
        deviation = math.sqrt(mechanism.variance) / mechanism.grid.scale
        if mechanism.counts_votes:
            return f"{deviation:.3g} votes of {mechanism.least} devices, the fewest in a sum; more with more"
        each, least = deviation / mechanism.least, mechanism.least
        return f"{each:.3g} on every mean probability of {least} devices, the fewest in a sum"
    if isinstance(mechanism, DpSgd):
        each = mechanism.noise_multiplier * mechanism.clip / mechanism.expected_batch
        return f"{each:.3g} on every entry of a mean gradient of norm at most {mechanism.clip:g}"
    if mechanism.name == "votes":
        return f"{mechanism.noise_multiplier:.3g} votes, of {mechanism.expected_clients:g}"
    clip = getattr(mechanism, "clip", math.nan)
    return f"{mechanism.noise_multiplier * clip / mechanism.expected_clients:.3g} on every mean probability"


def best_buys(
    experiment: Experiment,
    budget: float,
    *,
    clients: int,
    classes: int,
    most: int,
    agreement: float = AGREEMENT,
    confidence: float = CONFIDENCE,
) -> tuple[Buy, Buy]:
    """Return what ``budget`` buys with labels and with votes, each at its best number of queries up to ``most``.

    A public estimate that looks at no data: ``agreement`` and ``confidence`` are guesses, and wrong classes are taken as
    equally likely. Noise grows with the root of the number of queries, so that more labels are worse labels. An answer
    that is right with chance p is worth ((p - 1/C) / (1 - 1/C))^2 clean labels, as under symmetric label noise.
    """
    if not 1 / classes < agreement <= 1 or not 1 / classes < confidence <= 1:
        raise ConfigError(f"agreement and confidence lie above chance, 1/{classes}, and at most at 1")
    privacy, population = experiment.privacy, experiment.population
    q = population.participation if privacy.sampling == "poisson" else 1.0
    count = max(1.0, clients * population.participation * (1 - population.dropout) * (1 - population.late))
    # Every device of a secure sum brings the noise that makes the smallest permitted sum private: more devices, more noise.
    cohort = population.cohort(clients)
    excess = math.sqrt(max(1.0, count / fewest(privacy, population, cohort))) if privacy.secure_sum else 1.0
    # Under either mechanism a query's noise is sigma x root of queries / clients, times the share of the largest norm.
    one = calibrate(
        lambda sigma: [Event(sigma=sigma, q=q, count=experiment.rounds, reach=math.sqrt(2))],
        budget,
        privacy.delta,
        privacy.relation,
    )
    found = []
    for kind, level in (("labels", confidence), ("votes", agreement)):
        best: Buy | None = None
        for queries in _sizes(most):
            norm = largest_norm(queries, classes) if kind == "labels" else math.sqrt(queries)
            deviation = one * norm * excess / count
            right = _right(level, deviation, classes, count)
            worth = queries * max(0.0, (right - 1 / classes) / (1 - 1 / classes)) ** 2
            if best is None or worth > best.worth:
                best = Buy(
                    kind=kind,  # type: ignore[arg-type]
                    epsilon=budget,
                    queries=queries,
                    deviation=deviation,
                    right=right,
                    worth=worth,
                )
        assert best is not None
        found.append(best)
    return found[0], found[1]


def _sizes(most: int) -> Sequence[int]:
    sizes = {round(10 * 2 ** (i / 2)) for i in range(0, 40)}
    return sorted({s for s in sizes if s < most} | {most})


def _right(level: float, deviation: float, classes: int, clients: float) -> float:
    """Chance that the noisy largest of C classes is the right one, whose mean is ``level``."""
    other = (1 - level) / (classes - 1)
    # Clients are a sample themselves; their scatter counts beside the noise.
    spread_right = math.sqrt(deviation**2 + level * (1 - level) / clients)
    spread_other = math.sqrt(deviation**2 + other * (1 - other) / clients)
    z = np.linspace(-8, 8, 801)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    gap = (level - other + spread_right * z) / max(spread_other, 1e-12)
    below = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in gap]))
    return float(np.sum(density * below ** (classes - 1)) * (z[1] - z[0]))
