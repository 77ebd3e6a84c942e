"""Client level, on a trusted server: noise on the sum of soft labels, or on votes by confident GNMax.

N. Papernot et al., "Scalable Private Learning with PATE", ICLR 2018, https://arxiv.org/abs/1802.08908 (votes).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.algorithms.base import Answer, Answers, Card
from fedkd.collected import Collected
from fedkd.errors import ConfigError
from fedkd.payloads import Payload, SoftLabels, Votes
from fedkd.privacy.events import Event, calibrate
from fedkd.privacy.ledger import SERVER, Entry
from fedkd.privacy.mechanisms import Claim, Mechanism, NothingReleased, Party, Released
from fedkd.privacy.noise import NoiseSource

if TYPE_CHECKING:
    from fedkd.experiment import Experiment


class ClientLevel(Mechanism):
    """What labels and votes share: the price of a round, the ledger, and the secret cohort.

    Guarantee: towards everybody but the server, which sees raw answers. A client's drop-out or lateness is taken as
    public, and so is a fixed cohort. Under Poisson sampling, who takes part stays on the server: a round goes on with
    any number of answers, none included, and the number that sums are divided by is public.
    """

    unit = "client"

    def __init__(self, experiment: Experiment, *, clients: int, queries: int, classes: int) -> None:
        super().__init__()
        self.config = config = experiment.privacy
        population = experiment.population
        self.classes, self.queries, self.rounds, self.seed = classes, queries, experiment.rounds, experiment.seed
        self.secret_cohort = config.sampling == "poisson"
        self.q = population.participation if self.secret_cohort else 1.0
        self.expected_clients = max(
            1.0, clients * population.participation * (1 - population.dropout) * (1 - population.late)
        )
        self.student = experiment.models.student
        self.dtype = torch.float64 if experiment.dtype == "float64" else torch.float32
        self.sends_votes = experiment.method.upload is Votes
        self.noise_multiplier = (
            config.noise_multiplier
            if config.noise_multiplier is not None
            else calibrate(self.plan, config.epsilon or 0.0, config.delta, config.relation)
        )

    @abstractmethod
    def price(self, sigma: float | None = None) -> list[Event]:
        """Return what a round costs every client."""

    @abstractmethod
    def noisy_sum(self, answers: Answers, noise: NoiseSource) -> tuple[Tensor, Tensor]:
        """Return the sum of the answers as it is protected, and the sum without noise, float64 [N, C] each."""

    @abstractmethod
    def aggregate(self, answers: Answers, noise: NoiseSource) -> tuple[Tensor, NDArray[np.int64]]:
        """Return probabilities [M, C] for M of the queries, and which queries they are [M]."""

    def plan(self, sigma: float, rounds: int | None = None) -> list[Event]:
        """Return what the whole run costs every client."""
        times = self.rounds if rounds is None else rounds
        return [e.times(times) for e in self.price(sigma)] if times else []

    # ---- device -----------------------------------------------------------------------------------------------------
    def release(
        self, payload: Payload, party: Party, *, examples: float = 1.0, losses: Mapping[str, float] | None = None
    ) -> Released:
        """Let the answer go to the trusted server, with equal weight for all, and without losses, which no noise covers."""
        return self._seal(payload, 1.0, None)

    # ---- server -----------------------------------------------------------------------------------------------------
    def draw(self, clients: int, participation: float) -> NDArray[np.int64]:
        chosen = self._noise("cohort", len(self.ledger.entries)).bernoulli(participation, (clients,))
        return np.flatnonzero(chosen).astype(np.int64)

    def combine(
        self, answers: Answers, ask: NDArray[np.int64], *, run: str, round: int
    ) -> tuple[Answers, NDArray[np.int64]]:
        events, config = self.price(), self.config
        reason = self.ledger.would_exceed(
            SERVER, events, config.epsilon, config.delta, unit="client", relation=config.relation, run=run
        )
        if reason is not None:
            raise NothingReleased(f"{reason} (privacy.epsilon of this run): the answers are dropped")
        self.ledger.charge(
            [
                Entry(
                    run=run,
                    round=round,
                    what=f"{what} for {len(ask)} proxy samples",
                    mechanism=self.name,
                    unit="client",
                    relation=config.relation,
                    event=event,
                    devices=(SERVER,),
                    seeded=config.seeded,
                )
                for event, what in zip(events, self.what, strict=True)
            ]
        )
        labels, answered = self.aggregate(answers, self._noise("round", round))
        if not len(answered):
            raise NothingReleased("no query found enough agreement among the clients: nothing is taught in this round")
        # The places of unanswered queries are filled by answered ones, so that messages keep their shape.
        fill = np.arange(len(ask)) % len(answered)
        labels, taught = labels[torch.from_numpy(fill)], ask[answered[fill]]
        payload: Payload = Votes(votes=labels.argmax(-1)) if self.sends_votes else SoftLabels(labels=labels)
        sealed = self._seal(payload, self.expected_clients, None)
        card = Card(id=SERVER, architecture=self.student)
        return Collected([Answer(card=card, payload=sealed.payload, examples=sealed.examples)]), taught

    def payers(self, devices: Sequence[int]) -> Sequence[int]:
        return (SERVER,) if devices else ()

    @property
    @abstractmethod
    def what(self) -> Sequence[str]:
        """What each event of :meth:`price` releases, in words."""

    def _noise(self, *who: str | int) -> NoiseSource:
        return NoiseSource(self.name, self.seed, *who) if self.config.seeded else NoiseSource()

    # ---- account ----------------------------------------------------------------------------------------------------
    def claim(self) -> Claim:
        self.ledger.refresh()
        config = self.config
        spent = next((s for s in self.ledger.spent(config.delta) if s.unit == "client"), None)
        void = spent is not None and spent.void
        finite = spent is None or math.isfinite(spent.epsilon)
        return Claim(
            mechanism=self.name,
            unit="client",
            relation=spent.relation if spent is not None else config.relation,
            epsilon=None if void or not finite else (spent.epsilon if spent is not None else 0.0),
            delta=config.delta,
            noise_multiplier=self.noise_multiplier,
            note="void: the noise followed the seed (privacy.seeded), so that it protects nothing" if void else None,
        )


class GaussianLabels(ClientLevel):
    """Noisy mean of soft labels.

    Guarantee:
        Unit: a client with all its records. Each client's labels P [N, C] enter as z = vec(P - 1/C), scaled down to norm
        ``clip`` where longer; sum z has add/remove sensitivity ``clip`` and replace-one sensitivity
        min(2 clip, sqrt(2 N)). Noise N(0, (sigma clip)^2) on every entry; then division by the public expected
        number of clients and projection onto the simplex, which are free.
        Edge cases: an answer with NaN or infinity adds zero; huge values are clipped; without any answer the release is
        noise alone.
    """

    name = "labels"

    def __init__(self, experiment: Experiment, *, clients: int, queries: int, classes: int) -> None:
        self.clip = min(experiment.privacy.clip or math.inf, largest_norm(queries, classes))
        self.reach = min(2.0, math.sqrt(2 * queries) / self.clip)
        super().__init__(experiment, clients=clients, queries=queries, classes=classes)

    def price(self, sigma: float | None = None) -> list[Event]:
        sigma = self.noise_multiplier if sigma is None else sigma
        return [Event(sigma=sigma, q=self.q, reach=self.reach)]

    @property
    def what(self) -> Sequence[str]:
        return ("noisy mean of soft labels",)

    def noisy_sum(self, answers: Answers, noise: NoiseSource) -> tuple[Tensor, Tensor]:
        total = clipped_sum((a.payload.tensors()["labels"] for a in answers), self.queries, self.classes, self.clip)
        return total + noise.normal((self.queries, self.classes), self.noise_multiplier * self.clip), total

    def aggregate(self, answers: Answers, noise: NoiseSource) -> tuple[Tensor, NDArray[np.int64]]:
        dirty, _ = self.noisy_sum(answers, noise)
        mean = dirty / self.expected_clients + 1 / self.classes
        return project_simplex(mean).to(self.dtype), np.arange(self.queries)


class ConfidentGnmax(ClientLevel):
    """Top-1 votes: a query is answered by the noisy winner if enough clients agree, after noise of its own.

    Guarantee:
        Unit: a client with all its records. One client changes one vote of every query: the vote counts of a query move
        by norm 1 (add/remove) or sqrt(2) (replace-one), their largest by at most 1. Agreement is tested on
        max n_j + N(0, s1^2), answers are argmax(n_j + N(0, s2^2)); ``noise_multiplier`` is s2, s1 = ``threshold_noise``
        x s2. Charged, before any noise is drawn, are as many tests as there are queries and as many answers as may be
        given, so that the figure does not depend on the data; answers that are not given save nothing.
        The noisy counts of answered queries are what is paid for: :func:`odds` of them cost no more than their argmax.
        Edge cases: whatever a client sends, NaN included, is one vote per query.
    """

    name = "votes"

    def __init__(self, experiment: Experiment, *, clients: int, queries: int, classes: int) -> None:
        config = experiment.privacy
        self.most = min(config.answers or queries, queries)
        super().__init__(experiment, clients=clients, queries=queries, classes=classes)

    def price(self, sigma: float | None = None) -> list[Event]:
        sigma = self.noise_multiplier if sigma is None else sigma
        if self.q < 1:
            # One coin a round decides whether a client is in, for all its queries at once: the round is one sampled
            # Gaussian of their joint sensitivity, and not as many independently sampled ones as there are queries.
            precision = self.most / sigma**2 if sigma else math.inf
            if self.config.threshold is not None and sigma:
                precision += self.queries / (sigma * self.config.threshold_noise) ** 2
            return [Event(sigma=1 / math.sqrt(precision), q=self.q)]
        answers = Event(sigma=sigma, q=self.q, count=self.most, reach=math.sqrt(2))
        if self.config.threshold is None:
            return [answers]
        return [Event(sigma=sigma * self.config.threshold_noise, q=self.q, count=self.queries, reach=1.0), answers]

    @property
    def what(self) -> Sequence[str]:
        answers = f"at most {self.most} noisy winners"
        if self.q < 1:
            return (answers if self.config.threshold is None else f"tests of agreement and {answers}",)
        return (answers,) if self.config.threshold is None else ("tests of agreement", answers)

    def noisy_sum(self, answers: Answers, noise: NoiseSource) -> tuple[Tensor, Tensor]:
        counts = count_votes((a.payload for a in answers), self.queries, self.classes)
        return counts + noise.normal((self.queries, self.classes), self.noise_multiplier), counts

    def aggregate(self, answers: Answers, noise: NoiseSource) -> tuple[Tensor, NDArray[np.int64]]:
        dirty, counts = self.noisy_sum(answers, noise)
        answered = np.arange(self.queries)
        if self.config.threshold is not None:
            tests = noise.normal((self.queries,), self.noise_multiplier * self.config.threshold_noise)
            enough = counts.max(-1).values + tests >= self.config.threshold * self.expected_clients
            answered = np.flatnonzero(enough.numpy())
        answered = answered[: self.most]
        given = dirty[torch.from_numpy(answered)]
        if self.config.taught == "odds":
            labels = odds(given, self.noise_multiplier, self.expected_clients, self.config.agreement)
        else:
            labels = torch.nn.functional.one_hot(given.argmax(-1), self.classes)
        return labels.to(self.dtype), answered


def largest_norm(queries: int, classes: int) -> float:
    """Largest norm of vec(P - 1/C) for probabilities P [N, C]: that of certain labels."""
    return math.sqrt(queries * (1 - 1 / classes))


def clipped_sum(labels: Iterable[Tensor], queries: int, classes: int, clip: float) -> Tensor:
    """Return the sum of every client's vec(P - 1/C), each of norm at most ``clip``, in float64 [N, C].

    Guarantee: whatever one client's tensor holds, it moves the sum by at most ``clip`` (up to rounding): NaN and
    infinity count as zero, and a tensor of another shape is an error before anything is summed.
    """
    total = torch.zeros(queries, classes, dtype=torch.float64)
    for given in labels:
        z = given.double() - 1 / classes
        if z.shape != total.shape:
            raise ValueError(f"labels of shape {list(z.shape)}, expected {list(total.shape)}")
        # Scaled by the largest entry first, so that the norm of huge values does not overflow.
        peak = float(z.abs().max()) if z.numel() else 0.0
        if not math.isfinite(peak) or peak == 0.0:
            continue
        norm = peak * float((z / peak).norm())
        total += z / peak * (peak if norm <= clip else clip * (peak / norm))
    return total


def count_votes(payloads: Iterable[Payload], queries: int, classes: int) -> Tensor:
    """Return the number of votes per query and class, float64 [N, C]; every client has one vote per query."""
    counts = torch.zeros(queries, classes, dtype=torch.float64)
    rows = torch.arange(queries)
    for payload in payloads:
        tensors = payload.tensors()
        votes = tensors["votes"] if "votes" in tensors else tensors["labels"].argmax(-1)
        if votes.shape != (queries,):
            raise ValueError(f"votes of shape {list(votes.shape)}, expected [{queries}]")
        counts[rows, votes.long().clamp(0, classes - 1)] += 1
    return counts


def odds(counts: Tensor, deviation: float, clients: float, agreement: float) -> Tensor:
    """Return the probability of each class to be the right one, given noisy counts of votes [N, C]; float64 [N, C].

    Bayes's rule under a model without data: ``clients`` vote for the right class with chance a = ``agreement`` and for each
    other with (1 - a) / (C - 1), all classes are as likely beforehand, and counts bear noise of ``deviation``. With the
    clients' scatter a (1 - a) taken for that of every class, log odds are counts x gap / variance. Post-processing.

    Raises:
        ConfigError: an agreement at or below chance, under which the fewest votes would win.
    """
    classes = counts.shape[-1]
    if not agreement > 1 / classes:
        raise ConfigError(f"privacy.agreement is {agreement:g}: expected more than chance, 1/{classes}")
    gap = clients * (agreement - (1 - agreement) / (classes - 1))
    return (counts * gap / (deviation**2 + clients * agreement * (1 - agreement))).softmax(-1)


def project_simplex(rows: Tensor) -> Tensor:
    """Return the nearest probabilities to each row [N, C] (Euclidean).

    J. Duchi et al., "Efficient Projections onto the l1-Ball for Learning in High Dimensions", ICML 2008, figure 1.
    """
    ordered = rows.sort(-1, descending=True).values
    excess = (ordered.cumsum(-1) - 1) / torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype)
    last = (ordered > excess).sum(-1, keepdim=True) - 1
    return (rows - excess.gather(-1, last)).clamp(min=0)
