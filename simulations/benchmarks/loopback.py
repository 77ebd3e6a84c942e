"""A whole federation on this machine's loopback, for the commands that measure or maltreat one.

Kits are made by `fedkd provision`, servers and nodes are started as `fedkd server start` and `fedkd client start` do. All of
it lies in one folder, and every process is known by its pid and the moment it began, so that none but its own is ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedkd.deploy import client, server
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.provision import provision
from fedkd.deploy.supervise import PidFile, Process, detach, environment_of, executable
from fedkd.deploy.tunnel import TRUSTED
from fedkd.errors import ConfigError


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with contextlib.ExitStack() as open:
        sockets = [open.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(s.getsockname()[1]) for s in sockets]


def wait_for_port(port: int, seconds: float = 60) -> None:
    """Wait until somebody listens on a port of the loopback.

    Raises:
        TimeoutError: nobody does.
    """
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if time.monotonic() > end:
            raise TimeoutError(f"nobody listens on port {port} after {seconds:.0f} s")
        time.sleep(0.1)


class Loopback:
    """A server and ``clients`` nodes below ``folder``; all are ended when it is left.

    Args:
        data: data.yaml of every client. policy: policy.yaml of every client, the default one if None.
        limits: of server.yaml. poll: of client.yaml.
    """

    def __init__(
        self,
        folder: Path,
        clients: int,
        data: Mapping[str, Any],
        *,
        policy: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        port, control, ops = free_ports(3)
        names = [f"client-{k}" for k in range(clients)]
        project: dict[str, Any] = {
            "project": "loopback",
            "server": {
                "host": "127.0.0.1", "listen": "127.0.0.1", "port": port, "control_port": control, "ops_port": ops,
                "limits": {"min_free_mib": 0, **(limits or {})},
            },
            "data": dict(data),
            "clients": names,
        }  # fmt: skip
        if policy is not None:
            project["policy"] = dict(policy)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "project.yaml").write_text(yaml.safe_dump(project))
        provision(folder / "project.yaml", folder / "kits")
        self.kit = ServerKit.read(folder / "kits/server")
        self.clients = [ClientKit.read(folder / "kits" / name) for name in names]
        self._began = dict[str, Process]()
        self._groups: list[subprocess.Popen[bytes]] = []
        # One thread each: more processes than cores, and the student is the one-thread simulator's to the last bit.
        os.environ["OMP_NUM_THREADS"] = "1"

    def __enter__(self) -> Loopback:
        # So that whoever ends this command by SIGTERM ends its processes, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *rest: object) -> None:
        # The stock nodes' SuperExec and SuperNode before the tunnel.
        for group in reversed(self._groups):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGTERM)
            try:
                group.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(group.pid, signal.SIGKILL)
                group.wait()
        for kit in self.clients:
            client.stop(kit)
        server.stop(self.kit)
        # What a supervisor that was killed by force left behind is no longer in its status.
        for process in self._began.values():
            process.stop(5)

    def start(self) -> None:
        """Start whatever does not run."""
        self.start_server()
        for kit in self.clients:
            self.start_client(kit)

    def start_server(self) -> None:
        """Start the server unless it runs; returns when it is ready."""
        if not server.status(self.kit)["running"]:
            server.start(self.kit)
        self.processes()

    def start_client(self, kit: ClientKit) -> None:
        """Start a node unless it runs."""
        if not client.status(kit)["running"]:
            client.start(kit)

    def start_stock(self, kit: ClientKit) -> dict[str, Process]:
        """Start Flower's own SuperNode for a kit, with the tunnel and the SuperExec that docs/deploy.md sets beside it.

        Returns:
            The three processes by name. ClientApps, which SuperExec starts, are in its process group.
        """
        tunnel, runtime = free_ports(2)
        secret = kit.state / "superexec.secret"
        secret.write_bytes(secrets.token_bytes(32))
        secret.chmod(0o600)
        api = f"127.0.0.1:{runtime}"
        commands = {
            "tunnel": [sys.executable, "-m", "fedkd", "client", "tunnel", str(kit.folder), "--port", str(tunnel)],
            "supernode": [
                executable("flower-supernode"), "--superlink", f"127.0.0.1:{tunnel}",
                "--root-certificates", str(kit.state / TRUSTED),
                "--auth-supernode-private-key", str(kit.path("node.key")), "--isolation", "process",
                "--port", str(runtime), "--superexec-auth-secret-file", str(secret),
            ],
            "superexec": [
                executable("flower-superexec"), "--insecure", "--runtime-api-address", api,
                "--superexec-auth-secret-file", str(secret),
            ],
        }  # fmt: skip
        found = {}
        for name, command in commands.items():
            started = detach(command, kit.state / "logs" / f"{name}.log", environment_of(kit.folder))
            self._groups.append(started)
            process = Process.of(started.pid)
            assert process is not None, f"{name} ended at once: see {kit.state}/logs/{name}.log"
            found[name] = process
            if name == "tunnel":
                wait_for_port(tunnel)
        return found

    def processes(self) -> dict[str, Process]:
        """Return the processes that run now: the server's by name, and the nodes by their kits' names."""
        found = {}
        for name, row in server.status(self.kit)["processes"].items():
            if row["pid"] is not None:
                found[name] = Process(int(row["pid"]), float(row["began"]))
        for kit in self.clients:
            node = PidFile(kit.state / client.PID).read()
            if node is not None:
                found[kit.name] = node
        self._began |= {f"{name} {p.pid}": p for name, p in found.items()}
        return {name: p for name, p in found.items() if p.alive}


def digits(clients: int, *, proxy: int | None, seed: int = 1) -> dict[str, Any]:
    """Return a data.yaml by which each client takes its part of the digits, as a simulation of that seed deals them.

    ``proxy``: samples that are held out for the proxy set; None where the method has none.
    """
    part: dict[str, Any] = {"index": "{id}", "seed": seed, "partition": {"clients": clients, "alpha": 0.5}}
    if proxy is not None:
        part["proxy"] = {"size": proxy}
    return {"data": {"source": "digits"}, "part": part}


@contextlib.contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """Give a new folder that is removed afterwards, or ``folder``, which stays.

    Raises:
        ConfigError: ``folder`` is in use.
    """
    import tempfile

    if folder is None:
        with tempfile.TemporaryDirectory(prefix="fedkd-", ignore_cleanup_errors=True) as made:
            yield Path(made)
        return
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: choose another --work folder")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
