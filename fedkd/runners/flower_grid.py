"""Blocks of requests as Flower messages, and asking them over a grid. Nothing here trains or opens files.

A message holds a short JSON text that says who is meant, and the bodies as raw bytes: Flower hashes and copies every
part of a record, and one array of uint8 costs it a fifth of the same bytes in a configuration record. What comes back
is checked before it is believed.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkd.errors import FedkdError
from fedkd.messages import Reply, Request

SWITCHES: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray warns of a coming change in how it hides accelerators from tasks that want none; say now what we want.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray starves its workers (priority 15) on a machine that does anything else: they take the priority of the run.
    "RAY_worker_niceness": "0",
}
"""No telemetry, no update check, nothing installed at run time. Flower reads them when it is imported."""

for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402

ACTION = "train.respond"
SECTION, BODIES, TEXT = "fedkd", "fedkd-bodies", "text"
MAX_REASON = 500
MAX_NODE_WAIT_SECONDS = 120.0


class GridError(FedkdError):
    """A message that breaks the form of this module, or nodes that do not come."""


# ---- messages -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Order:
    """A block of requests, and which experiment they belong to: a folder's name below the worker's root, and a hash."""

    run: str
    experiment: str
    requests: tuple[Request, ...]


def pack_order(order: Order) -> RecordDict:
    """Return a block as a Flower record. A body that several devices hear travels once."""
    places: dict[bytes, int] = {}
    rows = [(r.client, r.round, r.holds, places.setdefault(r.body, len(places))) for r in order.requests]
    return _record({"run": order.run, "experiment": order.experiment, "requests": rows}, dict(enumerate(places)))


def unpack_order(content: RecordDict) -> Order:
    """Undo :func:`pack_order`.

    Raises:
        GridError: the record has another form.
    """
    text, bodies = _open(content)
    try:
        rows = [(int(c), int(n), int(h), int(b)) for c, n, h, b in text["requests"]]
        # Devices of equal bodies share one object: the device procedure decodes it once for all of them.
        requests = tuple(Request(client, round, bodies[body], holds) for client, round, holds, body in rows)
        return Order(str(text["run"]), str(text["experiment"]), requests)
    except (KeyError, TypeError, ValueError) as cause:
        raise GridError(
            f"a request of unknown form came from the server ({cause!r}): run one version of fedkd"
        ) from cause


def pack_replies(replies: Sequence[Reply], notes: Sequence[str], *, reveal_losses: bool) -> RecordDict:
    """Return a block's replies as a Flower record. Training losses are private: they travel in a simulation alone."""
    rows = [(r.client, r.round, r.error, list(r.losses) if reveal_losses else []) for r in replies]
    return _record({"replies": rows, "notes": list(notes)}, {r.client: r.body for r in replies if r.body is not None})


def unpack_replies(content: RecordDict, asked: Sequence[Request]) -> tuple[list[Reply], list[str]]:
    """Return a reply for every request of the block, in its order, and the worker's notes.

    Raises:
        GridError: the record has another form.
    """
    text, bodies = _open(content)
    wanted = {request.client: request for request in asked}
    found: dict[int, Reply] = {}
    try:
        for client, round, error, losses in text["replies"]:
            if client not in wanted or round != wanted[client].round or client in found:
                continue
            body = bodies.get(client)
            reason = None if body is not None else str(error or "no answer")[:MAX_REASON]
            found[client] = Reply(client, round, body, reason, tuple((str(n), float(v)) for n, v in losses))
        notes = [str(note)[:MAX_REASON] for note in text["notes"]]
    except (KeyError, TypeError, ValueError) as cause:
        raise GridError(f"a reply of unknown form ({cause!r})") from cause
    missing = "the worker's reply leaves this device out"
    return [found.get(r.client) or Reply(r.client, r.round, None, missing) for r in asked], notes


def _record(text: Mapping[str, Any], bodies: Mapping[int, bytes]) -> RecordDict:
    arrays = {str(name): Array("uint8", (len(body),), SECTION, body) for name, body in bodies.items()}
    return RecordDict({SECTION: ConfigRecord({TEXT: json.dumps(text)}), BODIES: ArrayRecord(arrays)})


def _open(content: RecordDict) -> tuple[dict[str, Any], dict[int, bytes]]:
    try:
        text = json.loads(content.config_records[SECTION][TEXT])
        bodies = {int(name): bytes(array.data) for name, array in content.array_records[BODIES].items()}
    except (KeyError, TypeError, ValueError) as cause:
        raise GridError(f"a message without its {SECTION!r} part ({cause!r})") from cause
    if not isinstance(text, dict):
        raise GridError(f"a message whose {SECTION!r} part is no mapping")
    return text, bodies


# ---- asking ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Job:
    """A block, or a part of one that is asked again."""

    place: int
    requests: tuple[Request, ...]
    tries: int = 0
    due: float = 0.0


class Asker:
    """Sends blocks over a grid and gathers replies. Any node serves any block.

    Flower's own loop sleeps three seconds at a time and gives up on the first loss; this one polls shortly, keeps a
    bounded number of blocks in flight, and asks again what went down with a worker.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        stop: threading.Event | None = None,
        nodes_expected: int = 1,
        poll_seconds: float = 0.02,
        pause_seconds: float = 4.0,
        deadline_seconds: float = math.inf,
    ) -> None:
        """Bind the grid.

        Args:
            stop: set by whoever wants the run to end; asking then raises KeyboardInterrupt, as Ctrl-C does elsewhere.
            nodes_expected: nodes that must be there before anything is sent.
            pause_seconds: time for a new worker to come up before a block is sent again.
            deadline_seconds: time after which what is still out counts as unanswered.
        """
        self.grid = grid
        self.stop = stop if stop is not None else threading.Event()
        self.nodes_expected = nodes_expected
        self.poll_seconds, self.pause_seconds = poll_seconds, pause_seconds
        self.deadline_seconds = deadline_seconds
        self.notes: list[str] = []

    def nodes(self) -> list[int]:
        """Wait for nodes, and return their ids.

        Raises:
            GridError: too few come.
        """
        end = time.monotonic() + MAX_NODE_WAIT_SECONDS
        while len(ids := sorted(self.grid.get_node_ids())) < self.nodes_expected:
            if time.monotonic() > end:
                raise GridError(
                    f"{len(ids)} of {self.nodes_expected} Flower nodes came within {MAX_NODE_WAIT_SECONDS:.0f} s"
                )
            self._pause()
        return ids

    def ask(self, orders: Sequence[Order]) -> Iterator[Reply]:
        """Yield a reply for every request, block after block, so that results do not depend on who was faster."""
        nodes = self.nodes()
        jobs = deque(_Job(place, order.requests) for place, order in enumerate(orders))
        again: deque[_Job] = deque()
        waiting: dict[str, _Job] = {}
        left = [len(order.requests) for order in orders]
        gathered: dict[int, list[Reply]] = {place: [] for place in range(len(orders))}
        turn, shown, end = 0, 0, time.monotonic() + self.deadline_seconds

        def close(job: _Job, replies: Sequence[Reply]) -> None:
            gathered[job.place].extend(replies)
            left[job.place] -= len(job.requests)

        def fail(job: _Job, reason: str) -> None:
            close(job, [Reply(r.client, r.round, None, reason[:MAX_REASON]) for r in job.requests])

        def send(job: _Job) -> None:
            nonlocal turn
            order = orders[job.place]
            content = pack_order(Order(order.run, order.experiment, job.requests))
            message = Message(content, nodes[turn % len(nodes)], ACTION, group_id=str(job.requests[0].round))
            turn += 1
            # One push per message: of a refused one, one kind of grid returns None and another nothing at all.
            ids = [name for name in self.grid.push_messages([message]) if name]
            if ids:
                waiting[ids[0]] = job
            else:
                fail(job, "Flower did not accept the message")

        while jobs or waiting or again:
            while jobs and len(waiting) < len(nodes):
                send(jobs.popleft())
            # What may have killed its worker goes alone and last, so that it takes nobody else down.
            if again and not waiting and not jobs and again[0].due <= time.monotonic():
                send(again.popleft())
            pulled = list(self.grid.pull_messages(list(waiting))) if waiting else []
            # Now, not before: what a stopping engine breaks off must not be taken for a device's failure.
            self._check_stop()
            for message in pulled:
                answered = waiting.pop(message.metadata.reply_to_message_id, None)
                if answered is None:
                    continue
                if not message.has_error():
                    try:
                        replies, notes = unpack_replies(message.content, answered.requests)
                    except GridError as cause:
                        fail(answered, str(cause))
                        continue
                    self.notes.extend(note for note in notes if note not in self.notes)
                    close(answered, replies)
                elif message.error.code == ErrorCode.UNKNOWN and answered.tries < 1:
                    again.extend(self._retry(answered))
                else:
                    fail(answered, f"the worker failed (code {message.error.code}): {message.error.reason}")
            if time.monotonic() > end:
                for late in [*waiting.values(), *again, *jobs]:
                    fail(late, f"no answer within {self.deadline_seconds:g} s")
                for queue in (waiting, again, jobs):
                    queue.clear()
            while shown < len(orders) and left[shown] == 0:
                by_client = {reply.client: reply for reply in gathered.pop(shown)}
                yield from (by_client[request.client] for request in orders[shown].requests)
                shown += 1
            if (waiting or again) and not pulled:
                self._pause()

    def _retry(self, job: _Job) -> list[_Job]:
        """A worker was lost over this block, twice if Ray could repeat it: ask each device alone to find the culprit."""
        due = time.monotonic() + self.pause_seconds
        return [_Job(job.place, (request,), job.tries + 1, due) for request in job.requests]

    def _pause(self) -> None:
        self.stop.wait(self.poll_seconds)
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt("the run was stopped")
