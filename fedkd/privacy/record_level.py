"""Record level, on the device: the model is trained by DP-SGD, and everything made from the model alone is free.

M. Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, https://arxiv.org/abs/1607.00133.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Algorithm, DeviceState, Heard, Phase
from fedkd.payloads import Nothing, Payload
from fedkd.privacy.events import Event, calibrate, epsilon
from fedkd.privacy.ledger import Entry
from fedkd.privacy.mechanisms import Claim, Mechanism, Party, PrivacyError, Released, events_of
from fedkd.privacy.noise import NoiseSource

if TYPE_CHECKING:
    from fedkd.experiment import Experiment, TrainingConfig

SECTIONS = ("training", "digest", "pretrain")


def private_steps(settings: TrainingConfig, q: float) -> int:
    """Return the number of steps of one stretch on private records: public, because it does not look at them.

    An epoch is 1/q steps, in which every record is expected once.
    """
    return settings.steps if settings.steps is not None else math.ceil(settings.epochs / q - 1e-9)


class DpSgd(Mechanism):
    """Gradients of single records are clipped, summed and drowned in Gaussian noise, on the device itself.

    Guarantee:
        Unit: one record of one device. Relation: ``privacy.relation``; noise is stated relative to the clipping norm C,
        which bounds what one record adds to a step's sum, so that replacing a record moves the sum by at most 2 C.
        Sampling: each record enters a step independently with the public probability q (Poisson), from the system's
        entropy. The sum is divided by a public expected batch; the device's number of records is used nowhere.
        Edge cases: a device without records takes the same steps on noise alone, and answers. A record whose gradient is
        NaN or infinite adds zero. What is made from the model without the records (digesting the teacher's labels,
        answers for proxy samples, codecs) costs nothing more. The ledger is charged before the first step.
        Not protected: how long a device computes, and whether it is reachable.
    """

    name = "dp_sgd"
    unit = "record"
    trains = True
    empty_answers = True

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.config = config = experiment.privacy
        self.clip = config.clip if config.clip is not None else 1.0
        self.q = config.sampling_rate
        self.expected_batch = (
            config.expected_batch if config.expected_batch is not None else float(experiment.training.batch_size)
        )
        self.steps = {name: private_steps(getattr(experiment, name), self.q) for name in SECTIONS}
        self.seed = experiment.seed
        self.first, self.later = rounds_of(experiment.method)
        self.participations = config.participations or _participations(experiment)
        self.noise_multiplier = (
            config.noise_multiplier
            if config.noise_multiplier is not None
            else calibrate(self.plan, config.epsilon or 0.0, config.delta, config.relation)
        )
        self._admitted: set[tuple[int, str, int]] = set()

    # ---- price ------------------------------------------------------------------------------------------------------
    def price(self, phases: Sequence[Phase], sigma: float | None = None) -> list[Event]:
        """Return what a round with these phases costs one device."""
        one = Event(sigma=self.noise_multiplier if sigma is None else sigma, q=self.q)
        return events_of(phases, one, self.steps)

    def plan(self, sigma: float, participations: int | None = None) -> list[Event]:
        """Return what the whole run costs a device that takes part as often as any may."""
        times = self.participations if participations is None else participations
        if times == 0:
            return []
        return self.price(self.first, sigma) + [e.times(times - 1) for e in self.price(self.later, sigma)]

    # ---- device -----------------------------------------------------------------------------------------------------
    def admit(self, phases: Sequence[Phase], parties: Sequence[Party]) -> Mapping[int, str]:
        """See :meth:`Mechanism.admit`. One line per event, synced once for all parties of a round."""
        events, config = self.price(phases), self.config
        self.ledger.refresh()
        refused: dict[int, str] = {}
        rounds: dict[tuple[str, int], list[int]] = {}
        for party in parties:
            reason = self._over(party, events) if events else None
            if reason is not None:
                refused[party.device] = reason
                continue
            rounds.setdefault((party.run, party.round), []).append(party.device)
        entries = [
            Entry(
                run=run,
                round=round,
                what="model trained on own records, and all answers made from it",
                mechanism=self.name,
                unit="record",
                relation=config.relation,
                event=event,
                devices=tuple(devices),
                seeded=config.seeded,
            )
            for (run, round), devices in rounds.items()
            for event in events
        ]
        self.ledger.charge(entries)
        self._admitted |= {(device, run, round) for (run, round), devices in rounds.items() for device in devices}
        return refused

    def asked(self, run: str, round: int, devices: Sequence[int]) -> None:
        # Whether it is a device's first round is known on the device alone: the dearer plan is charged.
        events = max(
            (self.price(phases) for phases in (self.first, self.later)),
            key=lambda found: epsilon(found, self.config.delta, self.config.relation) if found else 0.0,
        )
        self.ledger.refresh()
        self.ledger.charge(
            [
                Entry(
                    run=run,
                    round=round,
                    what="at most: every device that was asked trained; each one's own ledger has what it spent",
                    mechanism=self.name,
                    unit="record",
                    relation=self.config.relation,
                    event=event,
                    devices=tuple(devices),
                    seeded=self.config.seeded,
                )
                for event in events
            ]
        )

    def _over(self, party: Party, events: Sequence[Event]) -> str | None:
        config, policy = self.config, self.policy
        reason = self.ledger.would_exceed(
            party.device, events, config.epsilon, config.delta, relation=config.relation, run=party.run
        )
        if reason is not None:
            return f"{reason} (privacy.epsilon of this run)"
        if policy is not None:
            reason = self.ledger.would_exceed(
                party.device, events, policy.epsilon, policy.delta, relation=config.relation
            )
            if reason is not None:
                return f"{reason} (this node's policy)"
        return None

    def release(
        self, payload: Payload, party: Party, *, examples: float = 1.0, losses: Mapping[str, float] | None = None
    ) -> Released:
        place = (party.device, party.run, party.round)
        if place not in self._admitted and not isinstance(payload, Nothing):
            raise PrivacyError(
                f"device {party.device} was not charged for round {party.round} of {party.run!r}: its answer stays"
            )
        # One charge, one release: a second answer of the same round would be trained anew and must be charged anew.
        self._admitted.discard(place)
        return self._seal(payload, 1.0, losses)

    def payers(self, devices: Sequence[int]) -> Sequence[int]:
        # A method without a step on private records costs nothing, and charges nothing.
        return devices if self.price(self.first) and self.price(self.later) else ()

    def noise(self, *who: str | int) -> NoiseSource:
        """Return a fresh source of noise; by name only in the seeded mode for tests."""
        return NoiseSource("dp_sgd", self.seed, *who) if self.config.seeded else NoiseSource()

    # ---- account ----------------------------------------------------------------------------------------------------
    def claim(self) -> Claim:
        self.ledger.refresh()
        config = self.config
        spent = next((s for s in self.ledger.spent(config.delta, disjoint=config.disjoint) if s.unit == "record"), None)
        void = spent is not None and spent.void
        finite = spent is None or math.isfinite(spent.epsilon)
        note = None
        if void:
            note = "void: the noise followed the seed (privacy.seeded), so that it protects nothing"
        elif not config.disjoint:
            note = "composed over all devices, because privacy.disjoint is false"
        return Claim(
            mechanism=self.name,
            unit="record",
            relation=spent.relation if spent is not None else config.relation,
            epsilon=None if void or not finite else (spent.epsilon if spent is not None else 0.0),
            delta=config.delta,
            noise_multiplier=self.noise_multiplier,
            note=note,
        )


def rounds_of(method: Algorithm) -> tuple[tuple[Phase, ...], tuple[Phase, ...]]:
    """Return a device's phases in its first round and in those after it, as the method plans them."""
    heard = Heard(knowledge=Nothing(), memory={}, round=0)
    first = method.plan(heard)
    kept = method.finish(DeviceState(models={}), Nothing(), heard)
    later = method.plan(Heard(knowledge=Nothing(), memory=kept.memory, round=1))
    return first, later


def _participations(experiment: Experiment) -> int:
    """Rounds that hardly any device exceeds when devices are drawn at random; those who would, abstain."""
    rounds, p = experiment.rounds, experiment.population.participation
    mean = rounds * p
    return min(rounds, math.ceil(mean + 3 * math.sqrt(mean * (1 - p))))
