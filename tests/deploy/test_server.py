"""A real server: SuperLink behind its gate, as `fedkd server start` runs it, seen from a device and from its operator."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from devices import connected, exchange, make_kits, receive, request, status_of, strangers, until
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.deploy import server
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.provision import Newcomer, add_client, revoke
from fedkd.deploy.supervise import Process
from fedkd.errors import FedkdError


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kits of a server that runs."""
    kits = make_kits(tmp_path_factory.mktemp("server"), limits="{min_free_mib: 0}")
    kit = ServerKit.read(kits / "server")
    try:
        assert server.start(kit)["ready"]
        yield kits
    finally:
        server.stop(kit)


@pytest.fixture
def kit(running: Path) -> ServerKit:
    return ServerKit.read(running / "server")


def device(kits: Path, name: str, *, sign_as: str | None = None) -> FleetHttpClient:
    """Flower's own client of the Fleet API, over the kit's mutual TLS."""
    own = ClientKit.read(kits / name)
    key = ClientKit.read(kits / (sign_as or name)).node_key()
    signing = NodeAuthHttpInterceptor(key, key.public_key())
    return FleetHttpClient(f"https://{own.server_address}", interceptors=[signing], verify=own.tls())


def activate(kits: Path, name: str, *, leave: bool = True) -> int:
    """Come online, and say goodbye at once: Flower takes no node that is still online."""
    key = public_key_to_bytes(ClientKit.read(kits / name).node_key().public_key())
    with device(kits, name) as link:
        node = int(link.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30)).node_id)
        if leave:
            link.DeactivateNode(DeactivateNodeRequest(node_id=node))
        return node


def nodes(kit: ServerKit) -> dict[str, str]:
    """Status of the nodes that SuperLink knows, by name; asked from the server's own loopback."""
    authority = kit.path("ca.crt").read_bytes()
    with ControlHttpClient.from_server_address(kit.control_address, False, authority, ()) as control:
        return {n.name: n.status for n in control.ListNodes(ListNodesRequest()).nodes_info}


def test_a_provisioned_device_is_served(running: Path, kit: ServerKit) -> None:
    node = activate(running, "hospital-a", leave=False)
    with device(running, "hospital-a") as link:
        assert not link.PullMessages(PullMessagesRequest(node=Node(node_id=node))).messages_list
        assert nodes(kit)["hospital-a"] == "online"
        link.DeactivateNode(DeactivateNodeRequest(node_id=node))
    rows = {row["name"]: row for row in server.status(kit)["clients"]}
    assert (rows["hospital-a"]["status"], rows["hospital-a"]["node_id"]) == ("online", node)
    assert rows["hospital-b"]["status"] == "offline"


# ---- the attacker, who sits at a device -----------------------------------------------------------------------------
CALLS = [
    ("/v1/control/list-runs", ListRunsRequest().SerializeToString()),
    ("/v1/control/list-nodes", ListNodesRequest().SerializeToString()),
    ("/v1/control/start-run", StartRunRequest().SerializeToString()),
    (
        "/v1/control/register-node",
        RegisterNodeRequest(public_key=public_key_to_bytes(generate_key_pairs()[1])).SerializeToString(),
    ),
    ("/v1/runtime/acquire-task", AcquireTaskRequest().SerializeToString()),
    ("/v1/runtime/get-nodes", b""),
    ("/v1/runtime/pull-messages", b""),
    ("/v1/fleet/register-node", b""),
    ("/health", b""),
    ("/docs", b""),
    ("/v1/fleet/../control/list-runs", b""),
    ("/v1/fleet/%2e%2e/control/list-runs", b""),
    ("//v1/control/list-runs", b""),
    ("https://127.0.0.1/v1/control/list-runs", b""),
]
HEADERS = ("content-type: application/protobuf", "accept: application/protobuf")


@pytest.fixture(params=["builtin", "nginx"])
def gate_port(request: pytest.FixtureRequest, running: Path, kit: ServerKit, tmp_path: Path) -> Iterator[int]:
    """The port of the built-in gate, or of nginx by the kit's own nginx.conf before the same SuperLink."""
    if request.param == "builtin":
        yield kit.port
        return
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed here")
    from devices import free_ports

    (port,) = free_ports(1)
    text = kit.path("nginx.conf").read_text().replace(f"listen {kit.listen}:{kit.port} ", f"listen 127.0.0.1:{port} ")
    assert f":{port} " in text
    conf = tmp_path / "nginx.conf"
    conf.write_text(text)
    process = subprocess.Popen([nginx, "-c", str(conf), "-g", "daemon off;"], stderr=subprocess.PIPE)
    try:
        until(lambda: process.poll() is not None or _listens(port))
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_from_a_device_the_fleet_api_is_all_there_is(running: Path, gate_port: int) -> None:
    """With a valid certificate, its own node key and well-formed calls."""
    own = ClientKit.read(running / "hospital-a")
    for path, body in CALLS:
        answer = exchange(gate_port, own.tls(), request(own, path, body=body, headers=HEADERS))
        assert status_of(answer) in (400, 404), (path, answer[:200])
    # The same head and key do reach what they may: SuperLink's node authentication then asks for the signature.
    answer = exchange(gate_port, own.tls(), request(own, headers=HEADERS))
    assert status_of(answer) == 401 and b"Invalid SuperNode authentication" in answer


@pytest.mark.fault(13, "before the real server and nginx: no other certificate reaches SuperLink")
def test_fault_13_no_certificate_but_a_provisioned_one_reaches_superlink(running: Path, gate_port: int) -> None:
    own = ClientKit.read(running / "hospital-a")
    for kind, context in strangers(running).items():
        for path, body in [("/v1/fleet/pull-messages", b""), *CALLS[:3]]:
            try:
                answer = exchange(gate_port, context, request(own, path, body=body, headers=HEADERS))
            except OSError:
                answer = b""
            assert status_of(answer) in (0, 400, 403, 404), (kind, path)
            assert b"SuperNode" not in answer, (kind, path)


@pytest.mark.fault(14, "before the real server: 403 from the gate, 401 from Flower for B's node id under A's key")
def test_fault_14_client_a_cannot_speak_as_client_b(running: Path, gate_port: int, kit: ServerKit) -> None:
    a, b = (ClientKit.read(running / name) for name in ("hospital-a", "hospital-b"))
    # With B's public key in the head, which is no secret.
    assert status_of(exchange(gate_port, a.tls(), request(b, headers=HEADERS))) == 403
    # With B's stolen node key, and so B's valid signature, but A's certificate.
    signing = NodeAuthHttpInterceptor(b.node_key(), b.node_key().public_key())
    with (
        FleetHttpClient(f"https://127.0.0.1:{gate_port}", interceptors=[signing], verify=a.tls()) as link,
        pytest.raises(httpx.HTTPStatusError, match="403"),
    ):
        link.PullMessages(PullMessagesRequest(node=Node(node_id=1)))
    # With A's own key, but B's node id in the message: Flower's node authentication refuses.
    other = server.status(kit)["clients"][1]["node_id"]
    signing = NodeAuthHttpInterceptor(a.node_key(), a.node_key().public_key())
    with (
        FleetHttpClient(f"https://127.0.0.1:{gate_port}", interceptors=[signing], verify=a.tls()) as link,
        pytest.raises(httpx.HTTPStatusError, match="401"),
    ):
        link.PullMessages(PullMessagesRequest(node=Node(node_id=other)))


def test_superlink_and_metrics_listen_on_the_loopback_alone(kit: ServerKit) -> None:
    wanted = {kit.control_port, kit.ops_port}
    found: dict[int, set[str]] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == "0A" and int(port, 16) in wanted:
                found.setdefault(int(port, 16), set()).add(address)
    assert found == {port: {"0100007F"} for port in wanted}


def test_a_task_is_not_taken_without_the_secret(kit: ServerKit) -> None:
    """Also on the server's own loopback: process isolation with a secret."""
    with httpx.Client(verify=kit.loopback_tls()) as client:
        answer = client.post(
            f"https://{kit.control_address}/v1/runtime/acquire-task",
            content=AcquireTaskRequest().SerializeToString(),
            headers={"content-type": "application/protobuf"},
        )
    assert answer.status_code in (401, 403)


# ---- the operator ---------------------------------------------------------------------------------------------------
def test_state_is_for_the_servers_user_alone(kit: ServerKit) -> None:
    for path in [
        kit.state,
        *(p for p in kit.state.rglob("*") if not p.relative_to(kit.state).parts[0].startswith("nginx")),
    ]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert (kit.state / server.DATABASE).stat().st_size > 0


def test_health_and_metrics(running: Path, kit: ServerKit) -> None:
    activate(running, "hospital-c")
    folder = kit.runs / "trial"
    folder.mkdir(exist_ok=True)
    row = {
        "round": 0,
        "asked": 3,
        "answered": 2,
        "quarantined": [{"client": 1, "reason": "not_finite", "message": "x"}],
    }
    row |= {"bytes_up": 70, "bytes_down": 30, "seconds": 1.5, "epsilon": 2.5, "student_accuracy": 0.75}
    (folder / "rounds.jsonl").write_text(json.dumps(row) + "\n")
    base = f"http://127.0.0.1:{kit.ops_port}"
    for path in ("/health/live", "/health/ready"):
        assert urllib.request.urlopen(base + path).status == 200
    text = urllib.request.urlopen(base + "/metrics").read().decode()
    for line in (
        'fedkd_gate_requests_total{action="activate-node",client="hospital-c",status="200"} 1.0',
        'fedkd_process_up{process="superlink"} 1.0',
        "fedkd_server_ready 1.0",
        'fedkd_run_rounds_total{outcome="completed",run="trial"} 1.0',
        'fedkd_run_bytes_total{direction="up",run="trial"} 70.0',
        'fedkd_run_quarantined_total{reason="not_finite",run="trial"} 1.0',
        'fedkd_run_epsilon{run="trial"} 2.5',
        'fedkd_run_round_seconds{run="trial"} 1.5',
    ):
        assert line in text.splitlines(), line
    done = CliRunner().invoke(app, ["server", "status", "--json", str(kit.folder)])
    status = json.loads(done.output)
    assert done.exit_code == 0 and status["ready"] and status["runs"][0]["quarantined"] == 1
    assert set(status["processes"]) == {"supervisor", "superlink", "superexec", "gate"}
    assert all(row["rss_bytes"] > 0 for row in status["processes"].values())


def test_nobody_starts_twice(kit: ServerKit) -> None:
    with pytest.raises(FedkdError, match="runs already, as process"):
        server.start(kit)
    with pytest.raises(FedkdError, match="runs already, as process"):
        server.run(kit, to_stderr=False)


def test_newcomers_and_revocations_reach_a_running_server(running: Path, kit: ServerKit) -> None:
    add_client(running, Newcomer(name="hospital-d"))
    until(lambda: "hospital-d" in nodes(kit), 60)
    assert activate(running, "hospital-d") > 0
    own = ClientKit.read(running / "hospital-d")
    with connected(own) as link:
        link.sendall(request(own, headers=HEADERS))
        assert status_of(receive(link)) == 401
        revoke(running, "hospital-d")
        with suppress(OSError):
            assert link.recv(1) == b""
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        activate(running, "hospital-d")
    until(lambda: nodes(kit)["hospital-d"] == "unregistered", 60)


@pytest.mark.slow
def test_a_killed_superlink_comes_back_with_its_nodes(running: Path, kit: ServerKit) -> None:
    """kill -9 of SuperLink, then of the gate: both come back, and the devices' registrations are still there."""
    before = activate(running, "hospital-a")
    for name in ("superlink", "gate"):
        row = server.status(kit)["processes"][name]
        Process(row["pid"], row["began"]).signal(signal.SIGKILL)
        until(lambda name=name: server.status(kit)["processes"][name]["restarts"] == 1, 60)  # type: ignore[misc]
        until(lambda: server.status(kit)["ready"], 60)
    assert activate(running, "hospital-a") == before


@pytest.mark.slow
def test_a_supervisor_that_was_killed_leaves_nothing_that_is_in_the_way(running: Path, kit: ServerKit) -> None:
    """A power cut of the whole server: it starts again on the same state, with the same nodes; and stops cleanly."""
    before = activate(running, "hospital-a")
    rows = server.status(kit)["processes"]
    Process(rows["supervisor"]["pid"], rows["supervisor"]["began"]).signal(signal.SIGKILL)
    until(lambda: not server.status(kit)["running"])
    assert server.start(kit)["ready"]
    assert not any(Process(r["pid"], r["began"]).alive for r in rows.values())
    assert activate(running, "hospital-a") == before
    rows = server.status(kit)["processes"]
    assert CliRunner().invoke(app, ["server", "stop", str(kit.folder)]).output.strip() == "server stopped"
    assert not any(Process(r["pid"], r["began"]).alive for r in rows.values())
    done = CliRunner().invoke(app, ["server", "status", str(kit.folder)])
    assert done.exit_code == 1 and "not running" in done.output
    assert not server.stop(kit)


# ---- what keeps a server from starting --------------------------------------------------------------------------------
def test_a_taken_port_is_named(tmp_path: Path) -> None:
    kit = ServerKit.read(make_kits(tmp_path, limits="{min_free_mib: 0}") / "server")
    with (
        socket.create_server(("127.0.0.1", kit.control_port)),
        pytest.raises(FedkdError, match=f"cannot listen on 127.0.0.1:{kit.control_port}"),
    ):
        server.start(kit)
    assert not server.status(kit)["running"]


@pytest.mark.fault(17, "`server start` refuses and says to make room")
def test_fault_17_a_full_disk_is_named_before_anything_starts(tmp_path: Path) -> None:
    limit = shutil.disk_usage(tmp_path).total // 2**20 + 1
    kit = ServerKit.read(make_kits(tmp_path, limits=f"{{min_free_mib: {limit}}}") / "server")
    with pytest.raises(FedkdError, match="make room"):
        server.start(kit)


@pytest.mark.fault(17, "`server start` refuses a state that it cannot write")
def test_fault_17_a_state_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    kit = ServerKit.read(make_kits(tmp_path, limits="{min_free_mib: 0}") / "server")
    (kit.state / ".probe").mkdir()
    with pytest.raises(FedkdError, match="cannot write to"):
        server.start(kit)
