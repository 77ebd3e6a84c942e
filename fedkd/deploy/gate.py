"""The gate: the only thing that a device reaches. It passes ten requests to SuperLink, and nothing else.

Flower's node authentication covers `/v1/fleet/*` only; whoever reaches the rest of SuperLink's port starts runs and
takes tasks. So SuperLink listens on loopback, and this stands before it:

Guarantee: a request goes further only if (1) the peer showed a certificate of this project's authority that is valid,
not revoked and names a listed client, (2) it is a POST whose target equals, byte for byte, one of
:data:`~fedkd.deploy.provision.FLEET_PATHS`, and (3) it carries the node key of that very client, once. Its head is written
anew from a short list of headers and its body is framed anew, so that no byte of a device is ever parsed by two parsers as a
head. Caps per message and per day hold while a body streams, whatever its header claimed.

A body that is longer than allowed, slower than allowed, or broken off never becomes a whole request on the inner side.

A device's question for work is held until a run rings for it (:mod:`fedkd.deploy.bell`) or :data:`HOLD_SECONDS` are over, and
is judged anew before it passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator
from email.utils import formatdate
from pathlib import Path

import h11

from fedkd.deploy.bell import Bell
from fedkd.deploy.kit import LOOPBACK, ServerKit
from fedkd.deploy.log import event, setup_log
from fedkd.deploy.members import MIB, Members, Peer, Usage
from fedkd.deploy.ops import GateMetrics, Ops
from fedkd.deploy.provision import FLEET_PATHS
from fedkd.errors import FedkdError
from fedkd.storage import StorageError

PATHS = frozenset(path.encode() for path in FLEET_PATHS)
FLEET = b"/v1/fleet/"
MEDIA_TYPE = b"application/protobuf"
PASSED_DOWN = (b"content-type", b"retry-after")
PASSED_UP = (b"flwr-signature", b"flwr-timestamp")
HEAD_BYTES = 16 * 2**10
CHUNK_BYTES = 2**18
REUSE_SECONDS = 3.0
"""SuperLink closes connections that were idle for 5 s; an older one is not used again."""
LINGER_SECONDS = 2.0
PULL = b"/v1/fleet/pull-messages"
HOLD_SECONDS = 5.0
REFUSALS_LOGGED_PER_SECOND = 20.0


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, reason: str, text: str, *, retry_seconds: int | None = None) -> None:
        super().__init__(text)
        self.status, self.reason, self.text, self.retry_seconds = status, reason, text, retry_seconds


class Gate:
    """Serves devices until cancelled."""

    def __init__(self, kit: ServerKit, log: logging.Logger, metrics: GateMetrics) -> None:
        self.kit, self.limits, self.log, self.metrics = kit, kit.limits, log, metrics
        self.members = Members(kit, log)
        self.usage = Usage(kit.state / "gate-usage.json", self.limits.client_mib_per_day * MIB)
        self.bell = Bell()
        self.hold_seconds = HOLD_SECONDS
        self.disk_low = False
        self.last_seen: dict[str, float] = {}
        self._tls, self._inner_tls = kit.gate_tls(), kit.loopback_tls()
        self._certificate = self._certificate_stamp()
        self._handshakes = 0
        self._open: dict[asyncio.Task[None], tuple[Peer, asyncio.StreamWriter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._log_tokens, self._log_time, self._unlogged = REFUSALS_LOGGED_PER_SECOND, time.monotonic(), 0

    # ---- connections ------------------------------------------------------------------------------------------------
    async def serve(self, listener: socket.socket) -> None:
        """Take connections from a listening socket."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    conn, address = await loop.sock_accept(listener)
                except OSError as cause:
                    # Out of file descriptors, most likely: those in use will come back.
                    event(self.log, "accept.failed", level=logging.ERROR, reason=str(cause))
                    await asyncio.sleep(0.5)
                    continue
                if self._handshakes >= self.limits.handshakes or len(self._open) >= self.limits.connections:
                    conn.close()
                    self._refused("crowded", address=address[0])
                    continue
                task = asyncio.create_task(self._connection(conn, address[0]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, conn: socket.socket, address: str) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=2 * CHUNK_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._handshakes += 1
        try:
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, conn, ssl=self._tls, ssl_handshake_timeout=self.limits.header_seconds
            )
        except (OSError, ssl.SSLError) as cause:
            conn.close()
            self._refused("handshake", address=address, why=_handshake_fault(cause))
            return
        finally:
            self._handshakes -= 1
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        inner = Inner(self.kit, self._inner_tls)
        task = asyncio.current_task()
        assert task is not None
        try:
            peer = Peer.of(transport.get_extra_info("peercert") or {})
            mine = sum(1 for other, _ in self._open.values() if other.name == peer.name)
            if mine >= self.limits.connections_per_client:
                self._refused("crowded", client=peer.name, address=address)
                return
            self._open[task] = (peer, writer)
            self.metrics.connections.set(len(self._open))
            await self._talk(peer, address, reader, writer, inner)
        except (OSError, ssl.SSLError, h11.RemoteProtocolError, TimeoutError, asyncio.IncompleteReadError):
            pass
        except ValueError as cause:
            self._refused("not_a_client", address=address, why=str(cause))
        except Exception:
            self.log.exception("connection.failed", extra={"data": {"address": address}})
        finally:
            self._open.pop(task, None)
            self.metrics.connections.set(len(self._open))
            inner.close()
            await _close(writer)

    async def _talk(
        self, peer: Peer, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, inner: Inner
    ) -> None:
        outer = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        while True:
            began = time.monotonic()
            action = "other"
            try:
                request = await self._head(outer, reader)
                if request is None:
                    return
                began = time.monotonic()
                if request.target in PATHS:
                    action = request.target.removeprefix(FLEET).decode()
                self._judge(peer, request)
                self.last_seen[peer.name] = time.time()
                rings = 0
                if request.target == PULL:
                    rings = await self.bell.wait(peer.name, self.hold_seconds)
                    if writer.transport.is_closing():
                        # A message that SuperLink gave out for it would be lost.
                        return
                    self._judge(peer, request)
                    began = time.monotonic()
                async with asyncio.timeout(self.limits.body_seconds):
                    status, size = await self._forward(peer, request, outer, reader, writer, inner)
                if request.target == PULL and status == 200 and not size:
                    self.bell.nothing(peer.name, rings)
            except Refused as cause:
                self.metrics.requests.labels(self._label(peer), action, cause.status).inc()
                self._refused(cause.reason, client=peer.name, address=address, status=cause.status)
                await self._answer(cause, outer, reader, writer)
                return
            except h11.RemoteProtocolError as cause:
                refusal = Refused(cause.error_status_hint, "malformed", f"malformed request: {cause}")
                self._refused("malformed", client=peer.name, address=address, why=str(cause))
                await self._answer(refusal, outer, reader, writer)
                return
            except TimeoutError:
                self._refused("slow", client=peer.name, address=address)
                return
            self.metrics.requests.labels(peer.name, action, status).inc()
            self.metrics.seconds.labels(action).observe(time.monotonic() - began)
            if outer.our_state is not h11.DONE or outer.their_state is not h11.DONE:
                return
            outer.start_next_cycle()

    async def _head(self, outer: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
        """Return the next request, None where the device closed or said nothing for long."""
        patience = self.limits.idle_seconds
        deadline: float | None = None
        while True:
            found = outer.next_event()
            if isinstance(found, h11.Request):
                return found
            if isinstance(found, h11.ConnectionClosed):
                return None
            if found is not h11.NEED_DATA:
                raise h11.RemoteProtocolError("unexpected data")
            left = patience if deadline is None else deadline - time.monotonic()
            try:
                data = await asyncio.wait_for(reader.read(CHUNK_BYTES), max(left, 0.0))
            except TimeoutError:
                if deadline is None:
                    return None
                raise Refused(408, "slow", "the head of the request took too long") from None
            if deadline is None:
                deadline = time.monotonic() + self.limits.header_seconds
            outer.receive_data(data)

    # ---- judging ----------------------------------------------------------------------------------------------------
    def _judge(self, peer: Peer, request: h11.Request) -> None:
        """Raise Refused unless the request may pass. Who speaks is settled before anything else is looked at."""
        reason = self.members.refusal(peer)
        if reason is not None:
            raise Refused(403, reason, f"this certificate is refused: {reason.replace('_', ' ')}")
        if request.target not in PATHS:
            if request.target == FLEET:
                raise Refused(405, "method", "here devices send POST requests")
            raise Refused(404, "path", "nothing here")
        if request.method != b"POST":
            raise Refused(405, "method", "POST only")
        names = [name for name, _ in request.headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise Refused(400, "framing", "give Content-Length or Transfer-Encoding, not both")
        keys = [value for name, value in request.headers if name == b"flwr-public-key"]
        if len(keys) != 1 or keys[0].decode("latin-1") != self.members.node_key(peer):
            raise Refused(403, "node_key", "the node key is not the one of this certificate's client")
        if any(names.count(name) > 1 for name in (b"content-length", *PASSED_UP)):
            raise Refused(400, "framing", "a header is given twice")
        size = next((int(value) for name, value in request.headers if name == b"content-length"), None)
        cap = self.limits.message_mib * MIB
        if size is not None and size > cap:
            raise Refused(413, "too_large", f"{size} bytes are more than the {cap} that one message may have")
        room = self.usage.room(peer.name)
        if room == 0 or (size is not None and size > room):
            raise self._day_is_full()
        if self.disk_low and request.target.startswith(FLEET + b"push-"):
            raise Refused(507, "disk", "the server's disk is nearly full", retry_seconds=60)

    def _day_is_full(self) -> Refused:
        limit = self.limits.client_mib_per_day
        return Refused(429, "day", f"the {limit} MiB of this day are spent", retry_seconds=Usage.seconds_left())

    # ---- passing on -------------------------------------------------------------------------------------------------
    async def _forward(
        self,
        peer: Peer,
        request: h11.Request,
        outer: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        inner: Inner,
    ) -> tuple[int, int]:
        """Pass a request to SuperLink and its answer back; returns the answer's status and the bytes of its body."""
        if outer.they_are_waiting_for_100_continue:
            writer.write(outer.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        try:
            await inner.begin(request, self.members.node_key(peer))
            sent = 0
            async for data in self._body(outer, reader):
                sent += len(data)
                if sent > self.limits.message_mib * MIB:
                    raise Refused(413, "too_large", "the message is longer than one message may be")
                if len(data) > self.usage.room(peer.name):
                    raise self._day_is_full()
                self.usage.add(peer.name, len(data))
                self.metrics.bytes.labels(peer.name, "up").inc(len(data))
                await inner.send(h11.Data(data=data))
            await inner.send(h11.EndOfMessage())
            response = await inner.response()
            headers = [(n, v) for n, v in response.headers if n in PASSED_DOWN]
            length = next((v for n, v in response.headers if n == b"content-length"), None)
            headers.append((b"content-length", length) if length is not None else (b"transfer-encoding", b"chunked"))
            headers.append((b"date", _date()))
        except (OSError, ssl.SSLError, h11.ProtocolError) as cause:
            inner.close()
            if isinstance(cause, h11.RemoteProtocolError) and outer.their_state is h11.ERROR:
                raise
            raise Refused(503, "superlink", "the server is starting, try again", retry_seconds=2) from cause
        except BaseException:
            inner.close()
            raise
        status, size = response.status_code, 0
        try:
            _write(writer, outer, h11.Response(status_code=status, headers=headers))
            async for data in inner.body():
                size += len(data)
                self.metrics.bytes.labels(peer.name, "down").inc(len(data))
                _write(writer, outer, h11.Data(data=data))
                await writer.drain()
            _write(writer, outer, h11.EndOfMessage())
            await writer.drain()
        except BaseException:
            inner.close()
            raise
        inner.end()
        return status, size

    async def _body(self, outer: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        while True:
            found = outer.next_event()
            if found is h11.NEED_DATA:
                outer.receive_data(await reader.read(CHUNK_BYTES))
            elif isinstance(found, h11.Data):
                yield bytes(found.data)
            else:
                return

    async def _answer(
        self, refusal: Refused, outer: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Say why in one line, and close. What is still under way is read for a moment, or the line would be lost."""
        if outer.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = (refusal.text + "\n").encode("ascii", "replace")
        headers = [
            (b"content-type", b"text/plain; charset=us-ascii"),
            (b"content-length", str(len(body)).encode()),
            (b"date", _date()),
            (b"connection", b"close"),
        ]
        if refusal.retry_seconds is not None:
            headers.append((b"retry-after", str(refusal.retry_seconds).encode()))
        with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
            _write(writer, outer, h11.Response(status_code=refusal.status, headers=headers))
            _write(writer, outer, h11.Data(data=body))
            _write(writer, outer, h11.EndOfMessage())
            async with asyncio.timeout(LINGER_SECONDS):
                await writer.drain()
                if outer.their_state is not h11.DONE:
                    while await reader.read(CHUNK_BYTES):
                        pass

    # ---- upkeep -----------------------------------------------------------------------------------------------------
    async def upkeep(self) -> None:
        """Every second: revocations, a renewed certificate, the disk, the counts of the day."""
        tick = 0
        while True:
            await asyncio.sleep(1.0)
            tick += 1
            if self.members.refresh():
                self._cut()
            self._renewed()
            self.look_at_disk()
            if tick % 10 == 0:
                self.save()

    def look_at_disk(self) -> None:
        """Note whether uploads still have room."""
        low = shutil.disk_usage(self.kit.state).free < self.limits.min_free_mib * MIB
        if low != self.disk_low:
            event(self.log, "disk.low" if low else "disk.fine", level=logging.ERROR if low else logging.INFO)
        self.disk_low = low

    def save(self) -> None:
        """Write the counts of the day."""
        try:
            self.usage.save()
        except StorageError as cause:
            event(self.log, "usage.unwritten", level=logging.ERROR, reason=str(cause))

    def _cut(self) -> None:
        """Close the connections of whoever may not speak any more."""
        for peer, writer in list(self._open.values()):
            reason = self.members.refusal(peer)
            if reason is not None:
                self._refused(reason, client=peer.name)
                writer.transport.abort()

    def _certificate_stamp(self) -> tuple[int, ...]:
        return tuple(self.kit.path(name).stat().st_mtime_ns for name in ("server.crt", "server.key"))

    def _renewed(self) -> None:
        with contextlib.suppress(OSError):
            stamp = self._certificate_stamp()
            if stamp != self._certificate:
                self._certificate = stamp
                try:
                    self._tls = self.kit.gate_tls()
                    event(self.log, "certificate.renewed")
                except FedkdError as cause:
                    event(self.log, "certificate.unusable", level=logging.ERROR, reason=str(cause))

    def _label(self, peer: Peer) -> str:
        """A name for metrics: strangers share one, so that they cannot make up series."""
        return peer.name if peer.name in self.members.names else "unknown"

    def _refused(self, reason: str, **data: object) -> None:
        """Count a refusal, and log it unless there are very many."""
        self.metrics.refused.labels(reason).inc()
        now = time.monotonic()
        self._log_tokens = min(
            REFUSALS_LOGGED_PER_SECOND, self._log_tokens + (now - self._log_time) * REFUSALS_LOGGED_PER_SECOND
        )
        self._log_time = now
        if self._log_tokens < 1:
            self._unlogged += 1
            return
        self._log_tokens -= 1
        if self._unlogged:
            data["not_logged_before"], self._unlogged = self._unlogged, 0
        event(self.log, "refused", level=logging.WARNING, reason=reason, **data)


class Inner:
    """One connection to SuperLink, opened when it is needed."""

    def __init__(self, kit: ServerKit, tls: ssl.SSLContext) -> None:
        self._port, self._tls = kit.control_port, tls
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._http = h11.Connection(h11.CLIENT)
        self._used = 0.0

    async def begin(self, request: h11.Request, node_key: str) -> None:
        """Send the head of a request, written anew."""
        if self._reader is None or self._reader.at_eof() or time.monotonic() - self._used > REUSE_SECONDS:
            self.close()
            self._reader, self._writer = await asyncio.open_connection(
                LOOPBACK, self._port, ssl=self._tls, server_hostname="localhost", limit=2 * CHUNK_BYTES
            )
            self._http = h11.Connection(h11.CLIENT)
        headers = [
            (b"host", b"localhost"),
            (b"content-type", MEDIA_TYPE),
            (b"accept", MEDIA_TYPE),
            (b"flwr-public-key", node_key.encode()),
            *((n, v) for n, v in request.headers if n in PASSED_UP),
        ]
        length = next((v for n, v in request.headers if n == b"content-length"), None)
        chunked = any(n == b"transfer-encoding" for n, _ in request.headers)
        headers.append((b"transfer-encoding", b"chunked") if chunked else (b"content-length", length or b"0"))
        await self.send(h11.Request(method=b"POST", target=request.target, headers=headers))

    async def send(self, what: h11.Event) -> None:
        """Send one part of the request."""
        assert self._writer is not None
        data = self._http.send(what)
        if data:
            self._writer.write(data)
            await self._writer.drain()

    async def response(self) -> h11.Response:
        """Return the head of the answer."""
        while True:
            found = await self._event()
            if isinstance(found, h11.Response):
                return found
            if not isinstance(found, h11.InformationalResponse):
                raise ConnectionError("SuperLink closed the connection")

    async def body(self) -> AsyncIterator[bytes]:
        """Return the body of the answer, part by part."""
        while isinstance(found := await self._event(), h11.Data):
            yield bytes(found.data)

    async def _event(self) -> object:
        assert self._reader is not None
        while (found := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(CHUNK_BYTES))
        return found

    def end(self) -> None:
        """Make ready for another request."""
        self._used = time.monotonic()
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()

    def close(self) -> None:
        """Close at once: a request that was not whole never becomes one."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None


def _write(writer: asyncio.StreamWriter, outer: h11.Connection, what: h11.Event) -> None:
    data = outer.send(what)
    if data:
        writer.write(data)


async def _close(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, ssl.SSLError, TimeoutError):
        writer.close()
        async with asyncio.timeout(LINGER_SECONDS):
            await writer.wait_closed()


def _date() -> bytes:
    return formatdate(usegmt=True).encode()


def _handshake_fault(cause: Exception) -> str:
    """Name what was wrong with a peer's handshake, without its bytes."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return str(cause.verify_message)
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return cause.reason.lower().replace("_", " ")
    return type(cause).__name__


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; '::' takes IPv4 too.

    Raises:
        FedkdError: the address is in use or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(
            (host, port), family=family, backlog=256, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6()
        )
    except OSError as cause:
        raise FedkdError(f"cannot listen on {host}:{port}: {cause.strerror or cause}") from cause
    listener.setblocking(False)
    return listener


async def run(kit: ServerKit, log: logging.Logger) -> None:
    """Serve devices (unless another gate does) and the loopback's health and metrics, until told to stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = GateMetrics()
    gate = Gate(kit, log, metrics)
    gate.look_at_disk()
    ops = Ops(kit, gate, metrics)
    tasks = [asyncio.create_task(gate.upkeep()), asyncio.create_task(ops.serve(listen(LOOPBACK, kit.ops_port)))]
    if kit.gate == "builtin":
        tasks.append(asyncio.create_task(gate.serve(listen(kit.listen, kit.port))))
    try:
        ringing = await gate.bell.hear(kit.ops_port)
    except OSError as cause:
        event(log, "bell.unheard", level=logging.ERROR, port=kit.ops_port, reason=str(cause))
        ringing, gate.hold_seconds = None, 0.0
    event(log, "gate.open", port=kit.port, gate=kit.gate, clients=len(gate.members.names))
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in [*tasks, stopped]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if ringing is not None:
        ringing.close()
    gate.save()
    event(log, "gate.closed")
    for task in done - {stopped}:
        task.result()


def main() -> None:
    """Run the gate of the kit named on the command line; the supervisor starts this."""
    kit = ServerKit.read(Path(sys.argv[1]))
    log = setup_log("gate", kit.state / "logs")
    try:
        asyncio.run(run(kit, log))
    except FedkdError as cause:
        event(log, "gate.failed", level=logging.ERROR, reason=str(cause))
        sys.exit(f"error: {cause}")


if __name__ == "__main__":
    main()
