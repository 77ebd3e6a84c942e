"""The server's side of a round on a real network: requests out, answers in, over Flower's grid.

Flower's own loop sleeps three seconds at a time, gives up on the first loss and waits for an upload that broke off. This
one polls shortly, follows every device by itself, asks again what was lost on the way, and lets a half-sent answer lie
without holding up the others. Who speaks is known twice: SuperLink authenticates the node, and every reply is signed by
the key that the server's kit has for the client.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedkd.deploy.config import DeploymentConfig
from fedkd.deploy.mail import MESSAGE_TYPE, Ask, MailError, Say, key_of, pack_ask, unpack_say
from fedkd.deploy.outline import pack_proxy
from fedkd.deploy.parcels import Arriving
from fedkd.deploy.sites import outline
from fedkd.messages import Reply, Request
from fedkd.privacy.secure.heads import is_message
from fedkd.runners.base import Inspection, Runner
from fedkd.site import Site

from flwr.app import Message  # isort: skip
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest  # isort: skip
from flwr.proto.runtime_pb2 import PullAppMessagesRequest  # isort: skip

log = logging.getLogger("fedkd.deploy.run.network")

POLL_SECONDS = (0.02, 0.2)
NODES_SECONDS = 1.0
BATCH_BYTES = 2**20
"""Requests that are shorter together are handed to SuperLink at once."""
TRIES = 2
"""A reply that cannot be believed is asked for once more: it may have been another's, sent to spoil this client's."""
MARGIN_SECONDS = 60.0


@dataclass(frozen=True)
class Member:
    """A client as the server's kit knows it. ``key``: its public node key; ``pem``: the same as Flower stores it."""

    id: int
    name: str
    key: Any
    pem: bytes


class Post(Protocol):
    """Carries messages to nodes and back."""

    def online(self) -> Mapping[bytes, int]:
        """Return the numbers of the nodes that are online, by public key (PEM)."""

    def send(self, letters: Sequence[tuple[int, Ask]], seconds: float) -> list[str | None]:
        """Send requests to nodes that are void after ``seconds``; returns their names, None for one that was not taken."""

    def collect(self, names: Sequence[str]) -> list[tuple[str, Message | MailError | None]]:
        """Return what has come to the requests of these names: a reply, why it is none, or None where it was lost."""


class GridPost(Post):
    """Over the grid of a ServerApp. Knows the insides of flwr 1.41's HttpGrid, because its own pull waits for stragglers.

    ``ring`` is called with the clients for whom a message lies ready.
    """

    def __init__(
        self, grid: Any, most_bytes: int, ring: Callable[[Collection[int]], None] = lambda clients: None
    ) -> None:
        self._grid, self._most, self._ring = grid, most_bytes, ring
        self._arriving: dict[str, Arriving] = {}

    def online(self) -> Mapping[bytes, int]:
        return {bytes(node.public_key): int(node.node_id) for node in self._grid.get_nodes()}

    def send(self, letters: Sequence[tuple[int, Ask]], seconds: float) -> list[str | None]:
        messages = [
            Message(pack_ask(ask), node, MESSAGE_TYPE, ttl=seconds, group_id=str(ask.round)) for node, ask in letters
        ]
        # An empty list: the request was longer than SuperLink takes.
        names = [name or None for name in self._grid.push_messages(messages)] or [None] * len(letters)
        self._ring({ask.client for (_, ask), name in zip(letters, names, strict=True) if name})
        return names

    def collect(self, names: Sequence[str]) -> list[tuple[str, Message | MailError | None]]:
        found: list[tuple[str, Message | MailError | None]] = []
        # What has begun to arrive was handed out by SuperLink already and is not listed again.
        new = [name for name in names if name not in self._arriving]
        if new:
            listed = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=new))
            for proto, tree in zip(listed.messages_list, listed.message_object_trees, strict=True):
                name = proto.metadata.reply_to_message_id
                if name not in new:
                    continue
                if proto.HasField("error"):
                    found.append((name, None))
                    continue
                try:
                    self._arriving[name] = Arriving.begin(proto, tree, self._most)
                except MailError as cause:
                    found.append((name, cause))
        for name in names:
            if name in self._arriving:
                done = self._fetch(self._arriving[name])
                if done is not None:
                    del self._arriving[name]
                    found.append((name, done if isinstance(done, Message | MailError) else None))
        return found

    def _fetch(self, arriving: Arriving) -> Message | MailError | bool | None:
        """Return the message once it is whole, False if it never will be, None while it is under way."""
        client, run = self._grid._runtime_client, self._grid.run.run_id
        for item in list(arriving.left):
            request = PullObjectRequest(node=self._grid.node, run_id=run, object_id=item)
            reply = client.PullObject(request)
            if not reply.object_found:
                return False
            if not reply.object_available:
                return None
            try:
                arriving.take(item, reply.object_content)
            except MailError as cause:
                return cause
        client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._grid.node, run_id=run, message_object_id=arriving.message_id)
        )
        try:
            return arriving.finish()
        except MailError as cause:
            return cause


@dataclass
class _Waiting:
    """One client's request in a round. ``out``: names of messages that may still bring its answer."""

    request: Request
    key: str
    out: set[str] = field(default_factory=set)
    probe: str | None = None
    probe_at: float = 0.0
    known: bool = False
    proxy: bool = False
    tries: int = 0
    again_at: float = 0.0
    offline_since: float | None = None


class NetworkRunner(Runner):
    """Asks real devices.

    Args:
        members: who may take part, by client number.
        post: carries the messages.
        revoked: returns who takes no part any more; they are not waited for.
        stop: set by whoever wants the run to end.
    """

    name = "network"

    def __init__(
        self,
        site: Site,
        post: Post,
        members: Mapping[int, Member],
        run: str,
        revoked: Callable[[], Collection[int]] = tuple,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.site, self.post, self.members, self.run = site, post, members, run
        self.settings: DeploymentConfig = site.experiment.deployment
        self.stop = stop if stop is not None else threading.Event()
        self.proxy = pack_proxy(site.proxy) if site.proxy is not None else None
        self.outline = outline(site, self.proxy)
        self.extra_bytes = 0
        self._clock, self._revoked = clock, revoked
        self._out: frozenset[int] = frozenset()
        self._online: Mapping[int, int] = {}
        self._looked = -1e9

    # ---- who is there -----------------------------------------------------------------------------------------------
    def online(self) -> Mapping[int, int]:
        """Return the nodes of the clients that are online."""
        if self._clock() - self._looked >= NODES_SECONDS:
            nodes = self.post.online()
            self._online = {m.id: nodes[m.pem] for m in self.members.values() if m.pem in nodes}
            self._out = frozenset(self._revoked())
            self._looked = self._clock()
        return self._online

    def wait_for(self, count: int) -> None:
        """Wait until ``count`` clients are online.

        Raises:
            MailError: they do not come in time.
        """
        end = self._clock() + self.settings.wait_seconds
        while len(self.online()) < count:
            if self._clock() > end:
                raise MailError(
                    "offline",
                    f"{len(self.online())} clients came online within {self.settings.wait_seconds:.0f} s, at least "
                    f"{count} are needed: start them by `fedkd client start`, then `fedkd run --resume`",
                )
            self._pause(POLL_SECONDS[1])

    # ---- a round ----------------------------------------------------------------------------------------------------
    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        waiting = {
            r.client: _Waiting(r, key_of(self.run, r.client, r.round, r.holds, self.outline, r.body)) for r in requests
        }
        asked, answered = len(waiting), 0
        # The keys and shares of a secure sum tell nothing of any record: the request of the round itself is what counts.
        costly = [request for request in requests if not is_message(request.body)]
        for round in sorted({request.round for request in costly}):
            self.site.mechanism.asked(self.run, round, [r.client for r in costly if r.round == round])
        end = self._clock() + self.settings.deadline_seconds
        pause = POLL_SECONDS[0]
        while waiting:
            self._send(waiting, end)
            moved = False
            names = {n: c for c, w in waiting.items() for n in w.out | ({w.probe} if w.probe else set())}
            for name, came in self.post.collect(list(names)) if names else []:
                client = names[name]
                if client not in waiting:
                    continue
                moved = True
                reply = self._hear(waiting[client], name, came)
                if reply is not None:
                    del waiting[client]
                    answered += reply.body is not None
                    yield reply
            for client, words in [(c, self._gone(w)) for c, w in waiting.items()]:
                if words:
                    request = waiting.pop(client).request
                    yield Reply(client, request.round, None, words, reason="offline")
            if waiting and (self._clock() > end or (answered and answered >= self.settings.quorum * asked)):
                for client, late in sorted(waiting.items()):
                    yield Reply(client, late.request.round, None, "no answer before the round ended", reason="late")
                return
            pause = POLL_SECONDS[0] if moved else min(POLL_SECONDS[1], 1.3 * pause)
            if waiting:
                self._pause(pause)

    def _send(self, waiting: Mapping[int, _Waiting], end: float) -> None:
        """Send what is due: requests to those who have none, and a probe to those who are silent."""
        online, now = self.online(), self._clock()
        seconds = max(1.0, end - now) + MARGIN_SECONDS
        asks, probes = list[tuple[int, _Waiting]](), list[tuple[int, _Waiting]]()
        for client, one in waiting.items():
            node = online.get(client)
            if node is None:
                one.offline_since = one.offline_since if one.offline_since is not None else now
                continue
            one.offline_since = None
            if now < one.again_at:
                continue
            if not one.out:
                asks.append((node, one))
            elif one.probe is None and now >= one.probe_at:
                probes.append((node, one))
        for part in self._parts(asks):
            names = self.post.send([(node, self._letter(one)) for node, one in part], seconds)
            for (_, one), name in zip(part, names, strict=True):
                if name is None:
                    one.again_at = now + POLL_SECONDS[1]
                    continue
                one.out.add(name)
                one.probe_at, one.known = now + self.settings.probe_seconds, False
        if probes:
            names = self.post.send([(node, self._probe(one)) for node, one in probes], seconds)
            for (_, one), name in zip(probes, names, strict=True):
                one.probe, one.probe_at = name, now + self.settings.probe_seconds

    def _parts(self, asks: Sequence[tuple[int, _Waiting]]) -> Iterator[list[tuple[int, _Waiting]]]:
        """Cut what is to be sent, so that the first devices need not wait until the last one's long request is out."""
        part, size = list[tuple[int, _Waiting]](), 0
        for node, one in asks:
            part.append((node, one))
            size += len(one.request.body) + (len(self.proxy or b"") if one.proxy else 0)
            if size >= BATCH_BYTES:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _probe(self, one: _Waiting) -> Ask:
        request = one.request
        return Ask(kind="probe", run=self.run, client=request.client, round=request.round, key=one.key)

    def _letter(self, one: _Waiting) -> Ask:
        request = one.request
        proxy = self.proxy if one.proxy else None
        self.extra_bytes += len(proxy or b"")
        return Ask(
            run=self.run,
            client=request.client,
            round=request.round,
            key=one.key,
            holds=request.holds,
            experiment=self.outline,
            request=request.body,
            proxy=proxy,
        )

    def _hear(self, one: _Waiting, name: str, came: Message | MailError | None) -> Reply | None:
        """Take what came to one message; returns the client's reply once there is one."""
        request, now = one.request, self._clock()
        probed = name == one.probe
        one.out.discard(name)
        if probed:
            one.probe = None
        if came is None:
            # Lost: SuperLink took the node for dead, or an upload broke off. It is asked again when it is there.
            one.again_at = now + POLL_SECONDS[1]
            return None
        try:
            if isinstance(came, MailError):
                raise came
            say = self._read(one, came)
        except MailError as cause:
            one.tries += 1
            if one.tries < TRIES:
                log.warning("client %d, round %d: %s; asked once more", request.client, request.round, cause)
                return None
            return Reply(request.client, request.round, None, str(cause), reason=cause.reason)
        if say.kind == "answer":
            return Reply(request.client, request.round, say.answer)
        if say.kind == "refused":
            return Reply(request.client, request.round, None, say.message, reason=say.reason or "device")
        if say.kind == "needs":
            if one.proxy or self.proxy is None:
                return Reply(
                    request.client, request.round, None, "the device does not keep the proxy set", reason="proxy"
                )
            one.proxy = True
        elif probed and (say.kind == "unknown" or one.known):
            # It does not know the request, or has answered it and the answer did not come: ask again.
            one.out.clear()
        elif probed:
            one.known = True
        return None

    def _read(self, one: _Waiting, message: Message) -> Say:
        request = one.request
        if not message.has_content():
            raise MailError("form", "a reply without content")
        try:
            say = unpack_say(message.content, self.members[request.client].key)
        except (ValueError, TypeError, AttributeError) as cause:
            raise MailError("form", f"a reply of unknown form ({cause})") from cause
        if say.client != request.client:
            raise MailError("identity", f"client {request.client} speaks as client {say.client}")
        if (say.run, say.round, say.key) != (self.run, request.round, one.key):
            raise MailError("round", f"an answer to round {say.round} of {say.run!r}, not to what was asked")
        return say

    def _gone(self, one: _Waiting) -> str:
        """Return why a client is not waited for any more; nothing if it is."""
        client, since = one.request.client, one.offline_since
        if client in self._out or client not in self.members:
            return f"client {client} was revoked"
        if since is not None and self._clock() - since > self.settings.offline_seconds:
            return f"client {client} was offline for {self.settings.offline_seconds:.0f} s"
        return ""

    def _pause(self, seconds: float) -> None:
        self.stop.wait(seconds)
        if self.stop.is_set():
            raise KeyboardInterrupt("the run was stopped")

    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        """Nobody looks into devices on a real network."""
        return None
