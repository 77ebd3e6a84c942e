"""Requests that are under way: from the moment a device is asked until its answer has reached the server or is lost.

What a device makes of a request depends on its own state, the request and the seed alone, not on when it is worked on.
So the round loop may let it wait, run many as one stack, and save those that have not run with a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fedkd.messages import Reply, Request
from fedkd.payloads import Payload, outline, rebuild

Stage = Literal["working", "sending", "lost", "held"]
"""working: it hears, trains and answers; sending: the answer is on its way; lost: the device will drop out; held: the
answer waits for the round to be closed, because it is to come late."""


@dataclass
class Flight:
    """One request under way.

    Attributes:
        stage, at: what it is doing, and the virtual second at which that ends.
        late: its answer comes only after the round that asked is closed.
        reply: the device's reply, once the work has been run.
        heard: what the device was told, where the method needs it to make use of a late answer.
        given_up: the server waits for it no more; the device does not know.
        lost_bytes: what had travelled up when the device dropped out.
    """

    request: Request
    stage: Stage
    at: float = 0.0
    late: bool = False
    reply: Reply | None = None
    heard: Payload | None = None
    given_up: bool = False
    lost_bytes: int = 0


def pack(flights: Iterable[Flight]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors of flights by name and the rest as plain data; what several share is stored once."""
    tensors: dict[str, Tensor] = {}
    notes = []
    places: dict[int, int] = {}

    def place(thing: object) -> int:
        return places.setdefault(id(thing), len(places))

    for flight in sorted(flights, key=lambda f: f.request.client):
        request, reply = flight.request, flight.reply
        body = f"body|{place(request.body)}"
        tensors[body] = _bytes(request.body)
        note: dict[str, Any] = {
            "client": request.client,
            "round": request.round,
            "holds": request.holds,
            "body": body,
            "stage": flight.stage,
            "at": flight.at,
            "late": flight.late,
            "given_up": flight.given_up,
            "lost_bytes": flight.lost_bytes,
        }
        if flight.heard is not None:
            prefix = f"heard|{place(flight.heard)}|"
            note["heard"] = {"name": prefix, "kinds": outline(flight.heard)}
            tensors |= {prefix + name: t for name, t in flight.heard.tensors().items()}
        if reply is not None:
            note["reply"] = {"error": reply.error, "losses": reply.losses, "body": None}
            if reply.body is not None:
                note["reply"]["body"] = f"reply|{request.client}"
                tensors[note["reply"]["body"]] = _bytes(reply.body)
        notes.append(note)
    return tensors, notes


def unpack(tensors: Mapping[str, Tensor], notes: Iterable[Mapping[str, Any]]) -> dict[int, Flight]:
    """Undo :func:`pack`; flights by client."""
    bodies: dict[str, bytes] = {}
    payloads: dict[str, Payload] = {}
    found = {}

    def body(name: str) -> bytes:
        # One object for all that share it: devices that were sent the very same bytes decode them once.
        if name not in bodies:
            bodies[name] = tensors[name].numpy().tobytes()
        return bodies[name]

    for note in notes:
        client, round = int(note["client"]), int(note["round"])
        heard = None
        if "heard" in note:
            prefix = note["heard"]["name"]
            if prefix not in payloads:
                mine = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                payloads[prefix] = rebuild(note["heard"]["kinds"], mine)
            heard = payloads[prefix]
        reply = None
        if "reply" in note:
            told = note["reply"]
            losses = tuple((str(name), float(value)) for name, value in told["losses"])
            answer = None if told["body"] is None else body(told["body"])
            reply = Reply(client, round, answer, told["error"], losses)
        found[client] = Flight(
            Request(client, round, body(note["body"]), int(note["holds"])),
            stage=note["stage"],
            at=float(note["at"]),
            late=bool(note["late"]),
            reply=reply,
            heard=heard,
            given_up=bool(note["given_up"]),
            lost_bytes=int(note["lost_bytes"]),
        )
    return found


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
