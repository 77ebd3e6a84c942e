"""A program without a client certificate reaches the gate through the tunnel, and only as this client."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from devices import exchange, free_ports, make_kits, request, status_of, until

from fedkd.deploy.gate import Gate, listen
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.log import setup_log
from fedkd.deploy.ops import GateMetrics
from fedkd.deploy.tunnel import PAIR, TRUSTED, Tunnel, loopback_tls
from fedkd.errors import ConfigError


@pytest.fixture(scope="module")
def tunnel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """Kits whose gate is open (with nothing behind it), and hospital-a's tunnel to it."""
    kits = make_kits(tmp_path_factory.mktemp("tunnel"), limits="{min_free_mib: 0}")
    kit, (port,) = ServerKit.read(kits / "server"), free_ports(1)
    loop, opened = asyncio.new_event_loop(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def serve() -> None:
        gate = Gate(kit, setup_log("gate", kits / "logs"), GateMetrics())
        tasks.append(asyncio.create_task(gate.serve(listen("127.0.0.1", kit.port))))
        own = ClientKit.read(kits / "hospital-a")
        tasks.append(asyncio.create_task(Tunnel(own, setup_log("tunnel", kits / "logs")).serve(port)))
        opened.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert opened.wait(20)
    until(lambda: listens(port))
    yield kits, port
    for task in tasks:
        loop.call_soon_threadsafe(task.cancel)
    thread.join(20)
    loop.close()


def test_it_leads_to_the_gate_and_no_further(tunnel: tuple[Path, int]) -> None:
    kits, port = tunnel
    a, b = (ClientKit.read(kits / name) for name in ("hospital-a", "hospital-b"))
    tls = trusting(a)
    # 503: the gate let it through, and nothing stands behind this one.
    assert status_of(exchange(port, tls, request(a, body=b"x" * 300_000))) == 503
    assert status_of(exchange(port, tls, request(a, "/v1/control/list-runs"))) == 404
    assert status_of(exchange(port, tls, request(b))) == 403


def test_its_own_certificate_is_kept_and_a_damaged_one_named(tmp_path: Path) -> None:
    own = ClientKit.read(make_kits(tmp_path) / "hospital-a")
    loopback_tls(own)
    before = (own.state / TRUSTED).read_bytes()
    assert (own.state / PAIR).stat().st_mode & 0o077 == 0
    loopback_tls(own)
    assert (own.state / TRUSTED).read_bytes() == before
    (own.state / PAIR).write_bytes(b"no certificate")
    with pytest.raises(ConfigError, match="the tunnel makes new ones"):
        loopback_tls(own)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def trusting(kit: ClientKit) -> ssl.SSLContext:
    """Return what a program on the device speaks to the tunnel."""
    return ssl.create_default_context(cafile=str(kit.state / TRUSTED))


def test_without_a_server_the_connection_ends_and_the_log_says_why(tunnel: tuple[Path, int], tmp_path: Path) -> None:
    kits, _ = tunnel
    (port,) = free_ports(1)
    own = ClientKit.read(kits / "hospital-a")
    lost = own.model_copy(update={"server": own.server.model_copy(update={"port": free_ports(1)[0]})})
    lost._folder = own.folder

    async def try_it() -> bytes:
        task = asyncio.create_task(Tunnel(lost, setup_log("lost", tmp_path)).serve(port))
        await asyncio.sleep(0.2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(lost))
        writer.write(b"x")
        try:
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""
        finally:
            writer.close()
            task.cancel()

    assert asyncio.run(try_it()) == b""
    until(lambda: "tunnel.unreachable" in (tmp_path / "lost.jsonl").read_text())
