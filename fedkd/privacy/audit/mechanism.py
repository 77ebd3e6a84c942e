"""Run a mechanism tens of thousands of times with and without one canary, and see whether its claim stands.

One release is audited, by what it hands to free post-processing: the noisy sum. The canary is the worst that one unit may
send: its share of the sum is as long as the mechanism lets it be. If one release keeps its claim, the composed claim is
arithmetic, which the accountant's own tests check.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.algorithms.base import Answer, Card, Heard
from fedkd.collected import Collected
from fedkd.engines.base import Task
from fedkd.experiment import Experiment, TrainingConfig
from fedkd.payloads import Integers, Nothing, SoftLabels
from fedkd.privacy.audit.bounds import many_runs, shared
from fedkd.privacy.build import build
from fedkd.privacy.client_level import ClientLevel
from fedkd.privacy.dpsgd import train_private
from fedkd.privacy.events import Event, epsilon
from fedkd.privacy.mechanisms import Mechanism, Party
from fedkd.privacy.record_level import DpSgd
from fedkd.privacy.secure.mechanism import SecureSum
from fedkd.records import Records
from fedkd.runners.base import make_engine
from fedkd.site import Site

RUNS, SECURE_RUNS = 20_000, 4_000
ENTRIES = 2_000
"""Entries of the sum that is audited, at most: a canary's share is as long in few entries as in many."""

HUGE = 1e3
"""How far beyond the permitted norm a canary reaches before it is clipped."""

Statistics = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class MechanismAudit:
    """One release: what it claims, and the bounds at 95 %, with the Gaussian trade-off and without any assumption.

    ``joint``: the bound where this is one of several tests that share the error probability.
    """

    what: str
    claimed: float
    bound: float
    bound_any: float
    joint: float
    delta: float
    runs: int

    @property
    def holds(self) -> bool:
        """Whether the attack leaves the claim standing."""
        return self.joint <= self.claimed

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "holds": self.holds}


def audit_mechanism(
    experiment: Experiment, site: Site, runs: int | None = None, tests: int = 1
) -> MechanismAudit | None:
    """Audit one release of the mechanism that ``experiment`` names; None where it has none.

    Args:
        tests: how many tests the verdict rests on, this one included.
    """
    mechanism = site.mechanism
    delta = experiment.privacy.delta
    if isinstance(mechanism, SecureSum) and mechanism.noisy:
        count = min(runs or SECURE_RUNS, SECURE_RUNS)
        small = _smaller(experiment, mechanism, site)
        assert isinstance(small, SecureSum)
        statistics = secure_statistics(small, count)
        claimed = epsilon(small.price(), delta, experiment.privacy.relation)
        return _result(f"sum of {small.queries} queries over {small.least} devices", claimed, statistics, delta, tests)
    if isinstance(mechanism, ClientLevel):
        small = _smaller(experiment, mechanism, site)
        assert isinstance(small, ClientLevel)
        statistics = client_statistics(small, runs or RUNS)
        answers = [Event(sigma=e.sigma, count=e.count, reach=e.reach) for e in small.price()[-1:]]
        return _result(f"noisy sum for {small.queries} queries", epsilon(answers, delta), statistics, delta, tests)
    if isinstance(mechanism.trainer, DpSgd):
        sigma = mechanism.trainer.noise_multiplier
        statistics = step_statistics(experiment, sigma, runs or RUNS)
        claimed = epsilon([Event(sigma=sigma)], delta)
        return _result("one step of DP-SGD without sampling", claimed, statistics, delta, tests)
    return None


def _result(what: str, claimed: float, statistics: Statistics, delta: float, tests: int) -> MechanismAudit:
    found = many_runs(*statistics, delta)
    joint = many_runs(*statistics, delta, shared(tests)).gaussian
    return MechanismAudit(what, claimed, found.gaussian, found.any_mechanism, joint, delta, found.runs)


def _smaller(experiment: Experiment, mechanism: ClientLevel | SecureSum, site: Site) -> Mechanism:
    """Return the same mechanism with the same noise, for few enough queries that it can be run often."""
    queries = min(mechanism.queries, max(1, ENTRIES // mechanism.classes))
    privacy = experiment.privacy.model_copy(
        update={"noise_multiplier": mechanism.noise_multiplier, "epsilon": None, "threshold": None, "answers": None}
    )
    # A release without sampling is audited: the coins that draw a cohort are another matter.
    plain = experiment.model_copy(update={"privacy": privacy.model_copy(update={"sampling": "fixed"})})
    return build(plain, clients=len(site.cards), queries=queries, classes=mechanism.classes)


# ---- client level ---------------------------------------------------------------------------------------------------
def client_statistics(mechanism: ClientLevel, runs: int) -> Statistics:
    """Return the sum's entry in the canary's direction, over ``runs`` releases without and with the canary."""
    shape = (mechanism.queries, mechanism.classes)
    canary = torch.full(shape, 1 / mechanism.classes, dtype=torch.float64)
    canary[:, 0] += HUGE
    canary -= HUGE / mechanism.classes
    direction = canary - canary.mean(-1, keepdim=True)
    if mechanism.name == "votes":
        direction = torch.zeros(shape, dtype=torch.float64)
        direction[:, 0] = 1.0
    direction /= direction.norm()
    card = Card(id=0, architecture="canary")
    present = Collected([Answer(card=card, payload=SoftLabels(labels=canary), examples=1.0)])
    found = np.zeros((2, runs))
    for row, answers in enumerate((Collected(), present)):
        for i in range(runs):
            dirty, _ = mechanism.noisy_sum(answers, mechanism._noise("audit", row, i))
            found[row, i] = float((dirty * direction).sum())
    return found[0], found[1]


def secure_statistics(mechanism: SecureSum, runs: int) -> Statistics:
    """The same for a sum over the fewest devices that may be summed, each of which adds its share of the noise."""
    shape = (mechanism.queries, mechanism.classes)
    canary = torch.zeros(shape, dtype=torch.float64)
    canary[:, 0] = HUGE if not mechanism.counts_votes else 1.0
    # The others say the same every time: uniform labels, or votes for the last class.
    calm = torch.full(shape, 1 / mechanism.classes, dtype=torch.float64)
    calm[:, -1] += 1e-9
    direction = mechanism._integers(SoftLabels(labels=canary)).astype(np.float64)
    rest = mechanism._integers(SoftLabels(labels=calm)).astype(np.float64)
    direction /= np.linalg.norm(direction)
    found = np.zeros((2, runs))
    for row in range(2):
        for i in range(runs):
            total = np.zeros(len(direction))
            for device in range(mechanism.least):
                said = canary if row and device == 0 else calm
                party = Party(device=device, run="audit", round=i)
                mechanism._charged.add((device, "audit", i))
                payload = mechanism.release(SoftLabels(labels=said), party).payload
                assert isinstance(payload, Integers)
                total += payload.values.numpy()
            # Absent is a device that adds nothing but its noise.
            total -= rest * (mechanism.least - row)
            found[row, i] = total @ direction
    return found[0], found[1]


# ---- record level ---------------------------------------------------------------------------------------------------
def step_statistics(experiment: Experiment, sigma: float, runs: int) -> Statistics:
    """Return how far one step went along the canary's gradient, on ``runs`` devices without and with the canary."""
    optimizer = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    training = TrainingConfig.model_validate({"steps": 1, "batch_size": 1, "optimizer": optimizer})
    privacy = experiment.privacy.model_copy(
        update={
            "kind": "dp_sgd",
            "secure_sum": False,
            "noise_multiplier": sigma,
            "epsilon": None,
            "sampling_rate": 1.0,
            "expected_batch": 1.0,
        }
    )
    models = experiment.models.model_copy(update={"devices": ("logreg",), "student": "logreg"})
    data = experiment.data.model_copy(update={"augment": type(experiment.data.augment)()})
    plain = experiment.model_copy(
        update={
            "training": training,
            "privacy": privacy,
            "models": models,
            "data": data,
            "algorithm": {"name": "local"},
            "runner": experiment.runner.model_copy(update={"kind": "stacked"}),
        }
    )
    site = Site.load(plain)
    engine = make_engine(site, "stacked")
    mechanism = site.mechanism
    assert isinstance(mechanism, DpSgd)
    (phase,) = site.method.plan(Heard(knowledge=Nothing(), memory={}, round=0))
    # The record whose gradient is longest; far beyond the clip in any case.
    pool = site.silo.pool
    pool._x = pool.take(torch.arange(len(pool))) * HUGE
    place = int(pool._x.flatten(1).norm(dim=1).argmax())
    card = site.cards[0]
    state = site.new_device(card)
    start = {k: v.clone() for k, v in state.models["model"].items()}
    names = list(site.architecture(card.architecture).trainable)
    direction = _gradient(site, pool.take(torch.tensor([place])), pool.y, place, start, names)
    origin = torch.cat([start[k].flatten() for k in names]).double()
    found = np.zeros((2, runs))
    for row, index in enumerate((torch.zeros(0, dtype=torch.int64), torch.tensor([place]))):
        done = 0
        while done < runs:
            count = min(512, runs - done)
            cards = [Card(id=done + i + row * runs, architecture=card.architecture) for i in range(count)]
            heard = Heard(knowledge=Nothing(), memory={}, round=0)
            tasks = [Task(c, state, heard, Records(pool, index), None, None) for c in cards]
            train_private(engine, phase, tasks)
            for i, task in enumerate(tasks):
                now = torch.cat([task.state.models["model"][k].flatten() for k in names]).double()
                found[row, done + i] = float((origin - now) @ direction)
            done += count
    return found[0], found[1]


def _gradient(site: Site, x: torch.Tensor, y: torch.Tensor | None, place: int, start: Any, names: list[str]) -> Any:
    """Return the unit vector along the canary's gradient at the start."""
    from fedkd.nets import Net

    assert y is not None
    architecture = site.architecture(site.cards[0].architecture)
    live = {k: v.clone().requires_grad_(k in names) for k, v in start.items()}
    logits = Net({"model": architecture}, {"model": live})(x)
    loss = torch.nn.functional.cross_entropy(logits, y[place : place + 1])
    grads = torch.autograd.grad(loss, [live[k] for k in names])
    flat = torch.cat([g.flatten() for g in grads]).double()
    if float(flat.norm()) == 0:  # the start happens to be certain of the right label
        return torch.nn.functional.normalize(torch.ones_like(flat), dim=0)
    return flat / flat.norm()
