"""The gate against a stand-in for SuperLink that keeps every byte it gets: what passes, what does not, and what it costs."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from devices import connected, exchange, make_kits, own_ports, receive, request, status_of, strangers, until

from fedkd.deploy.bell import Bell, ring
from fedkd.deploy.gate import Gate, listen
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.log import setup_log
from fedkd.deploy.members import MIB
from fedkd.deploy.ops import GateMetrics
from fedkd.deploy.provision import FLEET_PATHS, renew, revoke

LIMITS = (
    "{message_mib: 1, client_mib_per_day: 4, connections_per_client: 3, header_seconds: 1, body_seconds: 3, "
    "idle_seconds: 20, min_free_mib: 0}"
)


class Stand:
    """Answers every request with 200 and what it was sent, and keeps the raw bytes."""

    def __init__(self, kit: ServerKit) -> None:
        self.received = bytearray()
        self.bodies: list[bytes] = []
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(kit.path("loopback.crt"), kit.path("loopback.key"))
        self.port = kit.control_port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import h11

        http = h11.Connection(h11.SERVER)
        try:
            while True:
                body = b""
                while True:
                    found = http.next_event()
                    if found is h11.NEED_DATA:
                        data = await reader.read(65536)
                        self.received += data
                        http.receive_data(data)
                    elif isinstance(found, h11.Data):
                        body += found.data
                    elif isinstance(found, h11.EndOfMessage):
                        break
                    elif isinstance(found, h11.ConnectionClosed):
                        return
                self.bodies.append(body)
                head = h11.Response(status_code=200, headers=[("content-length", str(len(body))), ("server", "secret")])
                for part in (head, h11.Data(data=body), h11.EndOfMessage()):
                    writer.write(http.send(part) or b"")
                await writer.drain()
                http.start_next_cycle()
        except (OSError, h11.RemoteProtocolError):
            pass
        finally:
            writer.close()

    @property
    def heads(self) -> list[str]:
        """The first line of every request that arrived."""
        return [line for line in bytes(self.received).decode("latin-1").split("\r\n") if line.endswith(" HTTP/1.1")]


class World:
    """A gate before a stand-in, in a thread of its own."""

    def __init__(self, kits: Path) -> None:
        self.kits, self.kit = kits, ServerKit.read(kits / "server")
        self.log_folder = kits / "logs"
        self.stand: Stand
        self.gate: Gate
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.metrics = GateMetrics()
        self.stand = Stand(self.kit)
        self.gate = Gate(self.kit, setup_log("gate", self.log_folder), self.metrics)
        self.gate.hold_seconds = 0.0
        ringing = await self.gate.bell.hear(self.kit.ops_port)
        inner = await asyncio.start_server(self.stand.serve, "127.0.0.1", self.stand.port, ssl=self.stand.tls)
        tasks = [
            asyncio.create_task(self.gate.serve(listen("127.0.0.1", self.kit.port))),
            asyncio.create_task(self.gate.upkeep()),
        ]
        self._ready.set()
        await self._stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ringing.close()
        inner.close()

    def __enter__(self) -> World:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    def client(self, name: str = "hospital-a") -> ClientKit:
        return ClientKit.read(self.kits / name)

    def send(self, data: bytes, name: str = "hospital-a") -> bytes:
        return exchange(self.kit.port, self.client(name).tls(), data)

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("fedkd_gate_refused_total", {"reason": reason}) or 0.0

    def forget(self) -> None:
        self.stand.received.clear()
        self.stand.bodies.clear()
        self.gate.usage._sent.clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("gate"), limits=LIMITS)


@pytest.fixture(scope="module")
def shared(made: Path) -> Iterator[World]:
    with World(made) as world:
        yield world


@pytest.fixture
def world(shared: World) -> World:
    shared.forget()
    return shared


@contextmanager
def another(made: Path, folder: Path) -> Iterator[World]:
    """A world whose kits a test may change."""
    shutil.copytree(made.parent, folder / "copy")
    kits = folder / "copy" / "kits"
    own_ports(kits)
    # The gate that the others share may have saved what was sent through it.
    (kits / "server" / "state" / "gate-usage.json").unlink(missing_ok=True)
    with World(kits) as world:
        yield world


# ---- what passes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", FLEET_PATHS)
def test_what_devices_need_passes(world: World, path: str) -> None:
    answer = world.send(request(world.client(), path, body=b"payload"))
    assert status_of(answer) == 200 and answer.endswith(b"payload")
    assert world.stand.heads == [f"POST {path} HTTP/1.1"]


def test_the_head_is_written_anew(world: World) -> None:
    """Nothing of a device's head goes further but its node authentication."""
    headers = (
        "flwr-task-token: stolen",
        "flwr-superexec-signature: forged",
        "authorization: Bearer x",
        "x-forwarded-for: 127.0.0.1",
        "connection: keep-alive, flwr-public-key",
        "flwr-signature: c2ln",
        "flwr-timestamp: 2026-01-01",
    )
    answer = world.send(request(world.client(), body=b"x", headers=headers))
    names = {
        line.split(":")[0].lower() for line in bytes(world.stand.received).decode().split("\r\n")[1:] if ":" in line
    }
    assert names == {
        "host",
        "content-type",
        "accept",
        "flwr-public-key",
        "flwr-signature",
        "flwr-timestamp",
        "content-length",
    }
    assert b"secret" not in answer and b"date: " in answer.lower()


def test_chunked_bodies_and_kept_connections(world: World) -> None:
    kit = world.client()
    chunked = request(kit, headers=("transfer-encoding: chunked",)) + b"3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n"
    with connected(kit) as link:
        for _ in range(3):
            link.sendall(chunked)
            assert receive(link).endswith(b"abcdefg")
    assert world.stand.bodies == [b"abcdefg"] * 3


def test_a_large_body_arrives_whole(world: World) -> None:
    body = bytes(range(256)) * (MIB // 256)
    answer = world.send(request(world.client(), "/v1/fleet/push-object", body=body))
    assert world.stand.bodies == [body] and answer.endswith(body)


# ---- identity -------------------------------------------------------------------------------------------------------
@pytest.mark.fault(13, "the gate ends the connection, or answers 403 to an unlisted name; nothing reaches SuperLink")
@pytest.mark.parametrize(
    "kind", ["none", "another authority", "expired", "not yet valid", "unknown name", "the server's own"]
)
def test_fault_13_wrong_certificates_are_refused(world: World, kind: str) -> None:
    context = strangers(world.kits)[kind]
    try:
        answer = exchange(world.kit.port, context, request(world.client()))
    except OSError:
        answer = b""
    assert status_of(answer) in ((403,) if kind == "unknown name" else (0,))
    assert not world.stand.received


def test_a_device_without_tls_gets_nothing(world: World) -> None:
    try:
        answer = exchange(world.kit.port, None, request(world.client()))
    except OSError:
        answer = b""
    assert status_of(answer) == 0 and not world.stand.received


@pytest.mark.fault(14, "the gate answers 403 to a node key that is not the certificate's own")
@pytest.mark.parametrize("key", ["hospital-b", "", "junk", "twice", "both"])
def test_fault_14_a_certificate_speaks_with_its_own_node_key_only(world: World, key: str) -> None:
    """Client A has a valid certificate and even B's node key: it cannot speak as B."""
    other = world.client("hospital-b")
    if key == "hospital-b":
        data = request(other)
    elif key in ("twice", "both"):
        own, extra = request(world.client()), request(world.client() if key == "twice" else other)
        line = next(line for line in extra.split(b"\r\n") if line.startswith(b"flwr-public-key"))
        data = own.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n", 1)
    else:
        data = request(None, node_key=key or None)
    before = world.refused("node_key")
    assert status_of(world.send(data, "hospital-a")) == 403
    assert world.refused("node_key") == before + 1 and not world.stand.received


def test_revocation_cuts_a_live_connection(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world:
        kit = world.client("hospital-b")
        with connected(kit) as link:
            link.sendall(request(kit))
            assert status_of(receive(link)) == 200
            revoke(world.kits, "hospital-b")
            with suppress(OSError):
                assert link.recv(65536) == b""
        world.forget()
        assert status_of(world.send(request(kit), "hospital-b")) == 403
        assert status_of(world.send(request(world.client()))) == 200
        assert len(world.stand.heads) == 1


def test_new_keys_shut_out_the_old_certificate(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world:
        old = world.client().tls()
        renew(world.kits, ["hospital-a"], new_keys=True)
        until(lambda: world.gate.members._serials)
        assert status_of(exchange(world.kit.port, old, request(world.client()))) == 403
        assert status_of(world.send(request(world.client()))) == 200


def test_a_renewed_server_certificate_is_taken_up(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world:

        def shown() -> str:
            with connected(world.client()) as link:
                return str((link.getpeercert() or {})["serialNumber"])

        before = shown()
        renew(world.kits, ["server"])
        until(lambda: shown() != before)


def test_a_broken_list_of_clients_leaves_the_last_one(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world:
        (world.kits / "server" / "clients.yaml").write_text("clients: [")
        log = world.log_folder / "gate.jsonl"
        until(lambda: "clients.unreadable" in log.read_text())
        assert status_of(world.send(request(world.client()))) == 200


# ---- paths and framing ----------------------------------------------------------------------------------------------
TRICKS = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet//pull-messages",
    "//v1/fleet/pull-messages",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=/v1/control/start-run",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull%2dmessages",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/pull-messages%00",
    "/v1\\fleet\\pull-messages",
    "https://127.0.0.1/v1/fleet/pull-messages",
    "http://127.0.0.1:8000/v1/control/start-run",
    "*",
    "/health",
    "/docs",
    "/openapi.json",
    "/",
]


@pytest.mark.parametrize("target", TRICKS)
def test_nothing_but_the_exact_paths(world: World, target: str) -> None:
    assert status_of(world.send(request(world.client(), target))) == 404
    assert not world.stand.received


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "post"])
def test_nothing_but_post(world: World, method: str) -> None:
    assert status_of(world.send(request(world.client(), method=method))) in (405, 400)
    assert not world.stand.received


def test_the_doctor_finds_the_clock(world: World) -> None:
    answer = world.send(request(world.client(), "/v1/fleet/", method="GET"))
    assert status_of(answer) == 405 and b"date: " in answer.lower()


SMUGGLED = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (("content-length: 4", "transfer-encoding: chunked"), b"0\r\n\r\n" + SMUGGLED),
        (("transfer-encoding: chunked", f"content-length: {len(SMUGGLED) + 5}"), b"0\r\n\r\n" + SMUGGLED),
        (("content-length: 0", f"content-length: {len(SMUGGLED)}"), SMUGGLED),
        (("transfer-encoding: chunked, identity",), b"0\r\n\r\n" + SMUGGLED),
        (("transfer-encoding: xchunked",), b"0\r\n\r\n" + SMUGGLED),
        (("transfer-encoding : chunked",), b"0\r\n\r\n" + SMUGGLED),
        (("content-length: +0",), SMUGGLED),
        (("content-length: 0x0",), SMUGGLED),
        (("transfer-encoding: chunked",), b"zz\r\n\r\n" + SMUGGLED),
        ((" folded: x", "content-length: 0"), SMUGGLED),
        (("bad\x00name: x", "content-length: 0"), SMUGGLED),
    ],
)
def test_a_request_inside_a_request_never_arrives(world: World, headers: tuple[str, ...], body: bytes) -> None:
    """Whatever the framing says, SuperLink is never sent the inner request as a request."""
    try:
        answer = world.send(request(world.client(), headers=headers) + body)
    except OSError:
        answer = b""
    assert status_of(answer) in (0, 400, 403, 501)
    assert not any("control" in head for head in world.stand.heads)


def test_pipelined_requests_are_judged_one_by_one(world: World) -> None:
    kit = world.client()
    answer = b""
    with connected(kit) as link:
        link.sendall(request(kit, body=b"ok") + SMUGGLED)
        while part := link.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 404" in answer
    assert world.stand.heads == ["POST /v1/fleet/pull-messages HTTP/1.1"]


# ---- limits ---------------------------------------------------------------------------------------------------------
def test_a_message_over_the_cap_is_refused_by_its_header(world: World) -> None:
    answer = world.send(request(world.client(), "/v1/fleet/push-object", length=10**12))
    assert status_of(answer) == 413 and not world.stand.received


def test_a_chunked_message_over_the_cap_never_becomes_whole(world: World) -> None:
    """It claims no length; the cap holds while it streams, and SuperLink sees a request that never ends."""
    part = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    data = request(world.client(), "/v1/fleet/push-object", headers=("transfer-encoding: chunked",)) + part * 32
    answer = world.send(data + b"0\r\n\r\n")
    assert status_of(answer) == 413 and world.stand.bodies == []


def test_the_day_has_an_end_and_a_restart_does_not_begin_another(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world:
        data = request(world.client(), "/v1/fleet/push-object", body=b"x" * MIB)
        assert [status_of(world.send(data)) for _ in range(5)] == [200, 200, 200, 200, 429]
        assert b"retry-after: " in world.send(data).lower()
        assert status_of(world.send(request(world.client("hospital-b")), "hospital-b")) == 200
        world.gate.save()
    with World(world.kits) as again:
        assert status_of(again.send(data)) == 429
        usage = again.gate.usage
        usage._day = "2000-01-01"
        assert usage.sent("hospital-a") == 0


@pytest.mark.fault(17, "the gate answers 507 to uploads while the disk is nearly full; heartbeats pass")
def test_fault_17_uploads_stop_before_the_disk_is_full(world: World) -> None:
    world.gate.disk_low = True
    world.gate.look_at_disk = lambda: None  # type: ignore[method-assign]
    try:
        assert status_of(world.send(request(world.client(), "/v1/fleet/push-object", body=b"x"))) == 507
        assert status_of(world.send(request(world.client(), "/v1/fleet/push-messages", body=b"x"))) == 507
        assert status_of(world.send(request(world.client(), "/v1/fleet/send-node-heartbeat"))) == 200
    finally:
        del world.gate.look_at_disk
        world.gate.disk_low = False


def test_one_client_does_not_take_all_connections(world: World) -> None:
    kit, held = world.client(), []
    try:
        for _ in range(3):
            plain = socket.create_connection(("127.0.0.1", world.kit.port), timeout=10)
            held.append(kit.tls().wrap_socket(plain, server_hostname="127.0.0.1"))
            held[-1].sendall(request(kit))
            assert receive(held[-1])
        try:
            fourth = world.send(request(kit))
        except OSError:
            fourth = b""
        assert status_of(fourth) == 0
        assert status_of(world.send(request(world.client("hospital-b")), "hospital-b")) == 200
    finally:
        for link in held:
            link.close()
    until(lambda: not world.gate._open)


def test_slow_heads_and_bodies_end(world: World) -> None:
    kit = world.client()
    for data, reason in ((request(kit)[:40], "slow"), (request(kit, length=100), "slow")):
        before, began = world.refused(reason), time.monotonic()
        with suppress(OSError):
            exchange(world.kit.port, kit.tls(), data)
        until(lambda before=before, reason=reason: world.refused(reason) == before + 1)  # type: ignore[misc]
        assert time.monotonic() - began < 15
    assert world.stand.bodies == []


def test_a_silent_superlink_is_a_503_that_says_when_to_come_back(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world:
        world.gate.kit = world.gate.kit.model_copy(update={"control_port": 1})
        world.gate.kit._folder = world.kit.folder
        answer = world.send(request(world.client()))
        assert status_of(answer) == 503 and b"retry-after: 2" in answer.lower()


def test_an_overlong_head_is_refused(world: World) -> None:
    data = request(world.client(), headers=("x: " + "y" * 40000,))
    try:
        answer = world.send(data)
    except OSError:
        answer = b""
    assert status_of(answer) in (0, 400, 431) and not world.stand.received


def test_logs_and_metrics_hold_nothing_that_a_peer_wrote(world: World) -> None:
    world.send(request(world.client(), "/v1/fleet/secret-path-of-a-peer"))
    exchange(world.kit.port, strangers(world.kits)["unknown name"], request(world.client()))
    from prometheus_client import generate_latest

    text = generate_latest(world.metrics.registry).decode()
    assert "secret-path" not in text and "hospital-x" not in text and 'client="unknown"' in text
    assert "secret-path" not in (world.log_folder / "gate.jsonl").read_text()


# ---- questions that are held ------------------------------------------------------------------------------------------
@contextmanager
def held(world: World) -> Iterator[ssl.SSLSocket]:
    """A connection of hospital-a whose second question is held: SuperLink had nothing at the first."""
    assert status_of(world.send(request(world.client()))) == 200
    world.gate.hold_seconds = 60.0
    try:
        with connected(world.client()) as link:
            link.sendall(request(world.client()))
            until(lambda: world.gate.bell.waiting("hospital-a"))
            yield link
    finally:
        world.gate.hold_seconds = 0.0
        ring(world.kit.ops_port, ["hospital-a"])


def test_a_question_is_held_until_somebody_rings(world: World) -> None:
    with held(world) as link:
        ring(world.kit.ops_port, ["hospital-b", "nobody", ""])
        assert status_of(world.send(request(world.client("hospital-b")), "hospital-b")) == 200
        assert len(world.stand.heads) == 2, "another client's mail is none of hospital-a"
        ring(world.kit.ops_port, ["hospital-b", "hospital-a"])
        assert status_of(receive(link)) == 200
        assert len(world.stand.heads) == 3


def test_a_question_of_a_device_that_hung_up_asks_for_nothing(world: World) -> None:
    with held(world) as link:
        link.close()
        until(lambda: all(writer.transport.is_closing() for _, writer in world.gate._open.values()))
        ring(world.kit.ops_port, ["hospital-a"])
        assert status_of(world.send(request(world.client()))) == 200
        assert len(world.stand.heads) == 2, "what SuperLink had given out would have been lost"


def test_a_client_revoked_while_its_question_is_held_gets_nothing(made: Path, tmp_path: Path) -> None:
    with another(made, tmp_path) as world, held(world) as link:
        revoke(world.kits, "hospital-a")
        assert link.recv(1) == b""
        ring(world.kit.ops_port, ["hospital-a"])
        assert status_of(world.send(request(world.client("hospital-b")), "hospital-b")) == 200
        assert len(world.stand.heads) == 2


def test_a_ring_during_the_answer_is_not_forgotten() -> None:
    async def run() -> None:
        bell = Bell()
        rings = await bell.wait("a", 0.0)
        bell.datagram_received(b"a\n", None)
        bell.nothing("a", rings)
        assert not bell.waiting("a")
        again = asyncio.create_task(bell.wait("a", 60.0))
        bell.nothing("a", await again)
        assert await bell.wait("a", 0.0) == rings + 1

    asyncio.run(run())
