"""`fedkd client start|stop|status`: a device's process, on its own or at the terminal."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedkd.deploy.kit import ClientKit
from fedkd.deploy.supervise import PidFile, SuperviseError, detach, rss_bytes, stop_process
from fedkd.errors import ConfigError

PID, OUTPUT, LOGS = "client.pid", "logs/output.log", "logs"
START_SECONDS, STOP_SECONDS = 120.0, 20.0


def run(kit: ClientKit) -> None:
    """Be this kit's node until SIGTERM or Ctrl-C.

    Raises:
        ConfigError: data.yaml or policy.yaml cannot be used. SuperviseError: the kit is in use.
    """
    from fedkd.deploy.device import Device
    from fedkd.deploy.log import setup_log
    from fedkd.deploy.node import Node
    from fedkd.deploy.policy import read_policy

    log = setup_log("client", kit.state / LOGS)
    pid = PidFile(kit.state / PID)
    pid.take()
    with _while_alive(pid):
        policy = read_policy(kit.path("policy.yaml"))
        device = Device(kit)
        node = Node(kit, device, max_request_bytes=policy.max_request_bytes, max_bytes_per_day=policy.max_bytes_per_day)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: node.ask_to_stop())
        log.info("started for %s as client %d of %s", kit.name, kit.id, kit.server_address)
        with contextlib.ExitStack() as stack:
            stack.callback(node.close)
            if kit.ops_port is not None:
                from fedkd.deploy.nodeops import NodeOps

                stack.callback(NodeOps(node, kit.ops_port).close)
            node.run()
        log.info("stopped")


@contextlib.contextmanager
def _while_alive(pid: PidFile) -> Iterator[None]:
    try:
        yield
    finally:
        pid.leave()


def check(kit: ClientKit) -> None:
    """Refuse a kit that could never work. In a process of its own: the node does not keep the memory that it takes.

    Raises:
        ConfigError: what is wrong and how to mend it.
    """
    command = [sys.executable, "-m", "fedkd.deploy.doctor", str(kit.folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the check of {kit.folder} ended with code {done.returncode}"]
        raise ConfigError(said[-1].removeprefix("error: "))


def start(kit: ClientKit) -> int:
    """Start the node in the background; returns its pid once it works.

    Raises:
        SuperviseError: it ended at once, for the reason given, or the kit is in use.
    """
    file = PidFile(kit.state / PID)
    other = file.read()
    if other is not None:
        raise SuperviseError(f"{kit.folder} is in use already, by process {other.pid}")
    output = kit.state / OUTPUT
    size = output.stat().st_size if output.exists() else 0
    command = [sys.executable, "-m", "fedkd", "client", "start", str(kit.folder), "--foreground", "--unchecked"]
    process = detach(command, output)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        working = file.read()
        if working is not None and working.pid == process.pid:
            return process.pid
        if process.poll() is not None:
            words = output.read_bytes()[size:].decode(errors="replace").strip().splitlines()
            raise SuperviseError(f"the client ended at once: {words[-1] if words else 'it gave no reason'}")
        time.sleep(0.05)
    raise SuperviseError(f"the client did not start within {START_SECONDS:.0f} s: see {output}")


def stop(kit: ClientKit) -> bool:
    """Stop the node; returns whether it was running."""
    return stop_process(PidFile(kit.state / PID), STOP_SECONDS)


def status(kit: ClientKit) -> dict[str, Any]:
    """Return how the node is, as plain data."""
    from fedkd.deploy.node import NODE, USAGE

    process = PidFile(kit.state / PID).read()
    return {
        "name": kit.name,
        "id": kit.id,
        "server": kit.server_address,
        "running": process is not None,
        "pid": None if process is None else process.pid,
        "rss_bytes": None if process is None else rss_bytes(process.pid),
        "node_id": _read(kit.state / NODE).get("node"),
        "bytes_today": _read(kit.state / USAGE).get("bytes", 0),
        "runs": sorted(p.name for p in (kit.state / "runs").glob("*") if p.is_dir()),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
