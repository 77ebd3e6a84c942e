"""A server and devices that run the secure sum by hand, with drop-outs at any step; keeps the server's transcript."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedkd.privacy.secure.heads import session_id
from fedkd.privacy.secure.protocol import Collector, Session, Terms, residues


@dataclass
class Ran:
    """What a session left: the sum, who is in it, the server's state, the devices, and bytes by direction."""

    total: np.ndarray
    survivors: set[int]
    server: Collector
    devices: dict[int, Session]
    replies: dict[int, bytes]
    up: int = 0
    down: int = 0
    vectors: dict[int, np.ndarray] = field(default_factory=dict)


def run(
    vectors: Mapping[int, np.ndarray],
    terms: Terms,
    *,
    silent: Mapping[str, Collection[int]] | None = None,
    late: Sequence[int] = (),
) -> Ran:
    """``silent`` names the devices that fall silent at ``keys``, ``deal``, ``masked`` or ``unmask``; ``late`` ones send
    their vector to the server after it closed the step."""
    silent = silent or {}
    gone: set[int] = set()
    session = session_id("run", 0)
    server = Collector(terms, session)
    devices = {k: Session.open(session, k) for k in vectors}
    ran = Ran(np.zeros(0), set(), server, devices, {}, vectors=dict(vectors))

    def ask(step, clients, body_of, act, take):
        nonlocal gone
        gone |= set(silent.get(step, ()))
        for k in clients:
            body = body_of(k)
            ran.down += len(body)
            if k in gone:
                continue
            reply = act(k, body)
            ran.up += len(reply)
            take(k, reply)

    opening = server.opening()
    ask("keys", list(vectors), lambda k: opening, lambda k, b: devices[k].keys(), server.take_keys)
    roster = server.roster_message()
    ask("deal", sorted(server.roster), lambda k: roster, lambda k, b: devices[k].deal(b, terms), server.take_shares)
    ask(
        "relay",
        sorted(server.dealt),
        server.relay_message,
        lambda k, b: devices[k].relay(b, terms),
        server.take_ready,
    )

    def take(k, body):
        if k not in late:
            server.take_masked(k, body)
        else:
            ran.replies[-1 - k] = body

    ask(
        "masked",
        sorted(server.ready),
        lambda k: b"",
        lambda k, b: devices[k].masked(residues(vectors[k], terms.bits), terms),
        take,
    )
    names = server.survivors_message()
    ask(
        "unmask",
        sorted(server.vectors),
        lambda k: names,
        lambda k, b: devices[k].unmask(b, terms),
        lambda k, b: ran.replies.__setitem__(k, b),
    )
    ran.survivors = set(server.vectors)
    ran.total = server.total({k: b for k, b in ran.replies.items() if k >= 0})
    return ran
