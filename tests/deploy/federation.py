"""A whole federation on loopback, for tests: kits, SuperLink and SuperExec as `fedkd server start` runs them, and nodes.

Devices reach SuperLink itself here, not through the gate, which has tests of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedkd.deploy.kit import ServerKit
from fedkd.deploy.provision import provision

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
    "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Federation:
    """Kits in ``root/kits``; ends what it started when it is closed."""

    def __init__(
        self, root: Path, clients: int, data: Mapping[str, Any], policy: Mapping[str, Any] | None = None
    ) -> None:
        self.root, self.names = root, [f"client-{k}" for k in range(clients)]
        _, control, ops = free_ports(3)
        # The gate's port is SuperLink's: what a device sees is the fleet API without the gate before it.
        project = {
            "project": "trial",
            "server": {"host": "127.0.0.1", "port": control, "control_port": control + 1, "ops_port": ops},
            "data": data,
            "clients": self.names,
        }
        if policy is not None:
            project["policy"] = policy
        root.mkdir(parents=True, exist_ok=True)
        (root / "project.yaml").write_text(yaml.safe_dump(project))
        provision(root / "project.yaml", root / "kits")
        server = root / "kits/server/server.yaml"
        server.write_text(
            server.read_text()
            .replace(f"port: {control}\n", f"port: {control + 1}\n", 1)
            .replace(f"control_port: {control + 1}", f"control_port: {control}")
        )
        self.kit = ServerKit.read(root / "kits/server")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *rest: object) -> None:
        for name in [n for n in self.processes if n not in ("superlink", "superexec")]:
            self.end(name)
        for name in list(self.processes):
            self.end(name)

    def folder(self, client: int) -> Path:
        """Return a client's kit."""
        return self.root / "kits" / self.names[client]

    def start(self, name: str, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, its output in ``root/<name>.log``."""
        with open(self.root / f"{name}.log", "ab") as out:
            process = subprocess.Popen(
                command,
                cwd=cwd or self.root,
                env={**os.environ, **ENVIRONMENT, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def end(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """End a process and all that it started."""
        process = self.processes.pop(name, None)
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            process.wait(30)

    def start_server(self) -> None:
        """Start SuperLink and SuperExec, and register the clients."""
        kit, secret = self.kit, str(self.kit.path("superexec.secret"))
        env = {"FEDKD_KIT": str(kit.folder), "FLWR_HOME": str(kit.state / "flwr")}
        self.start(
            "superlink", str(BIN / "flower-superlink"),
            "--ssl-ca-certfile", str(kit.path("ca.crt")), "--ssl-certfile", str(kit.path("loopback.crt")),
            "--ssl-keyfile", str(kit.path("loopback.key")), "--enable-supernode-auth",
            "--database", str(kit.state / "superlink.db"), "--isolation", "process",
            "--superexec-auth-secret-file", secret, "--host", "127.0.0.1", "--port", str(kit.control_port),
            cwd=kit.state, **env,
        )  # fmt: skip
        self._register()
        self.start(
            "superexec", str(BIN / "flower-superexec"), "--runtime-api-address", kit.control_address,
            "--root-certificates", str(kit.path("ca.crt")), "--superexec-auth-secret-file", secret,
            cwd=kit.state, **env,
        )  # fmt: skip

    def _register(self) -> None:
        from flwr.proto.control_pb2 import RegisterNodeRequest

        from fedkd.deploy.control import Control, ControlError

        end = time.monotonic() + 60
        for client in self.kit.client_list().clients:
            while True:
                control = Control(self.kit)
                try:
                    request = RegisterNodeRequest(public_key=client.node_key_pem, name=client.name)
                    control._call(lambda control=control, request=request: control._client.RegisterNode(request))
                    break
                except ControlError as cause:
                    if "409" in str(cause) or "in use" in str(cause).lower():
                        break
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.2)
                finally:
                    control.close()

    def start_client(self, client: int) -> None:
        """Start a lean node."""
        name = self.names[client]
        self.start(name, sys.executable, "-m", "fedkd", "client", "start", str(self.folder(client)), "--foreground")

    def log(self, name: str) -> str:
        """Return what a process has said."""
        return (self.root / f"{name}.log").read_text(errors="replace")
