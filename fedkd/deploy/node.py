"""The lean node: one process that asks the server for work, does it, and sends the answer.

It speaks to the same SuperLink with the same keys as Flower's SuperNode, but starts no other process, runs no code that a
server sends, and keeps models and unsent answers on its own disk. It never gives up: whatever goes wrong on the way to
the server is logged once and tried again.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from fedkd.deploy.kit import ClientKit
from fedkd.deploy.link import Link, LinkError, reply_to
from fedkd.deploy.mail import Ask, MailError, Say, pack_say, unpack_ask
from fedkd.errors import FedkdError
from fedkd.storage import StorageError, write_json

log = logging.getLogger("fedkd.deploy.client")

NODE, USAGE = "node.json", "usage.json"
LIVE_SECONDS = 120.0
"""A run counts as live for so long after its last message, and is polled for at the shortest interval."""
QUICK_SECONDS = 0.05
"""The pause after a piece of work: more is likely to follow."""
GROWTH = 1.5
RETRY_SECONDS = (0.5, 20.0)
PUSH_TRIES = 5
OVERHEAD_BYTES = 2**20


class Answerer(Protocol):
    """Who answers requests: :class:`fedkd.deploy.device.Device`."""

    delivered: set[str]

    def handle(self, ask: Ask) -> Say: ...


@dataclass
class Counters:
    """What a node has done since it started."""

    answered: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    work_seconds: float = 0.0


class Usage:
    """Bytes of the UTC day, kept on disk, so that a restart does not grant a new day's worth."""

    def __init__(self, path: Path, most: int, today: Callable[[], str] = lambda: datetime.now(UTC).date().isoformat()):
        self.path, self.most, self._today = path, most, today
        self.day, self.bytes = today(), 0
        try:
            told = json.loads(path.read_text())
            if told["day"] == self.day:
                self.bytes = int(told["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def add(self, count: int) -> None:
        """Count bytes that came or went."""
        if self._today() != self.day:
            self.day, self.bytes = self._today(), 0
        self.bytes += count
        try:
            write_json(self.path, {"day": self.day, "bytes": self.bytes})
        except StorageError as cause:
            log.warning("%s", cause)

    @property
    def left(self) -> int:
        """Bytes that may still come or go today."""
        return self.most if self._today() != self.day else max(0, self.most - self.bytes)


class Node:
    """See the module text."""

    def __init__(
        self,
        kit: ClientKit,
        device: Answerer,
        *,
        max_request_bytes: int,
        max_bytes_per_day: int,
        link: Link | None = None,
    ) -> None:
        self.kit, self.device = kit, device
        self.key = kit.node_key()
        self.link = link if link is not None else Link(kit.server_address, kit.tls(), self.key, self._known_number())
        self.usage = Usage(kit.state / USAGE, max_bytes_per_day)
        self.most_bytes = 2 * max_request_bytes + OVERHEAD_BYTES  # a request and a proxy set, and Flower's own words
        self.counters = Counters()
        self.stop = threading.Event()
        self.trouble = ""
        """Why the server could not be reached last, empty once it answers."""

    def _known_number(self) -> int | None:
        try:
            told = json.loads((self.kit.state / NODE).read_text())
            return int(told["node"]) if told["key"] == self._name else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def _name(self) -> str:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def run(self) -> None:
        """Work until :attr:`stop` is set."""
        try:
            self._run()
        except KeyboardInterrupt:
            if not self.stop.is_set():
                raise

    def _run(self) -> None:
        self._connect()
        least, most = self.kit.poll.min_seconds, self.kit.poll.max_seconds
        pause, heard = least, time.monotonic()
        while not self.stop.is_set():
            if self.usage.left == 0:
                log.warning("this node has used its %d bytes of today: it goes on tomorrow (UTC)", self.usage.most)
                self.stop.wait(60.0)
                continue
            began = time.monotonic()
            try:
                worked = self.step()
            except LinkError as cause:
                log.warning("%s", cause)
                self._connect()
                continue
            now = time.monotonic()
            if worked:
                pause, heard = min(least, QUICK_SECONDS), now
                continue
            # The gate holds a question while there is no work; that time counts.
            self.stop.wait(max(0.0, pause - (now - began)))
            pause = min(most if now - heard > LIVE_SECONDS else least, pause * GROWTH)

    def ask_to_stop(self) -> None:
        """Let :meth:`run` come to its end, at once if it only waits for work. For the main thread's signal handlers."""
        self.stop.set()
        if self.link.idle:
            raise KeyboardInterrupt

    def step(self) -> bool:
        """Do one piece of work; returns whether there was one.

        Raises:
            LinkError: the server cannot be reached.
        """
        try:
            came = self.link.pull(min(self.most_bytes, self.usage.left))
        except (MailError, LinkError) as cause:
            # What came of it counts too, or a server could send what is dropped without end.
            self._count_in(self.link.pulled)
            if isinstance(cause, LinkError):
                raise
            log.warning("a message was dropped: %s", cause)
            return True
        if came is None:
            return False
        message, size = came
        self._count_in(size)
        try:
            ask = unpack_ask(message.content)
        except (MailError, ValueError) as cause:
            log.warning("a message was dropped: %s", cause)
            return True
        began = time.monotonic()
        say = self.device.handle(ask)
        self.counters.work_seconds += time.monotonic() - began
        if say.kind == "refused":
            self.counters.refused += 1
        self._send(lambda: reply_to(message, pack_say(say, self.key)), say)
        return True

    def _count_in(self, size: int) -> None:
        if size:
            self.counters.bytes_in += size
            self.usage.add(size)

    def _send(self, make: Callable[[], Any], say: Say) -> None:
        for attempt in range(PUSH_TRIES):
            try:
                wanted, sent = self.link.push(make())
            except LinkError as cause:
                if cause.status in (403, 413) or attempt == PUSH_TRIES - 1:
                    # It stays in the outbox; the server asks again if it still wants it.
                    log.warning("the answer to round %d of %s was not sent: %s", say.round, say.run, cause)
                    return
                self.stop.wait(RETRY_SECONDS[0] * 2**attempt)
                continue
            self.counters.bytes_out += sent
            self.usage.add(sent)
            if say.kind == "answer" and wanted:
                self.counters.answered += 1
                self.device.delivered.add(say.key)
                log.info("round %d of %s answered (%d bytes)", say.round, say.run, sent)
            return

    def _connect(self) -> None:
        pause, self.trouble = RETRY_SECONDS[0], ""
        while not self.stop.is_set():
            try:
                number = self.link.connect()
            except LinkError as cause:
                if str(cause) != self.trouble:
                    self.trouble = str(cause)
                    log.warning("%s; trying on", cause)
                self.stop.wait(pause)
                pause = min(RETRY_SECONDS[1], 2 * pause)
                continue
            self.trouble = ""
            log.info("online as node %d", number)
            try:
                write_json(self.kit.state / NODE, {"node": number, "key": self._name})
            except FedkdError as cause:
                log.warning("%s", cause)
            return

    def close(self) -> None:
        """End the work and leave the server."""
        self.stop.set()
        self.link.close()
