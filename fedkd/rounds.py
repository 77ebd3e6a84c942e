"""The only round loop: ask, validate, aggregate, teach, evaluate, record, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.algorithms.base import Answer, ServerState
from fedkd.messages import Request, write_request
from fedkd.payloads import Contract, Envelope, Nothing, Payload, PayloadError, ids_hash
from fedkd.runners.base import Inspection, Runner, count_correct
from fedkd.seeding import numpy_rng
from fedkd.server_tools import Tools
from fedkd.site import Site


@dataclass(frozen=True)
class Collected:
    """The accepted answers of a round, in the order of client ids."""

    items: tuple[Answer, ...]

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class Progress:
    """Everything the server must remember to go on after ``state.round`` rounds."""

    state: ServerState
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    answers_kept: dict[int, tuple[int, Payload]] = field(default_factory=dict)
    told: dict[str, tuple[int, Payload]] = field(default_factory=dict)
    heard: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """Who is asked in a round, who of them drops out before working, and whose answer comes too late."""

    asked: tuple[int, ...]
    dropped: frozenset[int]
    late: frozenset[int]


class Rounds:
    """Runs an experiment's rounds over a runner."""

    def __init__(self, site: Site, runner: Runner, run: str) -> None:
        self.site, self.runner, self.run = site, runner, run
        self.experiment, self.method = site.experiment, site.method

    # ---- before and after -------------------------------------------------------------------------------------------
    def begin(self) -> Progress:
        """Return the state before round 0."""
        models = {}
        if self.method.student:
            name = self.experiment.models.student
            models["student"] = (name, self.site.initial(name, "start", "model"))
        state = ServerState(round=0, models=models, knowledge=Nothing(), asked=np.zeros(0, np.int64))
        tools = Tools(self.site, 0, np.zeros(0, np.int64))
        return Progress(state=self.method.begin(state, tools))

    def play(
        self, progress: Progress, done: Callable[[Progress, dict[str, Any]], None], until: int | None = None
    ) -> Progress:
        """Run the rounds that are left; ``done`` is called with the record of each finished round."""
        for round in range(progress.state.round, until if until is not None else self.experiment.rounds):
            started = time.perf_counter()
            record = self._round(progress, round)
            record["seconds"] = time.perf_counter() - started
            progress.seconds += record["seconds"]
            progress.bytes_up += record["bytes_up"]
            progress.bytes_down += record["bytes_down"]
            done(progress, record)
        return progress

    # ---- one round --------------------------------------------------------------------------------------------------
    def cohort(self, round: int) -> Cohort:
        """Draw who takes part; depends on the seed and the round alone."""
        population, count = self.experiment.population, len(self.site.cards)
        rng = numpy_rng(self.experiment.seed, "cohort", round)
        size = max(1, round_half_up(population.participation * count))
        asked = np.sort(rng.choice(count, size=min(size, count), replace=False))
        luck = rng.random((2, count))
        dropped = frozenset(int(k) for k in asked if luck[0, k] < population.dropout)
        late = frozenset(int(k) for k in asked if luck[1, k] < population.late) - dropped
        return Cohort(tuple(int(k) for k in asked), dropped, late)

    def ask_indices(self, round: int) -> NDArray[np.int64]:
        """Draw the proxy samples to be answered in a round."""
        if self.site.proxy is None:
            return np.zeros(0, np.int64)
        size, per_round = len(self.site.proxy), self.experiment.proxy_per_round
        if per_round is None or per_round == size:
            return np.arange(size)
        rng = numpy_rng(self.experiment.seed, "proxy samples", round)
        return np.sort(rng.choice(size, size=per_round, replace=False)).astype(np.int64)

    def _round(self, progress: Progress, round: int) -> dict[str, Any]:
        cohort, ask = self.cohort(round), self.ask_indices(round)
        requests = self._requests(progress, round, cohort, ask)
        down = sum(r.bytes for r in requests)
        working = [r for r in requests if r.client not in cohort.dropped]
        accepted: dict[int, Answer] = {}
        quarantined: list[dict[str, Any]] = []
        up, abstained, late, errors = 0, 0, 0, 0
        losses: dict[str, list[float]] = {}
        for reply in self.runner.ask(working):
            for name, value in reply.losses:
                losses.setdefault(name, []).append(value)
            if reply.body is None:
                errors += 1
                quarantined.append({"client": reply.client, "reason": "device", "message": reply.error or "no answer"})
                continue
            up += len(reply.body)
            if reply.client in cohort.late:
                late += 1
                continue
            try:
                answer = self._accept(progress, round, reply.client, reply.body, ask, accepted)
            except PayloadError as cause:
                quarantined.append({"client": reply.client, "reason": cause.reason, "message": str(cause)})
                continue
            progress.heard[reply.client] = round
            if answer is None:
                abstained += 1
            else:
                accepted[reply.client] = answer
        failed = self._close(progress, round, ask, accepted, abstained)
        record: dict[str, Any] = {
            "round": round,
            "asked": len(cohort.asked),
            "answered": len(accepted),
            "abstained": abstained,
            "dropped": len(cohort.dropped),
            "late": late,
            "quarantined": sorted(quarantined, key=lambda q: int(q["client"])),
            "failed": failed,
            "bytes_up": up,
            "bytes_down": down,
            "epsilon": None if np.isinf(self.site.mechanism.epsilon) else self.site.mechanism.epsilon,
            "loss": {name: float(np.mean(values)) for name, values in sorted(losses.items())},
        }
        record |= self._evaluate(progress, round)
        return record

    def _requests(self, progress: Progress, round: int, cohort: Cohort, ask: NDArray[np.int64]) -> list[Request]:
        """Write one message per audience; under delta coding, one more for those who missed the last message."""
        delta = self.site.codec_down.needs_reference
        bodies: dict[Hashable, bytes] = {}
        told: dict[str, tuple[int, Payload]] = {}
        requests = []
        for client in cohort.asked:
            card = self.site.cards[client]
            audience = self.method.audience(card)
            name = repr(audience)
            reference = None
            if delta and name in progress.told:
                last_round, message = progress.told[name]
                reference = message if progress.heard.get(client) == last_round else None
            place = (audience, reference is not None)
            if place not in bodies:
                knowledge = self.method.broadcast(progress.state, card)
                body, bundle = write_request(
                    self.site, self.run, round, knowledge, progress.state.asked, ask, reference
                )
                bodies[place] = body
                if delta:
                    told[name] = (round, self.site.codec_down.roundtrip(bundle))
            holds = progress.answers_kept.get(client, (-1, None))[0]
            requests.append(Request(client, round, bodies[place], holds))
        progress.told.update(told)
        return requests

    def _accept(
        self,
        progress: Progress,
        round: int,
        client: int,
        body: bytes,
        ask: NDArray[np.int64],
        accepted: dict[int, Answer],
    ) -> Answer | None:
        """Validate one upload; None is an abstention.

        Raises:
            PayloadError: the upload is refused; the round goes on without it.
        """
        if client in accepted:
            raise PayloadError("duplicate", f"device {client} has answered round {round} already")
        card = self.site.cards[client]
        codec = self.site.codec_up
        expected = Envelope(run=self.run, round=round, sender=client, proxy=self.site.proxy_identity, ids=ids_hash(ask))
        reference = progress.answers_kept[client][1] if client in progress.answers_kept else None
        if len(body) <= ABSTENTION_BYTES:
            try:
                codec.decode(body, NOTHING, None, expected=expected)
                return None
            except PayloadError as cause:
                if cause.reason not in ("kind", "fields"):
                    raise
        payload, envelope = codec.decode(body, self.site.contract_up(card, len(ask)), reference, expected=expected)
        if codec.needs_reference:
            progress.answers_kept[client] = (round, payload)
        return Answer(card=card, payload=self.site.widen(payload), examples=envelope.examples)

    def _close(
        self, progress: Progress, round: int, ask: NDArray[np.int64], accepted: dict[int, Answer], abstained: int
    ) -> str | None:
        """Turn the answers into knowledge and teach; return why the round failed, if it did."""
        progress.state = replace(progress.state, round=round + 1)
        if self.method.upload is Nothing:
            return None
        minimum = self.experiment.population.minimum
        if len(accepted) < minimum:
            return f"{len(accepted)} answers, at least {minimum} are needed; the server stays as it was"
        answers = Collected(tuple(accepted[client] for client in sorted(accepted)))
        tools = Tools(self.site, round, ask)
        knowledge = self.method.aggregate(answers, progress.state, tools)
        state = replace(progress.state, knowledge=knowledge, asked=ask)
        progress.state = self.method.update(state, knowledge, tools)
        return None

    # ---- evaluation -------------------------------------------------------------------------------------------------
    def _evaluate(self, progress: Progress, round: int) -> dict[str, Any]:
        evaluation, last = self.experiment.evaluation, round + 1 == self.experiment.rounds
        found: dict[str, Any] = {"student_accuracy": None, "clients_accuracy": None, "ensemble_accuracy": None}
        if "student" in progress.state.models and (last or (round + 1) % evaluation.every == 0):
            found["student_accuracy"] = float(self.student_correct(progress.state).sum() / len(self.site.test))
        due = evaluation.clients_every is not None and (round + 1) % evaluation.clients_every == 0
        if due and not last:
            seen = self.inspect(progress.state)
            if seen is not None:
                found["clients_accuracy"] = [float(a) for a in seen.correct.sum(1) / len(self.site.test)]
                found["ensemble_accuracy"] = self.ensemble_accuracy(seen)
        return found

    def inspect(self, state: ServerState) -> Inspection | None:
        """Look at all devices' models; where devices keep none, at the server's model that they would adopt."""
        cards = self.site.cards
        if "model" not in self.method.keeps and "student" in state.models:
            correct = np.tile(self.student_correct(state), (len(cards), 1))
            return Inspection(correct, self.student_probabilities(state))
        return self.runner.inspect([card.id for card in cards], state.round)

    def ensemble_accuracy(self, seen: Inspection) -> float:
        """Accuracy of the mean of all devices' probabilities."""
        assert self.site.test.y is not None
        return float((seen.ensemble.argmax(1) == self.site.test.y.numpy()).mean())

    @torch.no_grad()
    def student_probabilities(self, state: ServerState) -> NDArray[np.float64]:
        """Return the student's probabilities on the test set [N, C]."""
        architecture, weights = state.models["student"]
        net = Tools(self.site, state.round, state.asked).net(architecture, weights)
        x = self.site.test.take(torch.arange(len(self.site.test)))
        found: NDArray[np.float64] = net.probabilities(x).double().numpy()
        return found

    def student_correct(self, state: ServerState) -> NDArray[np.int64]:
        """Return the student's right answers per class [C]."""
        assert self.site.test.y is not None
        scores = torch.from_numpy(self.student_probabilities(state))
        return count_correct(scores, self.site.test.y, self.site.classes)


ABSTENTION_BYTES = 1024
"""An abstention has no tensors; a longer message cannot be one, and is not tried as one."""

NOTHING = Contract.of(Nothing, {})


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up."""
    return int(np.floor(value + 0.5))
