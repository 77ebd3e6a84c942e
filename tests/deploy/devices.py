"""Kits on free ports, and what a device can do with them."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedkd.deploy import ca
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.provision import provision

NAMES = ("hospital-a", "hospital-b", "hospital-c")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody uses at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def make_kits(folder: Path, *, limits: str = "{}") -> Path:
    """Provision a server and three clients on free ports."""
    port, control, ops = free_ports(3)
    (folder / "project.yaml").write_text(
        "project: trial\n"
        f"server: {{host: 127.0.0.1, listen: 127.0.0.1, port: {port}, control_port: {control}, ops_port: {ops}, "
        f"limits: {limits}}}\n"
        f"clients: [{', '.join(NAMES)}]\n"
    )
    provision(folder / "project.yaml", folder / "kits")
    return folder / "kits"


def device_tls(kits: Path, certificate: bytes | None, key: bytes | None) -> ssl.SSLContext:
    """Return what a device speaks that trusts the project's authority, with any certificate or none."""
    context = ssl.create_default_context(cafile=str(kits / "ca" / "ca.crt"))
    if certificate is not None and key is not None:
        pair = kits / "pair.pem"
        pair.write_bytes(key + certificate)
        context.load_cert_chain(pair)
    return context


def strangers(kits: Path) -> dict[str, ssl.SSLContext]:
    """Return devices whose certificates are wrong, each in one way."""
    import datetime

    authority = ca.Authority.load((kits / "ca" / "ca.key").read_bytes(), (kits / "ca" / "ca.crt").read_bytes())
    key = ca.new_key()
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)

    def leaf(name: str, by: ca.Authority = authority, **named: object) -> ssl.SSLContext:
        settings: dict[str, object] = {"usage": ca.CLIENT, "days": 1, **named}
        made = by.leaf(name, key.public_key(), **settings)  # type: ignore[arg-type]
        return device_tls(kits, ca.certificate_pem(made), ca.key_pem(key))

    server = kits / "server"
    return {
        "none": device_tls(kits, None, None),
        "another authority": leaf("hospital-a", ca.Authority.new("trial")),
        "expired": leaf("hospital-a", days=-1),
        "not yet valid": leaf("hospital-a", now=now + 10 * day),
        "unknown name": leaf("hospital-x"),
        "the server's own": device_tls(
            kits, (server / "server.crt").read_bytes(), (server / "server.key").read_bytes()
        ),
    }


def exchange(port: int, context: ssl.SSLContext | None, data: bytes, *, seconds: float = 10) -> bytes:
    """Send bytes as they are and return all that comes back until the peer closes, or has answered once.

    Raises:
        OSError: the peer refused the connection or broke it off.
    """
    plain = socket.create_connection(("127.0.0.1", port), timeout=seconds)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain as link:
        link.sendall(data)
        return receive(link)


def receive(link: socket.socket) -> bytes:
    """Return one whole answer, or what came before the peer closed."""
    received = b""
    while part := link.recv(65536):
        received += part
        head, end, body = received.partition(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if end and length and len(body) >= int(length[0].split(b":")[1]):
            break
    return received


@contextmanager
def connected(kit: ClientKit) -> Iterator[ssl.SSLSocket]:
    """A device's connection to the gate."""
    address = (kit.server.host, kit.server.port)
    with (
        socket.create_connection(address, timeout=10) as plain,
        kit.tls().wrap_socket(plain, server_hostname=kit.server.host) as link,
    ):
        yield link


def own_ports(kits: Path) -> None:
    """Give copied kits ports of their own."""
    old = ServerKit.read(kits / "server")
    fresh = free_ports(3)
    for path in [kits / "server" / "server.yaml", *kits.glob("*/client.yaml"), kits / "project.yaml"]:
        text = path.read_text()
        for was, now in zip((old.port, old.control_port, old.ops_port), fresh, strict=True):
            text = text.replace(f": {was}\n", f": {now}\n")
        path.write_text(text)


def until(true: Callable[[], object], seconds: float = 15) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def status_of(answer: bytes) -> int:
    """Return the status of an answer, 0 if there was none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def request(
    kit: ClientKit | None,
    target: str = "/v1/fleet/pull-messages",
    *,
    method: str = "POST",
    body: bytes = b"",
    node_key: str | None = None,
    headers: tuple[str, ...] = (),
    length: int | None = None,
) -> bytes:
    """Return a request as a device would send it; ``node_key``: as header, the kit's own by default."""
    import base64

    lines = [f"{method} {target} HTTP/1.1", "host: gate"]
    if node_key is None and kit is not None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        public = kit.node_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        node_key = base64.b64encode(public).decode()
    if node_key:
        lines.append(f"flwr-public-key: {node_key}")
    if not any(h.lower().startswith(("transfer-encoding", "content-length")) for h in headers) or length is not None:
        lines.append(f"content-length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body
