"""The only procedure of a device: hear, prepare, train, answer, release, send.

A block of devices goes through it together, so that an engine may stack them; a real device is a block of one.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedkd.algorithms.base import Card, DeviceState, Heard, Phase, View
from fedkd.engines.base import Engine, Task
from fedkd.errors import FedkdError, kind_of
from fedkd.messages import Heading, Reply, Request, read_request, write_reply
from fedkd.nets import PredictorNet
from fedkd.payloads import Nothing, Payload, PayloadError
from fedkd.predictors import learn, probabilities_of
from fedkd.privacy.dpsgd import train_private
from fedkd.privacy.mechanisms import Party
from fedkd.privacy.secure.exchange import take_part, write_masked
from fedkd.privacy.secure.heads import SecureSumError, is_message
from fedkd.records import Records, records
from fedkd.seeding import key
from fedkd.site import Site
from fedkd.store import Kept, Store

log = logging.getLogger(__name__)


@dataclass
class Turn:
    """One device's request on its way through the procedure."""

    request: Request
    card: Card
    kept: Kept
    heading: Heading
    task: Task
    answer: Payload | None = None
    refused: str | None = None
    error: str | None = None

    @property
    def party(self) -> Party:
        """Who asks the mechanism."""
        return Party(device=self.card.id, run=self.heading.run, round=self.heading.round)


@dataclass(frozen=True)
class _DeviceTools:
    site: Site
    card: Card
    round: int

    @property
    def proxies(self) -> int:
        """Return how many samples the proxy set has."""
        return 0 if self.site.proxy is None else len(self.site.proxy)

    @property
    def classes(self) -> int:
        """Return the number of classes."""
        return self.site.classes

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of floats in this run."""
        return self.site.dtype

    def seed(self, *labels: str | int) -> int:
        """Return the seed of this device's stream of this round that ``labels`` name."""
        return key(self.site.experiment.seed, "device", self.card.id, self.round, *labels)

    def initial(self, *labels: str | int) -> dict[str, torch.Tensor]:
        """Return fresh weights of the device's own architecture, different in every round and on every device."""
        return self.site.initial(self.card.architecture, "device", self.card.id, self.round, *labels)


def respond(site: Site, engine: Engine, store: Store, requests: Sequence[Request]) -> list[Reply]:
    """Let every device of ``requests`` work and answer; an error of one device stays with that device.

    The device's new state is stored before its reply is returned.
    """
    replies = {r.client: take_part(site, store, r) for r in requests if is_message(r.body)}
    turns, refused = begin(site, store, [request for request in requests if request.client not in replies])
    replies |= refused
    plans = _plans(site, turns)
    _admit(site, plans)
    for turn in _work(site, engine, store, turns, plans):
        replies[turn.request.client] = _reply(site, store, turn)
    return [replies[request.client] for request in requests]


def _work(site: Site, engine: Engine, store: Store, turns: list[Turn], plans: Plans) -> list[Turn]:
    """Let devices train and answer; one that fails says so, and the others are as if it had not been there."""
    try:
        _train(site, engine, plans)
        _answer(site, engine, turns)
    except Exception as cause:
        if len(turns) > 1:
            # Who of a block it was cannot be told from outside. What devices had before is still in the store.
            alone = [_again(site, store, turn) for turn in turns]
            return [done for turn in alone for done in _work(site, engine, store, [turn], _plans(site, [turn]))]
        (turn,) = turns
        turn.error = _sentence(site, turn, cause)
    return turns


def _again(site: Site, store: Store, turn: Turn) -> Turn:
    """Return a turn as it was before its device worked. What was charged for it stays charged, once."""
    ((fresh,), _) = begin(site, store, [turn.request])
    fresh.refused = turn.refused
    return fresh


def _sentence(site: Site, turn: Turn, cause: Exception) -> str:
    """Return what is said of an error that came after a device looked at its records."""
    level = logging.DEBUG if site.tells_why else logging.WARNING
    log.log(level, "device %d failed in round %d", turn.card.id, turn.heading.round, exc_info=cause)
    if not site.tells_why:
        return kind_of(cause)
    if isinstance(cause, FedkdError):
        return str(cause)
    return " ".join("".join(traceback.format_exception_only(cause)).split())


def begin(site: Site, store: Store, requests: Sequence[Request]) -> tuple[list[Turn], dict[int, Reply]]:
    """Let every device read its request and prepare; also return the replies of those that refuse theirs."""
    heads: dict[tuple[int, str], Heading | str] = {}
    shared: dict[tuple[str, str], Records] = {}
    replies: dict[int, Reply] = {}
    turns: list[Turn] = []
    for request in requests:
        card = site.cards[request.client]
        kept = store.load(request.client, request.round)
        # Devices that were sent the very same bytes decode them once: it is one machine that plays them.
        place = (id(request.body), card.architecture)
        if place not in heads or site.codec_down.needs_reference:
            try:
                heads[place] = read_request(site, card, request.body, kept.received)
            except PayloadError as cause:
                heads[place] = f"request refused ({cause.reason}): {cause}"
        head = heads[place]
        if isinstance(head, str):
            replies[request.client] = Reply(request.client, request.round, None, head)
            continue
        turns.append(_begin(site, card, request, kept, head, shared))
    return turns, replies


def _begin(
    site: Site, card: Card, request: Request, kept: Kept, head: Heading, shared: dict[tuple[str, str], Records]
) -> Turn:
    state = kept.state if kept.state is not None else site.new_device(card)
    if kept.state is not None and card.gradients and not set(site.method.roles) <= state.models.keys():
        # Roles that a device does not keep start as on a new device, should the server have no model to adopt.
        state = replace(state, models={**site.new_device(card).models, **state.models})
    heard = Heard(knowledge=head.knowledge, memory=state.memory, round=head.round, teach=torch.from_numpy(head.teach))
    if card.gradients:
        state = site.method.start(state, heard, _DeviceTools(site, card, head.round))
        heard = replace(heard, memory=state.memory)

    def part(indices: np.ndarray, ids: str) -> Records | None:
        if site.proxy_pool is None:
            return None
        name = ("proxy", ids)
        if name not in shared:
            shared[name] = records(site.proxy_pool, indices)
        return shared[name]

    task = Task(
        card, state, heard, site.private(card.id), part(head.teach, head.teach_ids), part(head.ask, head.ask_ids)
    )
    return Turn(request, card, kept, head, task)


Plans = list[tuple[tuple[Phase, ...], list[Turn]]]
"""Phases, and the devices that go through them side by side: those whose plans are equal in outline."""


def _plans(site: Site, turns: Sequence[Turn]) -> Plans:
    """Ask the method for the plans of all devices that have gradients."""
    members: dict[tuple[str, ...], tuple[tuple[Phase, ...], list[Turn]]] = {}
    known: dict[int, tuple[Phase, ...]] = {}
    for turn in turns:
        if not turn.card.gradients:
            continue
        heard = turn.task.heard
        # Devices without a memory that share a message have heard the same.
        plan = known.get(id(heard.knowledge)) if not heard.memory else None
        if plan is None:
            plan = site.method.plan(heard)
            if not heard.memory:
                known[id(heard.knowledge)] = plan
        outline = tuple(f"{p.name}/{p.data}/{p.settings}/{'+'.join(p.trains)}" for p in plan)
        members.setdefault(outline, (plan, []))[1].append(turn)
    return list(members.values())


def _admit(site: Site, plans: Plans) -> None:
    """Charge what devices are about to do, and note whom the mechanism refuses."""
    for plan, members in plans:
        refused = site.mechanism.admit(plan, [turn.party for turn in members])
        for turn in members:
            turn.refused = refused.get(turn.card.id)


def _train(site: Site, engine: Engine, plans: Plans) -> None:
    """Run the phases."""
    for plan, members in plans:
        for phase in plan:
            if phase.data == "private" and site.mechanism.trains:
                train_private(engine, phase, [turn.task for turn in members if turn.refused is None])
            else:
                engine.train(phase, [turn.task for turn in members])


def _answer(site: Site, engine: Engine, turns: Sequence[Turn]) -> None:
    speakers = [
        turn
        for turn in turns
        if turn.card.gradients
        and turn.refused is None
        and (len(turn.task.private) or site.method.upload is Nothing or site.mechanism.empty_answers)
    ]
    for turn, payload in zip(speakers, engine.answer([t.task for t in speakers]) if speakers else [], strict=True):
        turn.answer = payload
    for turn in turns:
        if not turn.card.gradients and (len(turn.task.private) or site.mechanism.empty_answers):
            try:
                turn.answer = _predict(site, turn)
            except Exception as cause:
                turn.error = _sentence(site, turn, cause)


def _predict(site: Site, turn: Turn) -> Payload:
    """Let a client without gradients learn and answer."""
    task = turn.task
    taught = None if task.teach is None else probabilities_of(turn.heading.knowledge)
    if taught is not None and task.teach is not None:
        # A learner is no tensors, so that what it learnt from is kept instead: it can be fitted again from that.
        task.state = replace(task.state, memory={"taught": taught, "proxy": torch.from_numpy(turn.heading.teach)})
    net = fit_predictor(site, turn.card, task.state.memory)
    public = None if task.ask is None else task.ask.all()[0]
    return site.method.answer(net, View(private=None, public=public, classes=site.classes), task.heard)


def fit_predictor(site: Site, card: Card, memory: Mapping[str, Tensor]) -> PredictorNet:
    """Let a client without gradients learn from its own records, and from the labels that it was last taught.

    Args:
        memory: what the device kept: ``taught`` [N, C], class probabilities, and ``proxy`` [N], the samples' positions.
    """
    predictor = site.architecture(card.architecture).build(key(site.experiment.seed, "predictor", card.id))
    x, y = site.private(card.id).all()
    assert y is not None
    public = None
    if "taught" in memory and site.proxy_pool is not None:
        public = records(site.proxy_pool, memory["proxy"].numpy()).all()[0].numpy()
    fitted = learn(predictor, (x.numpy(), y.numpy()), public, memory.get("taught"))
    return PredictorNet(fitted, site.classes, site.dtype)


def _reply(site: Site, store: Store, turn: Turn) -> Reply:
    """Return what goes up, or why nothing does. A disk that fails is no device's fault, and ends the run."""
    request = turn.request
    if turn.error is None:
        try:
            return _finish(site, store, turn)
        except PayloadError as cause:
            turn.error = f"answer refused ({cause.reason}): {_sentence(site, turn, cause)}"
        except FedkdError:
            raise
        except Exception as cause:
            turn.error = _sentence(site, turn, cause)
    return Reply(request.client, request.round, None, turn.error)


def _finish(site: Site, store: Store, turn: Turn) -> Reply:
    request, task, head = turn.request, turn.task, turn.heading
    payload = turn.answer if turn.answer is not None else Nothing()
    state = site.method.finish(task.state, payload, task.heard) if turn.card.gradients else task.state
    state = DeviceState(
        models={role: state.models[role] for role in site.method.keeps if role in state.models},
        optimizers=state.optimizers,
        memory=state.memory,
    )
    received = head.message if site.codec_down.needs_reference else None
    if turn.card.id in site.attackers:
        payload = site.experiment.attack.spoil(payload, seed=site.experiment.seed, round=head.round)
    weighs = site.method.weighted and not isinstance(payload, Nothing)
    examples = float(len(task.private)) if weighs else 1.0
    released = site.mechanism.release(payload, turn.party, examples=examples, losses=task.losses)
    if site.mechanism.sums_securely:
        try:
            masked = write_masked(site, store, turn.card, head, released)
        except SecureSumError as cause:
            return Reply(request.client, request.round, None, str(cause))
        store.save(request.client, request.round, Kept(state, received))
        return Reply(request.client, request.round, masked, losses=released.losses)
    try:
        reference = turn.kept.sent if turn.kept.sent_round == request.holds and request.holds >= 0 else None
        body = write_reply(site, turn.card, head, released, reference)
        sent = turn.kept.sent
        sent_round = turn.kept.sent_round
        if site.codec_up.needs_reference and not isinstance(payload, Nothing):
            sent, sent_round = site.codec_up.roundtrip(released.payload, reference), head.round
    except PayloadError as cause:
        said = f"answer cannot be encoded ({cause.reason}): {_sentence(site, turn, cause)}"
        return Reply(request.client, request.round, None, said)
    store.save(request.client, request.round, Kept(state, received, sent, sent_round))
    return Reply(request.client, request.round, body, losses=released.losses)
