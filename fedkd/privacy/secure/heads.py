"""The first bytes of every message of a secure sum: what it is, who speaks, and of which session. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import struct

from fedkd.envelope import PayloadError

KEYS, DEAL, RELAY, MASKED, UNMASK = range(1, 6)
STEPS = {KEYS: "keys", DEAL: "deal", RELAY: "relay", MASKED: "masked", UNMASK: "unmask"}
SERVER = -1

MAGIC = b"FKS\x01"
HEAD = struct.Struct("<4sBq16s")  # magic, step, sender, session


class SecureSumError(PayloadError):
    """A message or a state that the protocol refuses; the session of the round, or one device's part in it, ends."""

    def __init__(self, message: str) -> None:
        super().__init__("secure", message)


def session_id(run: str, round: int) -> bytes:
    """Return the 16 bytes that bind messages and keys to a run's round."""
    return hashlib.sha256(json.dumps([run, round]).encode()).digest()[:16]


def is_message(body: bytes) -> bool:
    """Tell whether a body belongs to this protocol."""
    return body[:4] == MAGIC


def write(step: int, sender: int, session: bytes, rows: bytes = b"") -> bytes:
    """Return a message."""
    return HEAD.pack(MAGIC, step, sender, session) + rows


def read_step(body: bytes) -> int:
    """Return the step that a message belongs to.

    Raises:
        SecureSumError: no message of this protocol.
    """
    if len(body) < HEAD.size or not is_message(body) or body[4] not in STEPS:
        raise SecureSumError("expected a message of the secure sum, got other bytes")
    return body[4]


def read(body: bytes, step: int, sender: int, session: bytes) -> bytes:
    """Return the rows of a message that must come from ``sender``, in ``step`` of ``session``.

    Raises:
        SecureSumError: naming what differs.
    """
    got = read_step(body)
    _, _, who, which = HEAD.unpack_from(body)
    if got != step:
        raise SecureSumError(f"expected a message of step {STEPS[step]!r}, got {STEPS[got]!r}")
    if who != sender:
        raise SecureSumError(f"expected a message of party {sender}, it claims to be of {who}")
    if which != session:
        raise SecureSumError("the message belongs to another run or round")
    return body[HEAD.size :]
