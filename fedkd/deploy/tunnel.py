"""A way to the gate for programs that show no client certificate, such as Flower's own `flower-supernode`.

It listens on the loopback, in plain HTTP, and carries bytes over the kit's mutual TLS. Whoever may connect to this
machine's loopback may use it: the node key is still needed for anything, and the gate takes this client's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl

from fedkd.deploy.gate import CHUNK_BYTES, listen
from fedkd.deploy.kit import LOOPBACK, ClientKit
from fedkd.deploy.log import event

CONNECT_SECONDS = 15.0
CONNECTIONS = 32


class Tunnel:
    """Carries bytes until cancelled."""

    def __init__(self, kit: ClientKit, log: logging.Logger) -> None:
        self.kit, self.log = kit, log
        self._slots = asyncio.Semaphore(CONNECTIONS)

    async def serve(self, port: int) -> None:
        """Listen on ``port`` of the loopback."""
        server = await asyncio.start_server(self._connection, sock=listen(LOOPBACK, port))
        event(self.log, "tunnel.open", port=port, server=self.kit.server_address)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._slots:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    # Read anew each time: a renewed certificate is used from the next connection on.
                    far_reader, far_writer = await asyncio.open_connection(
                        self.kit.server.host, self.kit.server.port, ssl=self.kit.tls()
                    )
            except (OSError, TimeoutError) as cause:
                event(self.log, "tunnel.unreachable", level=logging.WARNING, reason=str(cause) or type(cause).__name__)
                writer.transport.abort()
                return
            pumps = [asyncio.create_task(_pump(reader, far_writer)), asyncio.create_task(_pump(far_reader, writer))]
            try:
                # TLS has no half-closed connections: either end's end is the end.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
                for side in (writer, far_writer):
                    side.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


async def run(kit: ClientKit, port: int, log: logging.Logger) -> None:
    """Carry bytes until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tunnel, stopped = asyncio.create_task(Tunnel(kit, log).serve(port)), asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([tunnel, stopped], return_when=asyncio.FIRST_COMPLETED)
    tunnel.cancel()
    await asyncio.gather(tunnel, return_exceptions=True)
    for task in done - {stopped}:
        task.result()
