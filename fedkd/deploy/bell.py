"""A bell between a run and the gate: it tells which devices have mail, so that their questions need not be repeated.

A device that asks SuperLink for work several times a second costs more than the work, and one that asks seldom waits.
So the gate holds a device's question until the run rings for it, or for a few seconds. The bell is a datagram on the
loopback: one that is lost costs those seconds, one that nobody sent costs one empty question. Neither is more than a hint,
and what a device gets is SuperLink's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable

from fedkd.deploy.kit import LOOPBACK

DATAGRAM_BYTES = 1400


def ring(port: int, names: Iterable[str]) -> None:
    """Tell the gate that these clients have mail. Nobody may be listening."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        data = b""
        for word in (name.encode() + b"\n" for name in names):
            if data and len(data) + len(word) > DATAGRAM_BYTES:
                sender.sendto(data, (LOOPBACK, port))
                data = b""
            data += word
        sender.sendto(data, (LOOPBACK, port))


class Bell(asyncio.DatagramProtocol):
    """Hears who has mail. A client has some until SuperLink has said otherwise and nobody has rung since."""

    def __init__(self) -> None:
        self._notes: dict[str, _Note] = {}

    async def hear(self, port: int) -> asyncio.DatagramTransport:
        """Listen on ``port`` of the loopback.

        Raises:
            OSError: somebody else does.
        """
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, (LOOPBACK, port))
        return transport

    def datagram_received(self, data: bytes, addr: object) -> None:
        """Wake whoever is named."""
        for word in data.split(b"\n"):
            # Only those who have asked are known here, so that no stranger's datagram makes this grow.
            note = self._notes.get(word.decode("utf-8", "replace"))
            if note is not None:
                note.rings += 1
                note.mail.set()

    async def wait(self, name: str, seconds: float) -> int:
        """Wait until a client may have mail, for ``seconds`` at most; returns how often was rung for it."""
        note = self._notes.setdefault(name, _Note())
        note.waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(note.mail.wait(), seconds)
        finally:
            note.waiting -= 1
        return note.rings

    def waiting(self, name: str) -> bool:
        """Tell whether a question of this client is held."""
        return name in self._notes and self._notes[name].waiting > 0

    def nothing(self, name: str, rings: int) -> None:
        """Note that a client has no mail, unless somebody rang for it since :meth:`wait` said ``rings``."""
        note = self._notes[name]
        if note.rings == rings:
            note.mail.clear()


class _Note:
    def __init__(self) -> None:
        self.rings, self.waiting, self.mail = 0, 0, asyncio.Event()
        self.mail.set()
