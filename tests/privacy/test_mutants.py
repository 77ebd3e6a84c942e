"""Faults that have been made elsewhere, applied to the real code: for each of them a check must fail.

Every check passes on the code as it is, which `test_the_code_as_it_is` shows; a mutant is a fault by monkeypatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkd.algorithms.base import Answer, Card
from fedkd.collected import Collected
from fedkd.experiment import load
from fedkd.payloads import SoftLabels
from fedkd.privacy import client_level, dpsgd, noise, stacked_dpsgd
from fedkd.privacy.audit import mechanism as audits
from fedkd.privacy.build import build
from fedkd.privacy.events import Event
from fedkd.privacy.ledger import Ledger
from fedkd.privacy.mechanisms import Party
from fedkd.privacy.noise import NoiseSource
from fedkd.privacy.secure import skellam
from fedkd.site import Site

RUNS, QUERIES, CLIENTS = 2000, 5, 20


class Caught(AssertionError):
    """A check found the fault."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Caught(what)


def mechanism(*words: str, clients: int = CLIENTS, queries: int = QUERIES):
    experiment = load(None, ["rounds=1", "privacy.epsilon=4", *words])[0][1]
    return build(experiment, clients=clients, queries=queries, classes=10)


def answer(labels: torch.Tensor) -> Answer:
    return Answer(card=Card(id=0, architecture="mlp"), payload=SoftLabels(labels=labels), examples=1.0)


# ---- the checks -----------------------------------------------------------------------------------------------------
def labels_keep_their_claim() -> None:
    """Thousands of noisy sums of labels with and without the worst client."""
    found = mechanism("privacy.kind=labels")
    bound = audits.many_runs(*audits.client_statistics(found, RUNS), 1e-5).gaussian
    claimed = audits.epsilon(found.price(), 1e-5)
    demand(bound <= claimed, f"epsilon is at least {bound:.2f}, {claimed:.2f} is claimed")


def steps_keep_their_claim() -> None:
    """The same for steps of DP-SGD with and without the worst record."""
    experiment = load(None, ["privacy.kind=dp_sgd", "privacy.noise_multiplier=1.081", "privacy.clip=1"])[0][1]
    bound = audits.many_runs(*audits.step_statistics(experiment, 1.081, 400), 1e-5).gaussian
    claimed = audits.epsilon([Event(sigma=1.081)], 1e-5)
    demand(bound <= claimed, f"epsilon is at least {bound:.2f}, {claimed:.2f} is claimed")


def little_noise_costs_much() -> None:
    """A claim must follow the noise: a third of the noise that epsilon 4 needs."""
    found = mechanism("privacy.kind=labels")
    found.noise_multiplier /= 3
    bound = audits.many_runs(*audits.client_statistics(found, RUNS), 1e-5).gaussian
    claimed = audits.epsilon(found.price(), 1e-5)
    demand(bound <= claimed, f"epsilon is at least {bound:.2f}, {claimed:.2f} is claimed")


def noise_is_fresh() -> None:
    """Two releases of one sum differ by noise of twice the variance, in every kind of mechanism."""
    found = mechanism("privacy.kind=labels", queries=200)
    none = Collected()
    a, b = (found.noisy_sum(none, found._noise("round", 0))[0] for _ in range(2))
    want = 2 * (found.noise_multiplier * found.clip) ** 2
    demand(0.8 < float((a - b).square().mean()) / want < 1.2, "two releases share their noise")
    step = mechanism("privacy.kind=dp_sgd")
    c, d = (step.noise("train", 0, 1).normal((1000,), 1.0) for _ in range(2))
    demand(0.7 < float((c - d).square().mean()) / 2 < 1.3, "two steps share their noise")


def a_sum_bears_the_noise_that_is_accounted() -> None:
    """The fewest devices that may be summed: their shares of noise make the whole."""
    found = mechanism("privacy.kind=votes", "privacy.secure_sum=true", clients=5, queries=100)
    uniform = SoftLabels(labels=torch.full((100, 10), 0.1) + 1e-9 * torch.eye(10)[0])
    clean = found.least * found._integers(uniform)
    errors = []
    for round in range(10):
        total = -clean
        for device in range(found.least):
            found._charged.add((device, "r", round))  # what the ledger says of it is tested elsewhere
            total = total + found.release(uniform, Party(device=device, run="r", round=round)).payload.values.numpy()
        errors.append(total)
    seen = float(np.square(errors).mean())
    # 10,000 entries: the mean square is known to 1.5 %.
    demand(0.93 < seen / found.variance < 1.07, f"noise of variance {seen:.1f}, {found.variance:.1f} is accounted")


def records_are_drawn_by_poisson() -> None:
    """Sizes of batches are binomial, and a record's steps are independent coins."""
    q, steps, records = 0.2, 400, 100
    for draw in (dpsgd.sample, stacked_dpsgd._poisson):
        batches = [np.asarray(batch) for batch in draw(NoiseSource(), q, steps, records)]
        sizes = np.array([len(b) for b in batches])
        want = records * q * (1 - q)
        demand(0.6 < sizes.var() / want < 1.5, f"sizes of batches vary by {sizes.var():.1f}, binomial is {want:.1f}")
        times = np.bincount(np.concatenate(batches), minlength=records)
        want = steps * q * (1 - q)
        demand(
            0.5 < times.var() / want < 1.7, f"how often records are drawn varies by {times.var():.1f}, not {want:.1f}"
        )


def ledger_comes_first(tmp: Path) -> None:
    """When the noise is drawn, or a private step begins, the charge is on disk."""
    found = mechanism("privacy.kind=labels")
    path = tmp / "labels.jsonl"
    found.open(Ledger(path))
    real, seen = type(found).noisy_sum, []

    def watching(self, answers, source):
        seen.append(len(Ledger(path).entries))
        return real(self, answers, source)

    patch = pytest.MonkeyPatch()
    patch.setattr(type(found), "noisy_sum", watching)
    try:
        found.combine(Collected([answer(torch.full((QUERIES, 10), 0.1))]), np.arange(QUERIES), run="r", round=0)
    finally:
        patch.undo()
    demand(seen == [1], "a noisy sum was made before its charge was on disk")
    again = mechanism("privacy.kind=dp_sgd")
    path = tmp / "steps.jsonl"
    again.open(Ledger(path))
    again.admit(again.first, [Party(device=0, run="r", round=0)])
    demand(len(Ledger(path).entries) == 1, "a device was let in before its charge was on disk")


CHECKS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        labels_keep_their_claim,
        steps_keep_their_claim,
        little_noise_costs_much,
        noise_is_fresh,
        a_sum_bears_the_noise_that_is_accounted,
        records_are_drawn_by_poisson,
        ledger_comes_first,
    )
}


def check(name: str, tmp: Path) -> None:
    if name == "ledger_comes_first":
        CHECKS[name](tmp)
    else:
        CHECKS[name]()


# ---- the mutants ----------------------------------------------------------------------------------------------------
def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    real = NoiseSource.normal
    patch.setattr(NoiseSource, "normal", lambda self, shape, std, *rest: real(self, shape, std / 2, *rest))


def half_the_noise_in_stacks(patch: pytest.MonkeyPatch) -> None:
    real = NoiseSource.normal_
    patch.setattr(NoiseSource, "normal_", lambda self, out: real(self, out).mul_(0.5))


def clip_times(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        real = client_level.clipped_sum
        patch.setattr(
            client_level,
            "clipped_sum",
            lambda given, queries, classes, clip: real(given, queries, classes, clip * factor),
        )

    return apply


def a_reused_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(noise.os, "urandom", lambda size: b"\x07" * size)


def a_client_without_noise(patch: pytest.MonkeyPatch) -> None:
    real, turn = skellam.draw, itertools.count()
    patch.setattr(
        skellam,
        "draw",
        lambda variance, count, source: real(variance if next(turn) % 3 else 0.0, count, source),
    )


def shuffling(patch: pytest.MonkeyPatch, module: object = dpsgd, name: str = "sample") -> None:
    def batches(source: NoiseSource, q: float, steps: int, records: int) -> list[torch.Tensor]:
        def walk() -> Iterator[torch.Tensor]:
            while True:
                order = torch.from_numpy(np.argsort(source.bits(records)))
                yield from order.split(round(q * records))

        return list(itertools.islice(walk(), steps))

    patch.setattr(module, name, batches)


def an_epsilon_that_ignores_sigma(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    real = audits.epsilon
    patch.setattr(audits, "epsilon", lambda events, *rest: real([replace(e, sigma=1.081) for e in events], *rest))


def a_ledger_written_after(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "charge", lambda self, entries: None)


MUTANTS = {
    "half the noise": (half_the_noise, "labels_keep_their_claim"),
    "half the noise, in steps": (half_the_noise_in_stacks, "steps_keep_their_claim"),
    "no clip": (clip_times(1e6), "labels_keep_their_claim"),
    "clip 1.5 times too large": (clip_times(1.5), "labels_keep_their_claim"),
    "a reused seed": (a_reused_seed, "noise_is_fresh"),
    "noise dropped by a client": (a_client_without_noise, "a_sum_bears_the_noise_that_is_accounted"),
    "Poisson replaced by shuffling": (shuffling, "records_are_drawn_by_poisson"),
    "Poisson replaced by shuffling, in stacks": (
        lambda patch: shuffling(patch, stacked_dpsgd, "_poisson"),
        "records_are_drawn_by_poisson",
    ),
    "an epsilon that ignores sigma": (an_epsilon_that_ignores_sigma, "little_noise_costs_much"),
    "a ledger written after release": (a_ledger_written_after, "ledger_comes_first"),
}


@pytest.mark.parametrize("name", list(CHECKS))
def test_the_code_as_it_is(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_mutant_is_caught(name, monkeypatch, tmp_path):
    apply, by = MUTANTS[name]
    apply(monkeypatch)
    with pytest.raises(Caught):
        check(by, tmp_path)


def test_the_right_clip_in_a_step_is_what_the_audit_sees(monkeypatch):
    """A device whose clip is 1.5 times too large sends a step that is 1.5 times too long."""
    experiment = load(None, ["privacy.kind=dp_sgd", "privacy.noise_multiplier=1.081", "privacy.clip=1"])[0][1]
    absent, present = audits.step_statistics(experiment, 1.081, 300)
    assert present.mean() - absent.mean() == pytest.approx(1.0, abs=0.35)
    assert absent.std() == pytest.approx(1.081, rel=0.2)
    assert isinstance(Site.load(experiment).mechanism.noise_multiplier, float)
