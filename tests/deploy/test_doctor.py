"""`fedkd doctor`: every check is provoked, and says what is wrong and how to mend it."""

from __future__ import annotations

import asyncio
import http.server
import os
import shutil
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from devices import make_kits, own_ports
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.deploy import ca, client, doctor
from fedkd.deploy.doctor import Finding, diagnose, refuse
from fedkd.deploy.gate import Gate, listen
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.log import setup_log
from fedkd.deploy.ops import GateMetrics
from fedkd.deploy.provision import revoke
from fedkd.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("doctor"))


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made.parent, tmp_path / "copy")
    own_ports(tmp_path / "copy" / "kits")
    return tmp_path / "copy" / "kits"


@pytest.fixture
def gate(kits: Path) -> Iterator[Path]:
    """The kits, with their gate open (and no SuperLink behind it)."""
    kit = ServerKit.read(kits / "server")
    loop, opened = asyncio.new_event_loop(), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def serve() -> None:
        made = Gate(kit, setup_log("gate", kits / "logs"), GateMetrics())
        tasks.append(asyncio.create_task(made.serve(listen("127.0.0.1", kit.port))))
        tasks.append(asyncio.create_task(made.upkeep()))
        opened.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert opened.wait(20)
    yield kits
    for task in tasks:
        loop.call_soon_threadsafe(task.cancel)
    thread.join(20)
    loop.close()


def found(folder: Path, check: str) -> list[Finding]:
    return [f for f in diagnose(folder) if f.check == check]


def problem(folder: Path, check: str, said: str) -> Finding:
    """Return the problem of a check, which has to say this, and how to mend it."""
    bad = [f for f in found(folder, check) if f.level != "ok"]
    assert any(said in f.said for f in bad), bad
    match = next(f for f in bad if said in f.said)
    assert match.fix
    return match


def reissue(kits: Path, name: str, **settings: object) -> None:
    """Give a client another certificate for its key."""
    authority = ca.Authority.load((kits / "ca" / "ca.key").read_bytes(), (kits / "ca" / "ca.crt").read_bytes())
    key = load_pem_private_key((kits / name / "client.key").read_bytes(), None)
    wanted = {"usage": ca.CLIENT, "days": 90, "common_name": name, **settings}
    common_name = str(wanted.pop("common_name"))
    leaf = authority.leaf(common_name, key.public_key(), **wanted)  # type: ignore[arg-type]
    (kits / name / "client.crt").write_bytes(ca.certificate_pem(leaf))


def test_a_healthy_client_has_no_problem_but_its_data(gate: Path) -> None:
    findings = diagnose(gate / "hospital-a")
    about = {"kit", "secrets", "chain", "dates", "key", "node key", "clock", "reach", "disk", "memory", "versions"}
    assert {f.check for f in findings} == about | {"data", "policy"}
    assert [f.check for f in findings if f.level != "ok"] == ["data"]


def test_data_and_policy(kits: Path) -> None:
    """A fresh kit names no records yet; its policy is valid as it is."""
    folder = kits / "hospital-a"
    problem(folder, "data", "/srv/records.csv")
    (folder / "data.yaml").write_text("data: {source: digits}\n")
    assert [(f.level, "records of shape" in f.said) for f in found(folder, "data")] == [("ok", True)]
    (folder / "data.yaml").write_text("data: {sauce: digits}\n")
    problem(folder, "data", "sauce")
    assert [f.level for f in found(folder, "policy")] == ["ok"]
    (folder / "policy.yaml").write_text("max_round: 5\n")
    problem(folder, "policy", "max_round")
    (folder / "policy.yaml").unlink()
    problem(folder, "policy", "cannot read")


def test_a_healthy_server_has_no_problem(kits: Path) -> None:
    findings = diagnose(kits / "server")
    assert {"kit", "secrets", "chain", "dates", "key", "clients", "ports", "disk", "memory", "versions"} == {
        f.check for f in findings
    }
    assert [f for f in findings if f.level != "ok"] == []


def test_no_kit_and_a_broken_one(kits: Path, tmp_path: Path) -> None:
    assert "holds no client.yaml" in diagnose(tmp_path)[0].said
    (kits / "hospital-a" / "client.yaml").write_text("name: [")
    assert "not valid YAML" in problem(kits / "hospital-a", "kit", "client.yaml").said


def test_secrets(kits: Path) -> None:
    os.chmod(kits / "hospital-b" / "state", 0o755)
    found = [f for f in diagnose(kits / "hospital-b") if f.check == "secrets"]
    assert [(f.level, f.said) for f in found] == [("warning", "others on this machine may read state/")]
    os.chmod(kits / "hospital-a" / "node.key", 0o644)
    assert problem(kits / "hospital-a", "secrets", "others on this machine may read node.key").fix.startswith("chmod")
    (kits / "server" / "superexec.secret").unlink()
    problem(kits / "server", "secrets", "superexec.secret is missing")


def test_dates(kits: Path) -> None:
    reissue(kits, "hospital-a", days=-1)
    assert "fedkd provision renew hospital-a" in problem(kits / "hospital-a", "dates", "ended on").fix
    reissue(kits, "hospital-a", now=datetime.now(UTC) + timedelta(days=3))
    problem(kits / "hospital-a", "clock", "valid from")
    reissue(kits, "hospital-a", days=5)
    assert problem(kits / "hospital-a", "dates", "valid for 4 more days").level == "warning"


def test_chain_key_and_name(kits: Path) -> None:
    other = ca.Authority.new("trial")
    (kits / "hospital-a" / "ca.crt").write_bytes(ca.certificate_pem(other.certificate))
    problem(kits / "hospital-a", "chain", "not signed by the authority")
    (kits / "hospital-b" / "client.key").write_bytes(ca.key_pem(ca.new_key()))
    problem(kits / "hospital-b", "key", "does not belong")
    reissue(kits, "hospital-c", common_name="hospital-a")
    problem(kits / "hospital-c", "certificate", "is for hospital-a")
    (kits / "server" / "server.crt").write_text("junk")
    problem(kits / "server", "certificate", "cannot read server.crt")
    (kits / "server" / "server.key").write_text("junk")
    (kits / "server" / "server.crt").write_bytes((kits / "server" / "loopback.crt").read_bytes())
    problem(kits / "server", "key", "no private key")


def test_node_key(kits: Path) -> None:
    shutil.copy(kits / "hospital-b" / "node.pub", kits / "hospital-a" / "node.pub")
    problem(kits / "hospital-a", "node key", "do not belong together")
    (kits / "hospital-b" / "node.key").write_text("junk")
    problem(kits / "hospital-b", "node key", "no private key in OpenSSH form")


def test_nobody_at_the_address(kits: Path) -> None:
    problem(kits / "hospital-a", "reach", "cannot connect to 127.0.0.1")
    path = kits / "hospital-a" / "client.yaml"
    path.write_text(path.read_text().replace("host: 127.0.0.1", "host: no-such-name.invalid"))
    problem(kits / "hospital-a", "reach", "is not known here")


def test_refused_by_the_gate(gate: Path) -> None:
    reissue(gate, "hospital-a", days=-1)
    problem(gate / "hospital-a", "reach", "refuses this client's certificate")
    revoke(gate, "hospital-b")
    from devices import until

    until(lambda: [f for f in found(gate / "hospital-b", "reach") if "revoked" in f.said])


def test_another_server_at_the_address(gate: Path) -> None:
    """A server whose certificate is another project's, or names another host."""
    other = ca.Authority.new("trial")
    authority = (gate / "hospital-a" / "ca.crt").read_bytes()
    (gate / "hospital-a" / "ca.crt").write_bytes(ca.certificate_pem(other.certificate))
    problem(gate / "hospital-a", "reach", "is not believed")
    (gate / "hospital-a" / "ca.crt").write_bytes(authority)
    path = gate / "hospital-a" / "client.yaml"
    path.write_text(path.read_text().replace("host: 127.0.0.1", "host: localhost"))
    assert "extra_hosts" in problem(gate / "hospital-a", "reach", "is not believed").fix


@pytest.mark.parametrize("hours", [-3, 3])
def test_clock(kits: Path, hours: int) -> None:
    """The server's clock is hours off, so that one of the two is wrong; the check works whatever the dates say."""
    kit = ServerKit.read(kits / "server")

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(datetime.now(UTC).timestamp() + 3600 * hours)

        def do_GET(self) -> None:
            self.send_response(405)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", kit.port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit.path("server.crt"), kit.path("server.key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        way = "behind" if hours > 0 else "ahead of"
        assert "set-ntp" in problem(kits / "hospital-a", "clock", f"s {way} the server's").fix
    finally:
        server.shutdown()
        server.server_close()


def test_clients_and_ports(kits: Path) -> None:
    import socket

    kit = ServerKit.read(kits / "server")
    with socket.create_server(("127.0.0.1", kit.ops_port)):
        assert "ops_port" in problem(kit.folder, "ports", f"127.0.0.1:{kit.ops_port}").fix
    for name in ("hospital-a", "hospital-b", "hospital-c"):
        revoke(kits, name)
    problem(kit.folder, "clients", "no client may take part")
    other = ca.Authority.new("other")
    kit.path("crl.pem").write_bytes(other.revocations([]))
    problem(kit.folder, "clients", "not signed by this project's authority")


def test_disk_memory_and_versions(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kits / "server"
    monkeypatch.setattr(doctor, "FREE_MIB", {"server": 10**9, "client": 1})
    problem(folder, "disk", "MiB are free")
    monkeypatch.setattr(doctor, "available_mib", lambda: 100)
    problem(folder, "memory", "100 MiB of memory")
    monkeypatch.setattr(doctor, "version", lambda package: "1.39.0" if package == "flwr" else "1")
    problem(folder, "versions", "1.39.0 is installed")
    (kits / "hospital-a" / "state").rmdir()
    (kits / "hospital-a" / "state").write_text("a file where a folder should be")
    problem(kits / "hospital-a", "disk", "cannot write")
    problem(kits / "hospital-b", "versions", "1.39.0 is installed")
    monkeypatch.setattr(doctor, "version", lambda package: None if package == "torch" else "1.41.0")
    problem(kits / "hospital-b", "versions", "torch is not installed")


def test_too_little_memory_is_a_problem(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_mib", lambda: 300)
    problem(kits / "hospital-a", "memory", "750 MiB are needed")
    monkeypatch.setattr(doctor, "available_mib", lambda: 900)
    assert [f.level for f in found(kits / "hospital-a", "memory")] == ["ok"]


def test_a_client_that_only_labels_needs_neither_torch_nor_much_memory(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kits / "hospital-a"
    (folder / "data.yaml").write_text("model: {path: model.onnx}\n")
    problem(folder, "data", "model.onnx")
    monkeypatch.setattr(doctor, "version", lambda package: None if package == "torch" else "1.41.0")
    monkeypatch.setattr(doctor, "available_mib", lambda: 300)
    assert [f.level for check in ("versions", "memory") for f in found(folder, check)] == ["ok", "ok"]
    monkeypatch.setattr(doctor, "available_mib", lambda: 100)
    problem(folder, "memory", "150 MiB are needed")


def test_the_command_ends_with_1_where_there_is_a_problem(kits: Path) -> None:
    run = CliRunner()
    assert run.invoke(app, ["doctor", str(kits / "server")]).exit_code == 0
    os.chmod(ClientKit.read(kits / "hospital-a").path("client.key"), 0o640)
    done = run.invoke(app, ["doctor", str(kits / "hospital-a")])
    assert done.exit_code == 1 and "PROBLEM" in done.output and "chmod 600" in done.output


# ---- what is refused at the start ---------------------------------------------------------------------------------------
def test_a_client_that_could_never_work_is_not_started(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the doctor's words; the other start is the operator's to insist on."""
    folder, started = kits / "hospital-a", list[Path]()
    monkeypatch.setattr(client, "start", lambda kit: (started.append(kit.folder), 7)[1])
    missing = problem(folder, "data", "/srv/records.csv")
    refused = CliRunner().invoke(app, ["client", "start", str(folder)])
    assert isinstance(refused.exception, ConfigError) and started == []
    assert f"data: {missing.said} | {missing.fix}" in str(refused.exception)
    assert CliRunner().invoke(app, ["client", "start", str(folder), "--unchecked"]).exit_code == 0
    assert started == [folder]


def test_what_mends_by_itself_is_no_reason_to_refuse(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is down, a clock that is behind, a disk that is full for now; but not an old certificate."""
    own, server = ClientKit.read(kits / "hospital-a"), ServerKit.read(kits / "server")
    (own.folder / "data.yaml").write_text("data: {source: digits}\n")
    reissue(kits, "hospital-a", now=datetime.now(UTC) + timedelta(days=3))
    monkeypatch.setattr(doctor, "available_mib", lambda: 1)
    refuse(own)
    refuse(server)
    reissue(kits, "hospital-a", days=-1)
    with pytest.raises(ConfigError, match=r"dates: client.crt ended on .* fedkd provision renew hospital-a"):
        refuse(own)
    (kits / "server" / "superexec.secret").unlink()
    with pytest.raises(ConfigError, match=r"superexec.secret is missing"):
        refuse(server)
