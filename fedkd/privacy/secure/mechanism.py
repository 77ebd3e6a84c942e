"""Answers as the integers that a secure sum takes, with each device's share of the noise; and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.algorithms.base import Answer, Card, Phase
from fedkd.collected import Collected
from fedkd.errors import ConfigError
from fedkd.payloads import Integers, Nothing, Payload, SoftLabels, Votes
from fedkd.privacy.client_level import largest_norm, project_simplex
from fedkd.privacy.events import ORDERS, Event, calibrate
from fedkd.privacy.ledger import SERVER, Entry, Ledger
from fedkd.privacy.mechanisms import Claim, Mechanism, Party, PrivacyError, Released
from fedkd.privacy.noise import NoiseSource
from fedkd.privacy.policy import Policy
from fedkd.privacy.secure import skellam
from fedkd.privacy.secure.protocol import Terms
from fedkd.privacy.secure.quantise import Grid, bits_for, one_hot

if TYPE_CHECKING:
    from fedkd.experiment import Experiment, PopulationConfig
    from fedkd.privacy.config import PrivacyConfig

LEAST_COHORT = 3


def fewest(config: PrivacyConfig, population: PopulationConfig, cohort: int) -> int:
    """Return the smallest number of devices whose sum may be learned where ``cohort`` are asked: noise is sized for it."""
    needed = Terms(length=1, bits=1, threshold=config.secure_threshold).needed(cohort)
    return max(population.minimum, LEAST_COHORT, needed)


class SecureSum(Mechanism):
    """The server sees the sum of the devices' answers alone; under ``labels`` and ``votes`` with noise that devices add.

    Guarantee:
        Masks (all kinds): see :mod:`fedkd.privacy.secure.protocol`; every device weighs the same, and no sum over fewer
        than ``terms.minimum`` devices is learned.
        Noise (``labels``, ``votes``), unit: a client with all its records, towards everybody, the server included. An
        answer is an integer vector whose L2 norm is at most D2 (``labels``: floor(clip * scale) after centring and
        rounding; ``votes``: sqrt(N), one vote per query) under adding or removing a client, and reach * D2 under replacing
        it. Each device adds Skellam noise of variance mu / minimum, so that any sum that can be learned bears at least
        variance mu = (noise_multiplier * D2)^2 on every entry: drop-outs down to the minimum cost no privacy, and a full
        house bears more noise than it needs. Charged to the device's ledger before its vector leaves, as a Renyi curve.
        Devices that tell the server their own share take it off the noise: count them out of ``population.minimum``.
        Edge cases: a device without records answers as well, since its silence would tell that it has none. NaN and
        infinite entries count as 0 or as the largest number; a vote outside the classes counts for none.
        Without noise (``none``) the sum itself is exact and may tell anything that a sum tells. ``dp_sgd`` protects records
        by itself; the masks come on top.
    """

    sums_securely = True

    def __init__(self, experiment: Experiment, inner: Mechanism, *, clients: int, queries: int, classes: int) -> None:
        super().__init__()
        self.inner, self.config = inner, experiment.privacy
        inner.open(self.ledger)  # one account, whoever charges it
        config, population = experiment.privacy, experiment.population
        self.classes, self.queries, self.rounds, self.seed = classes, queries, experiment.rounds, experiment.seed
        self.student = experiment.models.student
        self.dtype = torch.float64 if experiment.dtype == "float64" else torch.float32
        self.noisy = config.kind in ("labels", "votes")
        self.name = f"secure {config.kind}" if self.noisy else f"{inner.name} behind a secure sum"
        self.unit = "client" if self.noisy else inner.unit
        self.trains = inner.trains
        self.empty_answers = self.noisy or inner.empty_answers
        self.counts_votes = config.kind == "votes" or experiment.method.upload is Votes
        self.sends_votes = experiment.method.upload is Votes
        cohort = population.cohort(clients)
        least = fewest(config, population, cohort)
        if least > cohort:
            raise ConfigError(
                f"a secure sum needs at least {least} devices in a round, but {cohort} are asked: raise "
                "population.participation or partition.clients, or lower population.minimum"
            )
        clip = min(config.clip or math.inf, largest_norm(queries, classes)) if config.kind == "labels" else None
        self.grid = Grid(scale=1.0 if self.counts_votes else config.secure_scale, clip=clip)
        length = queries * classes
        self.l2, self.l1, self.reach = self._norms(length)
        self.least = least
        self.noise_multiplier: float | None = None
        if self.noisy:
            self.noise_multiplier = (
                config.noise_multiplier
                if config.noise_multiplier is not None
                else calibrate(self.plan, config.epsilon or 0.0, config.delta, config.relation)
            )
        variance = self.share
        if variance > skellam.MAX_VARIANCE:
            raise ConfigError(
                f"each device's noise would have variance {variance:.3g}, beyond {skellam.MAX_VARIANCE:g}: lower "
                "privacy.secure_scale, ask fewer queries, or allow a larger epsilon"
            )
        try:
            bits = bits_for(cohort, self.grid.largest, skellam.reach(variance))
        except ValueError as cause:
            raise ConfigError(f"{cause} (privacy.secure_scale)") from cause
        self.terms = Terms(length=length, bits=bits, minimum=least, threshold=config.secure_threshold, clients=clients)
        self._charged: set[tuple[int, str, int]] = set()

    def _norms(self, length: int) -> tuple[float, float, float]:
        """L2 and L1 norm of one client's vector, and how many times as much replacing it moves the sum at most."""
        if self.counts_votes:
            return math.sqrt(self.queries), float(self.queries), math.sqrt(2)
        l2 = self.grid.l2
        return l2, self.grid.l1(length), 2.0

    # ---- price ------------------------------------------------------------------------------------------------------
    @property
    def variance(self) -> float:
        """Variance of the noise on an entry of a sum of the fewest devices."""
        return 0.0 if self.noise_multiplier is None else (self.noise_multiplier * self.l2) ** 2

    @property
    def share(self) -> float:
        """Variance of one device's noise."""
        return self.variance / self.least

    def price(self, sigma: float | None = None) -> list[Event]:
        """Return what a round costs a client; nothing where no noise is added."""
        sigma = self.noise_multiplier if sigma is None else sigma
        if sigma is None:
            return []
        relation = self.config.relation
        # Votes move two counts of a query by one each when a client is replaced, labels all by twice as much.
        l2 = self.l2 * (self.reach if relation == "replace_one" else 1.0)
        l1 = self.l1 * (2.0 if relation == "replace_one" else 1.0)
        curve = skellam.curve(ORDERS, (sigma * self.l2) ** 2, l1, l2)
        return [Event(rdp=curve, relation=relation)]

    def plan(self, sigma: float, rounds: int | None = None) -> list[Event]:
        """Return what the whole run costs a client that takes part in every round."""
        times = self.rounds if rounds is None else rounds
        return [e.times(times) for e in self.price(sigma)] if times else []

    # ---- device -----------------------------------------------------------------------------------------------------
    def open(self, ledger: Ledger, policy: Policy | None = None) -> None:
        super().open(ledger, policy)
        self.inner.open(ledger, policy)

    @property
    def trainer(self) -> Mechanism:
        return self.inner

    def admit(self, phases: Sequence[Phase], parties: Sequence[Party]) -> Mapping[int, str]:
        if not self.noisy:
            return self.inner.admit(phases, parties)
        self.ledger.refresh()
        refused: dict[int, str] = {}
        allowed: dict[tuple[str, int], list[int]] = {}
        for party in parties:
            reason = self._over(party)
            if reason is not None:
                refused[party.device] = reason
            else:
                allowed.setdefault((party.run, party.round), []).append(party.device)
        for (run, round), devices in allowed.items():
            self._charge(run, round, devices)
        return refused

    def _over(self, party: Party) -> str | None:
        limits: list[tuple[float | None, float, str | None, str]] = [
            (self.config.epsilon, self.config.delta, party.run, "privacy.epsilon of this run")
        ]
        if self.policy is not None:
            limits.append((self.policy.epsilon, self.policy.delta, None, "this node's policy"))
        for limit, delta, run, whose in limits:
            reason = self.ledger.would_exceed(
                party.device, self.price(), limit, delta, unit="client", relation=self.config.relation, run=run
            )
            if reason is not None:
                return f"{reason} ({whose})"
        return None

    def asked(self, run: str, round: int, devices: Sequence[int]) -> None:
        if not self.noisy:
            return self.inner.asked(run, round, devices)
        self.ledger.refresh()
        self._book(run, round, devices, "at most: every device that was asked added its share to a noisy sum")
        return None

    def _charge(self, run: str, round: int, devices: Sequence[int]) -> None:
        self._book(run, round, devices, f"share of a noisy sum of {'votes' if self.counts_votes else 'soft labels'}")
        self._charged |= {(device, run, round) for device in devices}

    def _book(self, run: str, round: int, devices: Sequence[int], what: str) -> None:
        self.ledger.charge(
            [
                Entry(
                    run=run,
                    round=round,
                    what=what,
                    mechanism=self.name,
                    unit="client",
                    relation=self.config.relation,
                    event=event,
                    devices=tuple(devices),
                    seeded=self.config.seeded,
                )
                for event in self.price()
            ]
        )

    def release(
        self, payload: Payload, party: Party, *, examples: float = 1.0, losses: Mapping[str, float] | None = None
    ) -> Released:
        """Return the vector that enters the sum: good for the sum alone, since one device's noise is a small share."""
        if not self.noisy:
            inner = self.inner.release(payload, party, examples=examples, losses=losses)
            # Losses of the device's own would stand beside a sum that hides its answer; those of a DP model may.
            return self._seal(self._vector(inner.payload, None), 1.0, dict(inner.losses) if self.trains else None)
        if isinstance(payload, Nothing):
            return self._seal(payload, 1.0, None)
        place = (party.device, party.run, party.round)
        if place not in self._charged:
            # A client without gradients goes through no phases, so that nobody has admitted it yet.
            reason = self._over(party)
            if reason is not None:
                raise PrivacyError(f"{reason}: the answer of device {party.device} stays")
            self._charge(party.run, party.round, [party.device])
        self._charged.discard(place)
        source = NoiseSource(self.name, self.seed, party.device, party.round) if self.config.seeded else NoiseSource()
        return self._seal(self._vector(payload, source), 1.0, None)

    def payers(self, devices: Sequence[int]) -> Sequence[int]:
        return devices if self.noisy else self.inner.payers(devices)

    def _vector(self, payload: Payload, source: NoiseSource | None) -> Payload:
        if isinstance(payload, Nothing):
            return payload
        values = self._integers(payload)
        if source is not None:
            values = values + skellam.draw(self.share, len(values), source)
        return Integers(values=torch.from_numpy(values))

    def _integers(self, payload: Payload) -> NDArray[np.int64]:
        if isinstance(payload, Votes):
            return one_hot(payload.votes.numpy(), self.classes)
        assert isinstance(payload, SoftLabels)
        if self.counts_votes:
            return one_hot(payload.labels.argmax(-1).numpy(), self.classes)
        return self.grid.quantise(payload.labels.detach().double().numpy())

    # ---- server -----------------------------------------------------------------------------------------------------
    def answer(self, total: NDArray[np.int64], devices: int) -> Collected:
        """Return the one answer that a sum over ``devices`` stands for: mean soft labels, or the winners of the votes."""
        if self.counts_votes:
            counts = torch.from_numpy(total.reshape(self.queries, self.classes))
            winners = counts.argmax(-1)
            labels = torch.nn.functional.one_hot(winners, self.classes).to(self.dtype)
            payload: Payload = Votes(votes=winners) if self.sends_votes else SoftLabels(labels=labels)
        else:
            mean = torch.from_numpy(self.grid.mean(total, devices, self.classes))
            payload = SoftLabels(labels=project_simplex(mean).to(self.dtype))
        sealed = self._seal(payload, float(devices), None)
        card = Card(id=SERVER, architecture=self.student)
        return Collected([Answer(card=card, payload=sealed.payload, examples=sealed.examples)])

    # ---- account ----------------------------------------------------------------------------------------------------
    def claim(self) -> Claim:
        if not self.noisy:
            return self.inner.claim()
        self.ledger.refresh()
        spent = next((s for s in self.ledger.spent(self.config.delta) if s.unit == "client"), None)
        void = spent is not None and spent.void
        finite = spent is None or math.isfinite(spent.epsilon)
        return Claim(
            mechanism=self.name,
            unit="client",
            relation=spent.relation if spent is not None else self.config.relation,
            epsilon=None if void or not finite else (spent.epsilon if spent is not None else 0.0),
            delta=self.config.delta,
            noise_multiplier=self.noise_multiplier,
            note="void: the noise followed the seed (privacy.seeded), so that it protects nothing" if void else None,
        )
