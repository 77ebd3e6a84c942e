"""The server: SuperLink, one SuperExec and the gate, started again whenever one of them ends.

SuperLink runs in process isolation with a secret, on the loopback, with its state on disk. It runs no code of an app
itself; SuperExec takes a run's task by the secret and starts the ServerApp.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedkd.deploy.enrol import NODES
from fedkd.deploy.kit import LOOPBACK, ServerKit
from fedkd.deploy.log import event, setup_log
from fedkd.deploy.ops import ONLINE_SECONDS, STATUS, latest_runs, read_status
from fedkd.deploy.supervise import (
    Child,
    PidFile,
    Process,
    SuperviseError,
    detach,
    environment_of,
    executable,
    rotate,
    rss_bytes,
    stop_process,
)
from fedkd.errors import FedkdError
from fedkd.storage import StorageError, write_json

MIB = 2**20
DATABASE = "superlink.db"
TICK_SECONDS = 0.25
STATUS_SECONDS = 2.0
HEALTH_SECONDS = 2.0
HUNG_SECONDS = 90.0
"""A SuperLink that answers no health check for this long, while it runs, is started again."""
STOP_SECONDS = {"gate": 5.0, "superexec": 10.0, "superlink": 15.0}
"""In this order: no new requests, then no new tasks, then the state."""
READY_SECONDS = 120.0
LOG_BYTES = 10 * MIB


def pid_file(kit: ServerKit) -> PidFile:
    """Return who runs this server."""
    return PidFile(kit.state / "server.pid")


class Supervisor:
    """Runs in the foreground until it is told to stop."""

    def __init__(self, kit: ServerKit, log: logging.Logger) -> None:
        self.kit, self.log = kit, log
        self.phase = "starting"
        self._stop = False
        self._began = time.time()
        logs = kit.state / "logs"
        environment = environment_of(kit.folder)
        authority, secret = str(kit.path("ca.crt")), str(kit.path("superexec.secret"))
        superlink = [executable("flower-superlink"), "--host", LOOPBACK, "--port", str(kit.control_port)]
        superlink += ["--ssl-ca-certfile", authority, "--ssl-certfile", str(kit.path("loopback.crt"))]
        superlink += ["--ssl-keyfile", str(kit.path("loopback.key")), "--enable-supernode-auth"]
        superlink += ["--database", str(kit.state / DATABASE), "--isolation", "process"]
        superlink += ["--superexec-auth-secret-file", secret, "--disable-runtime-dependency-installation"]
        superexec = [executable("flower-superexec"), "--runtime-api-address", kit.control_address]
        superexec += ["--root-certificates", authority, "--superexec-auth-secret-file", secret]
        superexec += ["--parent-pid", str(os.getpid())]
        gate = [sys.executable, "-m", "fedkd.deploy.gate", str(kit.folder)]
        commands = {"superlink": superlink, "superexec": superexec, "gate": gate}
        self.children = {
            name: Child(name, command, logs / f"{name}.log", environment, kit.state)
            for name, command in commands.items()
        }
        self._environment = environment
        self._tls = kit.loopback_tls()
        self._healthy: int | None = None
        """The pid of the SuperLink that answered."""
        self._answered = time.monotonic()
        self._enrolled: tuple[int, int] | None = None
        """(SuperLink's pid, stamp of clients.yaml) that the nodes were last matched to."""

    # ---- main loop --------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Supervise until SIGTERM or SIGINT.

        Raises:
            FedkdError: the server cannot start at all.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_stop)
        self._end_leftovers()
        file = pid_file(self.kit)
        file.take()
        event(self.log, "server.starting", port=self.kit.port)
        next_health = next_status = 0.0
        try:
            while not self._stop:
                self._watch()
                now = time.monotonic()
                if now >= next_health:
                    self._look_at_superlink()
                    self._enrol_if_changed()
                    next_health = time.monotonic() + (HEALTH_SECONDS if self.phase == "ready" else TICK_SECONDS)
                if self._update_phase() or now >= next_status:
                    self._write_status()
                    next_status = now + STATUS_SECONDS
                    for child in self.children.values():
                        rotate(child.log, LOG_BYTES)
                time.sleep(TICK_SECONDS)
        finally:
            self._end()
            file.leave()

    def _asked_to_stop(self, number: int, frame: object) -> None:
        self._stop = True

    def _watch(self) -> None:
        for name, child in self.children.items():
            # Nothing can be done for the others before SuperLink answers.
            if name == "superexec" and self._healthy is None:
                continue
            happened = child.watch()
            if happened == "started":
                event(self.log, "process.started", process=name, pid=child.process.pid if child.process else None)
            elif happened:
                if name == "superlink":
                    self._healthy = None
                said = child.log_tail
                event(self.log, "process.ended", level=logging.ERROR, process=name, how=happened, said=said)

    def _look_at_superlink(self) -> None:
        process = self.children["superlink"].process
        if process is None:
            self._answered = time.monotonic()
            return
        if healthy(self.kit.control_port, self._tls):
            if self._healthy != process.pid:
                event(self.log, "superlink.answers", pid=process.pid)
            self._healthy, self._answered = process.pid, time.monotonic()
        elif self._healthy == process.pid and time.monotonic() - self._answered > HUNG_SECONDS:
            event(self.log, "superlink.hangs", level=logging.ERROR, pid=process.pid)
            process.signal(signal.SIGKILL)
            self._answered = time.monotonic()

    def _enrol_if_changed(self) -> None:
        """Match SuperLink's nodes to clients.yaml, after each start of SuperLink and each change of the file."""
        if self._healthy is None:
            return
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            stamp = (self._healthy, self.kit.path("clients.yaml").stat().st_mtime_ns)
            if stamp == self._enrolled:
                return
            command = [sys.executable, "-m", "fedkd.deploy.enrol", str(self.kit.folder)]
            done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=120)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or [""])[-1]
                event(self.log, "clients.not_enrolled", level=logging.ERROR, said=said)
                return
            self._enrolled = stamp
            event(self.log, "clients.enrolled", clients=len(json.loads(done.stdout)))

    def _update_phase(self) -> bool:
        running = all(child.process is not None for child in self.children.values())
        ready = running and self._healthy is not None and self._enrolled is not None
        ready = ready and self._enrolled is not None and self._enrolled[0] == self._healthy
        ready = ready and _accepts(self.kit.ops_port)
        phase = "ready" if ready else "starting" if self.phase == "starting" else "degraded"
        changed = phase != self.phase
        if changed:
            event(self.log, f"server.{phase}", seconds=round(time.time() - self._began, 1))
        self.phase = phase
        return changed

    def _write_status(self) -> None:
        processes: dict[str, Any] = {"supervisor": _row(Process.of(os.getpid()), time.time() - self._began, 0)}
        for name, child in self.children.items():
            processes[name] = _row(child.process, child.up_seconds, child.restarts)
        status = {"at": time.time(), "since": self._began, "phase": self.phase, "processes": processes}
        try:
            write_json(self.kit.state / STATUS, status)
        except StorageError as cause:
            event(self.log, "status.unwritten", level=logging.ERROR, reason=str(cause))

    # ---- ends -------------------------------------------------------------------------------------------------------
    def _end_leftovers(self) -> None:
        """End what a supervisor that was killed by force has left behind."""
        if pid_file(self.kit).read() is not None:
            return
        for name, row in read_status(self.kit).get("processes", {}).items():
            with contextlib.suppress(KeyError, TypeError, ValueError):
                left = Process(int(row["pid"]), float(row["began"]))
                if left.stop(STOP_SECONDS.get(name, 5.0)):
                    event(self.log, "process.left_over", level=logging.WARNING, process=name, pid=left.pid)

    def _end(self) -> None:
        self.phase = "stopping"
        self._write_status()
        for name, patience in STOP_SECONDS.items():
            self.children[name].ask_to_stop()
            self.children[name].wait(patience)
        with contextlib.suppress(OSError):
            (self.kit.state / STATUS).unlink(missing_ok=True)
        event(self.log, "server.stopped")


def _row(process: Process | None, up_seconds: float, restarts: int) -> dict[str, Any]:
    return {
        "pid": process.pid if process else None,
        "began": process.began if process else None,
        "up_seconds": round(up_seconds, 1),
        "restarts": restarts,
        "rss_bytes": rss_bytes(process.pid) if process else None,
    }


def healthy(port: int, tls: ssl.SSLContext) -> bool:
    """Tell whether SuperLink answers its health check."""
    link = http.client.HTTPSConnection(LOOPBACK, port, timeout=5, context=tls)
    try:
        link.request("GET", "/health")
        return link.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()


def _accepts(port: int) -> bool:
    return _get(port, "/health/live") is not None


def _get(port: int, target: str) -> bytes | None:
    """Return what the loopback's health and metrics endpoint says, None if it is not there."""
    link = http.client.HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        link.request("GET", target)
        answer = link.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        link.close()


# ---- commands -------------------------------------------------------------------------------------------------------
def check(kit: ServerKit) -> None:
    """Refuse to start what could not work, with the reason.

    Raises:
        FedkdError: the doctor finds a problem that stays, the state cannot be written, the disk is full, or a port is taken.
    """
    from fedkd.deploy.doctor import refuse
    from fedkd.deploy.gate import listen

    refuse(kit)
    probe = kit.state / ".probe"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as cause:
        raise FedkdError(f"cannot write to {kit.state}: {cause.strerror}. The server keeps its state there") from cause
    free = shutil.disk_usage(kit.state).free
    if free < kit.limits.min_free_mib * MIB:
        raise FedkdError(
            f"{kit.state} has room for {free // MIB} MiB, less than limits.min_free_mib ({kit.limits.min_free_mib}): "
            "make room, or uploads would be refused"
        )
    kit.client_list()
    kit.loopback_tls()
    kit.gate_tls()
    ports = [(LOOPBACK, kit.control_port), (LOOPBACK, kit.ops_port)]
    for host, port in ports + ([(kit.listen, kit.port)] if kit.gate == "builtin" else []):
        listen(host, port).close()


def run(kit: ServerKit, *, to_stderr: bool) -> None:
    """Run the server in this process until it is told to stop.

    Raises:
        FedkdError: it cannot start, or runs already.
    """
    # Keys, states and logs are for the server's user alone; the database keeps freed pages of what devices sent.
    os.umask(0o077)
    other = pid_file(kit).read()
    if other is not None:
        raise SuperviseError(f"the server of {kit.folder} runs already, as process {other.pid}")
    log = setup_log("server", None if to_stderr else kit.state / "logs")
    supervisor = Supervisor(kit, log)
    supervisor._end_leftovers()
    check(kit)
    kit.runs.mkdir(exist_ok=True)
    (kit.state / "logs").mkdir(exist_ok=True)
    supervisor.run()


def start(kit: ServerKit) -> dict[str, Any]:
    """Start the server in the background and wait until devices can be served.

    Returns:
        Its status.
    Raises:
        FedkdError: it did not come up; the reason is what it said last.
    """
    other = pid_file(kit).read()
    if other is not None:
        raise SuperviseError(f"the server of {kit.folder} runs already, as process {other.pid}")
    with contextlib.suppress(OSError):
        (kit.state / STATUS).unlink(missing_ok=True)
    log = kit.state / "logs" / "start.log"
    log.parent.mkdir(mode=0o700, exist_ok=True)
    log.unlink(missing_ok=True)
    process = detach([sys.executable, "-m", "fedkd.deploy.server", str(kit.folder)], log)
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise SuperviseError(said[-1].removeprefix("error: "))
        if read_status(kit).get("phase") == "ready":
            return status(kit)
        time.sleep(0.1)
    raise SuperviseError(
        f"the server runs, but was not ready after {READY_SECONDS:.0f} s; see `fedkd server status` and {log.parent}"
    )


def stop(kit: ServerKit) -> bool:
    """Stop the server; returns whether it ran."""
    return stop_process(pid_file(kit), sum(STOP_SECONDS.values()) + 10)


def status(kit: ServerKit) -> dict[str, Any]:
    """Return how the server is; see docs/deploy.md for the keys."""
    process = pid_file(kit).read()
    known = read_status(kit) if process is not None else {}
    answer = _get(kit.ops_port, "/status") if process is not None else None
    gate = json.loads(answer) if answer is not None else {}
    nodes: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        nodes = json.loads((kit.state / NODES).read_text())
    seen = gate.get("last_seen_seconds", {})
    clients = []
    for client in kit.client_list().clients:
        age = seen.get(client.name)
        online = age is not None and age < ONLINE_SECONDS
        state = "revoked" if client.revoked else "online" if online else "offline"
        clients.append(
            {
                "name": client.name,
                "id": client.id,
                "node_id": nodes.get(client.name),
                "status": state,
                "last_seen_seconds": age,
                "bytes_today": gate.get("bytes_today", {}).get(client.name, 0),
            }
        )
    unready = gate.get("unready", ["the gate does not answer"]) if process is not None else ["it is not running"]
    return {
        "running": process is not None,
        "ready": process is not None and not unready,
        "unready": unready,
        "phase": known.get("phase", "stopped"),
        "since": known.get("since"),
        "address": f"{kit.host}:{kit.port}",
        "processes": known.get("processes", {}),
        "clients": clients,
        "runs": [
            {
                "name": name,
                "rounds": len(run.rounds),
                "student_accuracy": run.rounds[-1].student_accuracy if run.rounds else None,
                "epsilon": run.rounds[-1].epsilon if run.rounds else None,
                "quarantined": sum(len(row.quarantined) for row in run.rounds),
            }
            for name, run in latest_runs(kit.runs)
        ],
        "disk_free_bytes": shutil.disk_usage(kit.state).free,
    }


def main() -> None:
    """Run the server of the kit named on the command line; `fedkd server start` starts this."""
    try:
        run(ServerKit.read(Path(sys.argv[1])), to_stderr=False)
    except FedkdError as cause:
        sys.exit(f"error: {cause}")


if __name__ == "__main__":
    main()
