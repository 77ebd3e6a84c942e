"""The only round loop: ask, validate, aggregate, teach, evaluate, record, save.

*When* things happen is kept apart from *what* they are. A request under way is a flight. Without virtual time all
flights of a round run at once and their answers come at once. In virtual time a heap of moments says which flight
comes next to the end of its work, of its upload, or of its device's patience; flights that were asked meanwhile queue, and
run as one block when the first of their results is needed.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.algorithms.base import Algorithm, Answer, Answers, ServerState
from fedkd.collected import Collected
from fedkd.messages import Request, write_request
from fedkd.payloads import Bundle, Contract, Envelope, Nothing, Payload, PayloadError, ids_hash
from fedkd.privacy.mechanisms import NothingReleased
from fedkd.privacy.secure.exchange import SecureRound
from fedkd.privacy.secure.heads import SecureSumError
from fedkd.privacy.secure.mechanism import SecureSum
from fedkd.runners.base import Inspection, Runner, count_correct
from fedkd.seeding import key, numpy_rng
from fedkd.server_tools import Tools
from fedkd.site import Site
from fedkd.virtual.flights import Flight
from fedkd.virtual.world import NEVER, World

log = logging.getLogger(__name__)

MAX_WAITS = 20_000
"""Arrivals that a round waits for in a row: devices that are never there together must not keep it for ever."""

Agenda = list[tuple[float, int]]
"""A heap of (virtual second, client): when each flight comes to the end of its stage."""


@dataclass
class Progress:
    """Everything the server must remember to go on after ``state.round`` rounds.

    ``flights``: requests under way, by client. ``clock``: the virtual second. ``heard``: by client, the round and the
    audience of the last message that surely reached it.
    """

    state: ServerState
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    answers_kept: dict[int, tuple[int, Payload]] = field(default_factory=dict)
    told: dict[str, tuple[int, Payload]] = field(default_factory=dict)
    heard: dict[int, tuple[int, str]] = field(default_factory=dict)
    flights: dict[int, Flight] = field(default_factory=dict)
    clock: float = 0.0


@dataclass(frozen=True)
class Cohort:
    """Who is asked, who of them drops out (and after which share of the work), and whose answer comes too late."""

    asked: tuple[int, ...]
    dropped: Mapping[int, float]
    late: frozenset[int]


@dataclass
class Open:
    """A round that is open: what was drawn and asked, what has come so far, and what it cost.

    ``seen`` [K]: devices that were asked or heard in this round. None is asked twice, so that (device, round) names an
    answer, and none counts twice in an aggregate. ``taken`` [K]: those, and devices that an earlier round keeps busy.
    ``used``: by round, the devices whose answers are in ``accepted``. ``turns`` counts how often devices were asked,
    ``busy`` the devices at work or sending, ``own`` those of them that this round asked. ``bodies``: the messages written,
    by audience. ``told``: the same as references for delta coding, valid from the next round on.
    """

    number: int
    drawn: NDArray[np.int64]
    ask: NDArray[np.int64]
    seen: NDArray[np.bool_]
    taken: NDArray[np.bool_]
    busy: int = 0
    own: int = 0
    turns: int = 0
    deadline: float = NEVER
    asked: int = 0
    accepted: Collected = field(default_factory=Collected)
    used: dict[int, list[int]] = field(default_factory=dict)
    fresh: int = 0
    staleness: list[int] = field(default_factory=list)
    abstained: int = 0
    dropped: int = 0
    late: int = 0
    heard: list[int] = field(default_factory=list)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    up: int = 0
    down: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    bodies: dict[Hashable, tuple[bytes, Payload | None]] = field(default_factory=dict)
    told: dict[str, tuple[int, Payload]] = field(default_factory=dict)
    sum: SecureRound | None = None
    failed: str | None = None

    @cached_property
    def ask_ids(self) -> str:
        """Hash of ``ask``, which every answer must name."""
        return ids_hash(self.ask)

    def refuse(self, client: int, reason: str, message: str) -> None:
        """Note an answer that is of no use; the round goes on without it."""
        self.quarantined.append({"client": client, "reason": reason, "message": message})


class Rounds:
    """Runs an experiment's rounds over a runner."""

    def __init__(self, site: Site, runner: Runner, run: str, scratch: Path | None = None) -> None:
        """``scratch``: a folder for what long work on the server leaves behind within a round."""
        self.site, self.runner, self.run, self._scratch = site, runner, run, scratch
        self.experiment, self.method = site.experiment, site.method
        self.population = site.experiment.population
        self.wanted = self.population.cohort(len(site.cards))
        self._remembers = self.population.stalest > 0 and type(self.method).catch_up is not Algorithm.catch_up
        self._seen: tuple[int, Inspection | None] | None = None
        virtual = site.experiment.virtual
        self.world = None if virtual is None else World(virtual, site.experiment.seed, len(site.cards))

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
    def cohort(
        self, round: int, free: NDArray[np.bool_] | None = None, size: int | None = None, turn: int = 0
    ) -> Cohort:
        """Draw who is asked; depends on the seed and the arguments alone.

        Args:
            free: who can be asked [K]; None for all.
            size: how many are asked at most; None for the experiment's participation.
            turn: counts the draws of one round.
        """
        count = len(self.site.cards)
        pool = np.arange(count) if free is None else np.flatnonzero(free)
        rng = numpy_rng(self.experiment.seed, "cohort", round, *((turn,) if turn else ()))
        if self.site.mechanism.secret_cohort:
            asked = self.site.mechanism.draw(count, self.population.participation)
        else:
            size = min(self.wanted if size is None else size, len(pool))
            asked = np.sort(rng.choice(pool, size=size, replace=False))
        luck = rng.random((2, count))
        chance = self.population.dropout
        dropped = {int(k): float(luck[0, k] / chance) for k in asked if luck[0, k] < chance}
        late = frozenset(int(k) for k in asked if luck[1, k] < self.population.late) - dropped.keys()
        return Cohort(tuple(int(k) for k in asked), dropped, late)

    def ask_indices(self, round: int) -> NDArray[np.int64]:
        """Draw the proxy samples to be answered in a round."""
        if self.site.proxy is None:
            return np.zeros(0, np.int64)
        size, per_round = len(self.site.proxy), self.experiment.proxy_per_round
        if per_round is None or per_round == size:
            return np.arange(size)
        if self.experiment.proxy_choice == "spread":
            return self._spread
        rng = numpy_rng(self.experiment.seed, "proxy samples", round)
        return np.sort(rng.choice(size, size=per_round, replace=False)).astype(np.int64)

    def _asked_before(self, round: int) -> tuple[NDArray[np.int64], str]:
        ask = self.ask_indices(round)
        return ask, ids_hash(ask)

    @cached_property
    def _spread(self) -> NDArray[np.int64]:
        """The proxy samples nearest to the centres of clusters; where two centres share one, the next nearest."""
        from sklearn.cluster import KMeans

        assert self.site.proxy_all is not None and self.experiment.proxy_per_round is not None
        x = self.site.proxy_all.all()[0].flatten(1).double().numpy()
        seed = key(self.experiment.seed, "spread proxy samples") % 2**32
        found = KMeans(self.experiment.proxy_per_round, n_init=3, random_state=seed).fit(x)
        chosen: list[int] = []
        for distances in found.transform(x).T:
            chosen.append(next(int(i) for i in np.argsort(distances, kind="stable") if int(i) not in chosen))
        return np.sort(np.array(chosen, np.int64))

    def _round(self, progress: Progress, number: int) -> dict[str, Any]:
        open = self._open(progress, number)
        if self.world is None:
            self._at_once(progress, open)
        else:
            self._in_time(progress, open, self.world)
        self._give_up(progress, open)
        failed = self._close(progress, open)
        if failed is None:
            self.site.mechanism.check_account(self.run, open.used)
        if self.experiment.virtual is not None:
            progress.clock += self.experiment.virtual.server_seconds
        if open.sum is not None:
            open.up, open.down = open.up + open.sum.up, open.down + open.sum.down
            open.late, open.dropped = open.late + len(open.sum.late), open.dropped + len(open.sum.offline)
            for client, reason in open.sum.refused.items():
                open.refuse(client, "secure", reason)
        record: dict[str, Any] = {
            "round": number,
            "asked": open.asked,
            "answered": len(open.accepted),
            "abstained": open.abstained,
            "dropped": open.dropped,
            "late": open.late,
            "quarantined": sorted(open.quarantined, key=lambda q: int(q["client"])),
            "failed": failed,
            "bytes_up": open.up,
            "bytes_down": open.down,
            "epsilon": self.site.mechanism.claim().epsilon,
            "loss": {name: float(np.mean(values)) for name, values in sorted(open.losses.items())},
            "virtual_seconds": None if self.world is None else progress.clock,
            "staleness": float(np.mean(open.staleness)) if open.staleness else None,
            "in_flight": sum(not flight.given_up for flight in progress.flights.values()),
        }
        if self.site.mechanism.secret_cohort:
            record |= self._secret(open)
        record |= self._evaluate(progress, number)
        return record

    def _secret(self, open: Open) -> dict[str, Any]:
        """Leave out of a record what tells who took part: without that secret, sampling amplifies nothing."""
        for put_aside in open.quarantined:
            log.warning("round %d: %s", open.number, put_aside)
        counts = dict.fromkeys(("asked", "answered", "abstained", "dropped", "late", "staleness"))
        return {**counts, "in_flight": 0, "quarantined": [], "bytes_up": 0, "bytes_down": 0}

    def _open(self, progress: Progress, number: int) -> Open:
        seen, taken = np.zeros((2, len(self.site.cards)), bool)
        taken[list(progress.flights)] = True
        drawn = self.ask_indices(number)
        open = Open(number, drawn, self.method.ask(progress.state, drawn), seen, taken, busy=len(progress.flights))
        if self.population.buffer is not None and self.population.deadline_seconds is not None:
            open.deadline = progress.clock + self.population.deadline_seconds
        return open

    # ---- when -------------------------------------------------------------------------------------------------------
    def _at_once(self, progress: Progress, open: Open) -> None:
        """Play a round without virtual time: whoever is asked answers at once, or late, or not at all."""
        for client in sorted(progress.flights):
            self._land(progress, open, progress.flights[client])
        self._dispatch(progress, open, self.cohort(open.number, ~open.taken))
        for flight in self._work(progress):
            self._land(progress, open, flight)

    def _in_time(self, progress: Progress, open: Open, world: World) -> None:
        """Play a round in virtual time, from moment to moment, until it is full, overdue, or nothing can come any more."""
        agenda = [(flight.at, client) for client, flight in progress.flights.items()]
        heapq.heapify(agenda)
        world.there(progress.clock)
        waits = 0
        while not self._full(open):
            turns, comes = open.turns, self._fill(progress, open, world, agenda)
            moment = agenda[0][0] if agenda else NEVER
            following = min(moment, comes, open.deadline)
            if following == NEVER:
                return
            waits = waits + 1 if open.turns == turns and following == comes < moment else 0
            if waits > MAX_WAITS:
                open.failed = (
                    f"{MAX_WAITS} devices came and went, but never were there as many at a time as a round needs "
                    f"({self._needed}): lower population.minimum, or let devices stay longer (virtual.on_seconds)"
                )
                return
            # What happens while the server teaches waits for it.
            progress.clock = max(progress.clock, following)
            if moment == following:
                self._advance(progress, open, world, agenda, heapq.heappop(agenda)[1])
            elif open.deadline == following:
                return

    def _fill(self, progress: Progress, open: Open, world: World, agenda: Agenda) -> float:
        """Ask whom the round still wants; return when somebody comes whom it wants but who is away."""
        needed, room = 1, self.wanted - open.busy
        if self.population.buffer is None:
            if open.turns:
                return NEVER
            room = math.ceil(self.wanted * (1 + self.population.over_selection))
            needed = self._needed
        if room <= 0:
            return NEVER
        idle = ~open.taken
        free = idle & world.there(progress.clock)
        if free.sum() < needed:
            return world.comes(progress.clock, idle)
        cohort = self.cohort(open.number, free, room, open.turns)
        if self.population.buffer is None and self.population.deadline_seconds is not None:
            open.deadline = progress.clock + self.population.deadline_seconds
        open.turns += 1
        for client in self._dispatch(progress, open, cohort):
            heapq.heappush(agenda, (progress.flights[client].at, client))
        return NEVER if len(cohort.asked) == room else world.comes(progress.clock, idle)

    @property
    def _needed(self) -> int:
        """How many devices must be there before a synchronous round begins."""
        return min(self.population.minimum, len(self.site.cards))

    def _full(self, open: Open) -> bool:
        """Tell whether a round need not wait any longer."""
        if self.population.buffer is not None:
            return len(open.accepted) >= self.population.buffer
        return open.turns > 0 and (not open.own or open.fresh >= self.wanted)

    def _advance(self, progress: Progress, open: Open, world: World, agenda: Agenda, client: int) -> None:
        """Let a flight come to the end of its stage, which is now."""
        flight, now = progress.flights[client], progress.clock
        if flight.stage == "lost":
            self._end(progress, open, flight)
            open.up += flight.lost_bytes
            open.dropped += not flight.given_up
            return
        if flight.stage == "working":
            if flight.reply is None:
                for _ in self._work(progress):
                    pass
            assert flight.reply is not None
            if flight.reply.body is not None:
                size = len(flight.reply.body)
                taken = float(world.latency[client] + size / world.up[client])
                flight.stage, flight.at = "sending", now + taken
                if world.leaves(client) < flight.at:
                    flight.stage, flight.at = "lost", world.leaves(client)
                    flight.lost_bytes = int(size * (flight.at - now) / taken)
                heapq.heappush(agenda, (flight.at, client))
                return
        self._land(progress, open, flight)

    def _dispatch(self, progress: Progress, open: Open, cohort: Cohort) -> list[int]:
        """Send the requests of a cohort; return whose flights there are now."""
        asked = list(self._requests(progress, open, self._ready(open, cohort.asked)))
        open.asked += len(cohort.asked)
        open.seen[list(cohort.asked)] = True
        open.taken |= open.seen
        costs = self.runner.work([request for request, _ in asked]) if self.world is not None else [0.0] * len(asked)
        begun = []
        for (request, heard), cost in zip(asked, costs, strict=True):
            client, share = request.client, cohort.dropped.get(request.client)
            open.down += request.bytes
            flight = Flight(request, "working", late=client in cohort.late, heard=heard)
            if self.world is not None:
                world, now = self.world, progress.clock
                taken = float(world.latency[client] + request.bytes / world.down[client] + cost / world.flops[client])
                flight.at = now + taken
                if share is not None:
                    flight.stage, flight.at = "lost", now + share * taken
                if world.leaves(client) <= flight.at:
                    flight.stage, flight.at = "lost", world.leaves(client)
            elif share is not None:
                open.dropped += 1
                continue
            progress.flights[client] = flight
            open.busy += 1
            open.own += 1
            begun.append(client)
        return begun

    def _ready(self, open: Open, clients: Sequence[int]) -> Sequence[int]:
        """Return who may be asked: under a secure sum, those who hold each other's shares."""
        if not isinstance(self.site.mechanism, SecureSum):
            return clients
        open.sum = SecureRound(self.site.mechanism, self.runner, self.run, open.number)
        try:
            return open.sum.gather(clients)
        except SecureSumError as cause:
            open.failed = str(cause)
            return ()

    def _work(self, progress: Progress) -> Iterator[Flight]:
        """Let all devices work that were asked and have not; yields each flight when its reply is there."""
        flights = progress.flights
        queue = [flights[c].request for c in sorted(flights) if flights[c].stage == "working" and not flights[c].reply]
        for reply in self.runner.ask(queue):
            flight = flights[reply.client]
            flight.reply = reply
            yield flight

    def _land(self, progress: Progress, open: Open, flight: Flight) -> None:
        """Take the reply of a flight: an answer that is used, or an answer or a failure that is only noted."""
        reply, request = flight.reply, flight.request
        assert reply is not None
        if flight.late and request.round == open.number and reply.body is not None:
            flight.stage = "held"
            open.busy -= 1
            open.own -= 1
            return
        if not flight.given_up:
            open.seen[request.client] = True
        self._end(progress, open, flight)
        self._count(open, flight)
        if flight.given_up:
            return
        if reply.body is None:
            if reply.reason == "late":
                open.late += 1
            elif reply.reason == "offline":
                open.dropped += 1
            else:
                open.refuse(request.client, reply.reason, reply.error or "no answer")
            return
        try:
            if open.sum is not None:
                open.sum.take(request.client, reply.body)
                answer: Answer | None = Answer(card=self.site.cards[request.client], payload=Nothing(), examples=1.0)
            else:
                answer = self._accept(progress, open, flight, reply.body)
        except PayloadError as cause:
            open.refuse(request.client, cause.reason, str(cause))
            return
        progress.heard[request.client] = request.round, self._audience(progress, request.client)
        if request.round == open.number:
            open.heard.append(request.client)
        if answer is None:
            open.abstained += 1
        else:
            open.accepted.add(answer)
            open.used.setdefault(request.round, []).append(request.client)
            open.staleness.append(open.number - request.round)
            open.fresh += open.number == request.round

    @staticmethod
    def _end(progress: Progress, open: Open, flight: Flight) -> None:
        client = flight.request.client
        del progress.flights[client]
        open.taken[client] = open.seen[client]
        open.busy -= 1
        open.own -= flight.request.round == open.number

    @staticmethod
    def _count(open: Open, flight: Flight) -> None:
        assert flight.reply is not None
        open.up += len(flight.reply.body or b"")
        for name, value in flight.reply.losses:
            open.losses.setdefault(name, []).append(value)

    def _give_up(self, progress: Progress, open: Open) -> None:
        """End the wait for answers that would be too stale in the next round."""
        for client in sorted(progress.flights):
            flight = progress.flights[client]
            if not flight.given_up and open.number + 1 - flight.request.round > self.population.stalest:
                open.late += 1
                flight.given_up = True
            if flight.stage == "held":
                if flight.given_up:
                    self._count(open, flight)
                    del progress.flights[client]
                else:
                    flight.stage, flight.at = "sending", progress.clock

    # ---- what -------------------------------------------------------------------------------------------------------
    def _requests(
        self, progress: Progress, open: Open, clients: Sequence[int]
    ) -> Iterator[tuple[Request, Payload | None]]:
        """Write one message per audience; under delta coding, one more for those who missed the last message.

        Yields with each request what the device hears, where the method wants to know it of a late answer.
        """
        delta = self.site.codec_down.needs_reference
        for client in clients:
            card = self.site.cards[client]
            audience = self.method.audience(card, progress.state)
            name = repr(audience)
            reference = None
            if delta and name in progress.told:
                last_round, message = progress.told[name]
                reference = message if progress.heard.get(client) == (last_round, name) else None
            place = (audience, reference is not None)
            if place not in open.bodies:
                knowledge = self.method.broadcast(progress.state, card)
                body, bundle = write_request(
                    self.site, self.run, open.number, knowledge, progress.state.asked, open.ask, reference
                )
                received = self.site.codec_down.roundtrip(bundle) if delta or self._remembers else bundle
                if delta:
                    open.told[name] = (open.number, received)
                assert isinstance(received, Bundle)
                heard = self.site.widen(received.parts["knowledge"]) if self._remembers else None
                open.bodies[place] = (body, heard)
            body, heard = open.bodies[place]
            holds = progress.answers_kept.get(client, (-1, None))[0]
            yield Request(client, open.number, body, holds), heard

    def _audience(self, progress: Progress, client: int) -> str:
        return repr(self.method.audience(self.site.cards[client], progress.state))

    def _accept(self, progress: Progress, open: Open, flight: Flight, body: bytes) -> Answer | None:
        """Validate one upload; None is an abstention.

        Raises:
            PayloadError: the upload is refused; the round goes on without it.
        """
        client, round = flight.request.client, flight.request.round
        if client in open.accepted:
            raise PayloadError("duplicate", f"device {client} has answered round {round} already")
        card = self.site.cards[client]
        codec = self.site.codec_up
        ask, ids = (open.ask, open.ask_ids) if round == open.number else self._asked_before(round)
        expected = Envelope(run=self.run, round=round, sender=client, proxy=self.site.proxy_identity, ids=ids)
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
        # What a device says of its number of records is its word alone: it buys a bounded weight.
        examples = min(envelope.examples, self.population.examples_cap)
        answer = Answer(card=card, payload=self.site.widen(payload), examples=examples)
        if round == open.number:
            return answer
        answer = replace(answer, weight=self.population.staleness.weight(open.number - round))
        if flight.heard is None:
            return answer
        return self.method.catch_up(answer, flight.heard, progress.state, Tools(self.site, open.number, open.ask))

    def _close(self, progress: Progress, open: Open) -> str | None:
        """Turn the answers into knowledge and teach; return why the round failed, if it did."""
        progress.told.update(open.told)
        progress.state = replace(progress.state, round=open.number + 1)
        if self.method.upload is Nothing:
            return None
        if open.failed is not None:
            return open.failed
        minimum = self.population.minimum
        # Under a secret cohort a failed round would tell how many took part.
        if len(open.accepted) < minimum and not self.site.mechanism.secret_cohort:
            return f"{len(open.accepted)} answers, at least {minimum} are needed; the server stays as it was"
        answers: Answers
        try:
            answers = open.accepted if open.sum is None else open.sum.close()
            answers, ask = self.site.mechanism.combine(answers, open.ask, run=self.run, round=open.number)
            answers, memory = self.experiment.aggregator.combine(answers, progress.state.memory, len(self.site.cards))
        except (NothingReleased, SecureSumError) as cause:
            return str(cause)
        progress.state = replace(progress.state, memory=memory)
        tools = Tools(self.site, open.number, ask, open.drawn, sorted(open.heard), self._scratch)
        knowledge = self.method.aggregate(answers, progress.state, tools)
        state = replace(progress.state, knowledge=knowledge, asked=ask)
        progress.state = self.method.update(state, knowledge, tools)
        return None

    # ---- evaluation -------------------------------------------------------------------------------------------------
    @cached_property
    def evaluated(self) -> tuple[int, ...]:
        """The devices whose models are looked at: all, or the sample that the experiment asks for."""
        count, sample = len(self.site.cards), self.experiment.evaluation.clients_sample
        if sample is None or sample >= count:
            return tuple(range(count))
        rng = numpy_rng(self.experiment.seed, "evaluated devices")
        return tuple(int(k) for k in np.sort(rng.choice(count, size=sample, replace=False)))

    def _evaluate(self, progress: Progress, round: int) -> dict[str, Any]:
        evaluation, last = self.experiment.evaluation, round + 1 == self.experiment.rounds
        found: dict[str, Any] = {"student_accuracy": None, "clients_accuracy": None, "ensemble_accuracy": None}
        if "student" in progress.state.models and (last or (round + 1) % evaluation.every == 0):
            found["student_accuracy"] = float(self.student_correct(progress.state).sum() / len(self.site.test))
        due = evaluation.clients_every is not None and (round + 1) % evaluation.clients_every == 0
        if due or last:
            seen = self.inspect(progress.state)
            if seen is not None:
                known = dict(zip(self.evaluated, seen.correct.sum(1) / len(self.site.test), strict=True))
                found["clients_accuracy"] = [
                    float(known[k]) if k in known else None for k in range(len(self.site.cards))
                ]
                found["ensemble_accuracy"] = self.ensemble_accuracy(seen)
        return found

    def inspect(self, state: ServerState) -> Inspection | None:
        """Look at the models of :attr:`evaluated`; where devices keep none, at the server's that they would adopt."""
        if self._seen is None or self._seen[0] != state.round:
            self._seen = state.round, self._inspect(state)
        return self._seen[1]

    def _inspect(self, state: ServerState) -> Inspection | None:
        if "model" not in self.method.keeps and "student" in state.models:
            correct = np.tile(self.student_correct(state), (len(self.evaluated), 1))
            return Inspection(correct, self.student_probabilities(state))
        return self.runner.inspect(self.evaluated, state.round)

    def ensemble_accuracy(self, seen: Inspection) -> float:
        """Accuracy of the mean of the probabilities of the devices looked at."""
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
