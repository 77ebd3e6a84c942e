"""Secure sums inside a run: devices answer the protocol's messages, and the server's rounds walk through its steps.

The messages travel as bodies of ordinary requests and replies, so that any runner carries them, and their bytes are
counted like all others. A device's session lies in its store between two messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fedkd.algorithms.base import Card
from fedkd.collected import Collected
from fedkd.messages import Heading, Reply, Request
from fedkd.payloads import Integers
from fedkd.privacy.mechanisms import Released
from fedkd.privacy.secure.heads import DEAL, KEYS, RELAY, UNMASK, SecureSumError, is_message, read_step, session_id
from fedkd.privacy.secure.mechanism import SecureSum
from fedkd.privacy.secure.protocol import Collector, Session, residues
from fedkd.site import Site
from fedkd.store import Store

if TYPE_CHECKING:
    from fedkd.runners.base import Runner


# ---- the device -----------------------------------------------------------------------------------------------------
def take_part(site: Site, store: Store, request: Request) -> Reply:
    """Answer one message of the protocol on a device."""
    try:
        body = _step(site, store, request)
    except SecureSumError as cause:
        return Reply(request.client, request.round, None, f"secure sum refused: {cause}")
    return Reply(request.client, request.round, body)


def _step(site: Site, store: Store, request: Request) -> bytes:
    mechanism = site.mechanism
    if not isinstance(mechanism, SecureSum):
        raise SecureSumError("this device's experiment has no secure sum")
    terms, step = mechanism.terms, read_step(request.body)
    if step == KEYS:
        session = Session.answer_opening(request.body, request.client)
        body = session.keys()
    else:
        session = _held(store, request.client)
        if step == DEAL:
            body = session.deal(request.body, terms)
        elif step == RELAY:
            body = session.relay(request.body, terms)
        elif step == UNMASK:
            body = session.unmask(request.body, terms)
        else:
            raise SecureSumError("a device does not take masked vectors")
    # Kept before the answer leaves: a step that was answered is not answered again after a crash.
    store.save_session(request.client, None if step == UNMASK else session.dump())
    return body


def write_masked(site: Site, store: Store, card: Card, heading: Heading, released: Released) -> bytes:
    """Return the message up of a round with a secure sum: the released vector behind its masks.

    Raises:
        TypeError: what is handed in was not released, or is no vector.
        SecureSumError: the device has no session for this round, or has given a vector for it before: nothing leaves.
    """
    if type(released) is not Released:
        raise TypeError(f"only what a mechanism released may be sent, got a {type(released).__name__}")
    mechanism = site.mechanism
    assert isinstance(mechanism, SecureSum)
    if not isinstance(released.payload, Integers):
        raise SecureSumError("the device has nothing to add to the sum, and drops out of it")
    session = _held(store, card.id)
    if session.id != session_id(heading.run, heading.round):
        raise SecureSumError("the device has no session for this round")
    # Two sums of one round over two sets of devices differ by single vectors.
    if heading.round <= store.last_summed(card.id, heading.run):
        raise SecureSumError("the device has given its vector for this round, or for a later one, already")
    store.save_summed(card.id, heading.run, heading.round)
    body = session.masked(residues(released.payload.values.numpy(), mechanism.terms.bits), mechanism.terms)
    store.save_session(card.id, session.dump())
    return body


def _held(store: Store, client: int) -> Session:
    data = store.load_session(client)
    if data is None:
        raise SecureSumError("the device holds no session: none was opened, or it has ended")
    return Session.load(data)


# ---- the server -----------------------------------------------------------------------------------------------------
class SecureRound:
    """The server's walk through one session. ``up`` and ``down`` count the bytes of its messages.

    ``late``, ``offline``: devices of which nothing came in a step before their vectors. ``refused``: why others are out.
    """

    def __init__(self, mechanism: SecureSum, runner: Runner, run: str, round: int) -> None:
        self.mechanism, self.runner, self.round = mechanism, runner, round
        self.collector = Collector(mechanism.terms, session_id(run, round))
        self.up = self.down = 0
        self.refused: dict[int, str] = {}
        self.late: set[int] = set()
        self.offline: set[int] = set()

    def gather(self, clients: Sequence[int]) -> list[int]:
        """Exchange keys and shares; return the devices that are ready to send a vector.

        Raises:
            SecureSumError: too few devices are left.
        """
        collector = self.collector
        opening = collector.opening()
        self._ask(clients, lambda k: opening, collector.take_keys)
        roster = collector.roster_message()
        self._ask(sorted(collector.roster), lambda k: roster, collector.take_shares)
        self._ask(sorted(collector.dealt), collector.relay_message, collector.take_ready)
        return sorted(collector.ready)

    def take(self, client: int, body: bytes) -> None:
        """Take a device's masked vector."""
        if not is_message(body):
            raise SecureSumError(f"device {client} sent an answer in the clear: it is not looked at")
        self.collector.take_masked(client, body)

    def close(self) -> Collected:
        """Take the masks off the sum, and return the answer that it stands for.

        Raises:
            SecureSumError: too few devices are left.
        """
        replies: dict[int, bytes] = {}
        names = self.collector.survivors_message()
        self._ask(sorted(self.collector.vectors), lambda k: names, replies.__setitem__)
        return self.mechanism.answer(self.collector.total(replies), len(self.collector.vectors))

    def _ask(self, clients: Iterable[int], body: Callable[[int], bytes], take: Callable[[int, bytes], object]) -> None:
        requests = [Request(client, self.round, body(client)) for client in clients]
        self.down += sum(request.bytes for request in requests)
        for reply in self.runner.ask(requests):
            if reply.body is None:
                self._miss(reply)
                continue
            self.up += len(reply.body)
            try:
                take(reply.client, reply.body)
            except SecureSumError as cause:
                self.refused[reply.client] = str(cause)

    def _miss(self, reply: Reply) -> None:
        if reply.reason not in ("late", "offline"):
            self.refused[reply.client] = reply.error or "no answer"
        elif reply.client not in self.collector.vectors:
            # Whoever is lost after that is in the sum all the same.
            (self.late if reply.reason == "late" else self.offline).add(reply.client)
