"""A way to the gate for programs that show no client certificate, such as Flower's own `flower-supernode`.

It listens on the loopback and carries bytes over the kit's mutual TLS. Whoever may connect to this machine's loopback may
use it: the node key is still needed for anything, and the gate takes this client's alone. It speaks TLS on the loopback
too, because SuperNode signs nothing on a plain line, under a certificate that stands for 127.0.0.1 and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl

from fedkd.deploy import ca
from fedkd.deploy.gate import CHUNK_BYTES, listen
from fedkd.deploy.kit import LOOPBACK, ClientKit
from fedkd.deploy.log import event
from fedkd.errors import ConfigError
from fedkd.storage import write_atomic

CONNECT_SECONDS = 15.0
CONNECTIONS = 32
TRUSTED, PAIR = "tunnel.crt", "tunnel.pem"
"""Below the kit's state: what `flower-supernode --root-certificates` names, and what the tunnel shows it."""


def loopback_tls(kit: ClientKit) -> ssl.SSLContext:
    """Return what the tunnel speaks on the loopback; its certificate is made once and kept.

    Raises:
        ConfigError: the kept one is damaged. StorageError: none can be kept.
    """
    trusted, pair = kit.state / TRUSTED, kit.state / PAIR
    if not (trusted.exists() and pair.exists()):
        # The authority's key is forgotten at once: it has signed all that it ever will.
        authority, key = ca.Authority.new(f"tunnel of {kit.name}"[:64]), ca.new_key()
        leaf = authority.leaf("tunnel", key.public_key(), usage=ca.SERVER, hosts=(LOOPBACK,), days=ca.CA_DAYS)
        write_atomic(pair, ca.key_pem(key) + ca.certificate_pem(leaf), mode=0o600)
        write_atomic(trusted, ca.certificate_pem(authority.certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(pair)
    except (OSError, ssl.SSLError) as cause:
        raise ConfigError(f"cannot use {pair}: {cause}. Remove it and {trusted}; the tunnel makes new ones") from cause
    return context


class Tunnel:
    """Carries bytes until cancelled."""

    def __init__(self, kit: ClientKit, log: logging.Logger) -> None:
        self.kit, self.log = kit, log
        self._slots = asyncio.Semaphore(CONNECTIONS)

    async def serve(self, port: int) -> None:
        """Listen on ``port`` of the loopback."""
        tls = loopback_tls(self.kit)
        server = await asyncio.start_server(self._connection, sock=listen(LOOPBACK, port), ssl=tls)
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
