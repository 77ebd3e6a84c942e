"""What an operator's tools read, on the loopback alone: /health/live, /health/ready, /metrics and /status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedkd.deploy.kit import ServerKit
from fedkd.errors import FedkdError
from fedkd.report.runfolder import Run

if TYPE_CHECKING:
    from fedkd.deploy.gate import Gate

STATUS = "status.json"
REQUEST_SECONDS = 10.0
RUNS_SHOWN = 20
ONLINE_SECONDS = 60.0
STALE_SECONDS = 15.0
"""The supervisor writes its status every few seconds; an older one is a dead supervisor's."""


class GateMetrics:
    """What the gate counts. Labels are clients that the server knows, actions and reasons: never what a peer wrote."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fedkd_gate_requests", "Requests of devices.", ["client", "action", "status"], registry=self.registry
        )
        self.bytes = Counter(
            "fedkd_gate_bytes", "Bytes of bodies that passed.", ["client", "direction"], registry=self.registry
        )
        self.refused = Counter("fedkd_gate_refused", "What was refused, and why.", ["reason"], registry=self.registry)
        self.seconds = Histogram(
            "fedkd_gate_request_seconds",
            "Time from a request's head to the end of its answer.",
            ["action"],
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
            registry=self.registry,
        )
        self.connections = Gauge("fedkd_gate_connections", "Open connections.", registry=self.registry)


class RunMetrics(Collector):
    """Rounds, bytes, seconds, quarantines and epsilon of the latest runs, read from their folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        rounds = CounterMetricFamily("fedkd_run_rounds", "Rounds that are done.", labels=["run", "outcome"])
        size = CounterMetricFamily("fedkd_run_bytes", "Encoded bytes of all rounds.", labels=["run", "direction"])
        seconds = CounterMetricFamily("fedkd_run_seconds", "Wall-clock time of all rounds.", labels=["run"])
        latest = GaugeMetricFamily("fedkd_run_round_seconds", "Wall-clock time of the last round.", labels=["run"])
        quarantined = CounterMetricFamily(
            "fedkd_run_quarantined", "Uploads that failed validation.", labels=["run", "reason"]
        )
        answered = GaugeMetricFamily("fedkd_run_answered", "Answers used in the last round.", labels=["run"])
        epsilon = GaugeMetricFamily("fedkd_run_epsilon", "Privacy spent; +Inf: nothing protects.", labels=["run"])
        accuracy = GaugeMetricFamily("fedkd_run_student_accuracy", "On the test set, 0 to 1.", labels=["run"])
        for name, run in latest_runs(self.folder):
            done = run.rounds
            failed = sum(1 for row in done if row.failed is not None)
            rounds.add_metric([name, "completed"], len(done) - failed)
            rounds.add_metric([name, "failed"], failed)
            size.add_metric([name, "up"], sum(row.bytes_up for row in done))
            size.add_metric([name, "down"], sum(row.bytes_down for row in done))
            seconds.add_metric([name], sum(row.seconds for row in done))
            reasons: dict[str, int] = {}
            for row in done:
                for entry in row.quarantined:
                    reasons[str(entry.reason)] = reasons.get(str(entry.reason), 0) + 1
            for reason, count in sorted(reasons.items()):
                quarantined.add_metric([name, reason], count)
            if done:
                latest.add_metric([name], done[-1].seconds)
                if done[-1].raw.get("answered") is not None:
                    answered.add_metric([name], done[-1].answered)
                spent = done[-1].epsilon
                epsilon.add_metric([name], float("inf") if spent is None else spent)
                if done[-1].student_accuracy is not None:
                    accuracy.add_metric([name], done[-1].student_accuracy)
        yield from (rounds, size, seconds, latest, quarantined, answered, epsilon, accuracy)


def latest_runs(folder: Path) -> Iterator[tuple[str, Run]]:
    """Return the runs that were written to last; one that cannot be read is left out."""
    try:
        found = [(p.stat().st_mtime, p.parent) for p in folder.glob("*/rounds.jsonl")]
    except OSError:
        return
    for _, run in sorted(found, reverse=True)[:RUNS_SHOWN]:
        with contextlib.suppress(FedkdError, OSError):
            yield run.name, Run.read(run)


class ServerMetrics(Collector):
    """The server's processes and its disk."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("fedkd_process_up", "1 while the process runs.", labels=["process"])
        restarts = CounterMetricFamily("fedkd_process_restarts", "Restarts of the process.", labels=["process"])
        memory = GaugeMetricFamily("fedkd_process_memory_bytes", "Resident memory.", labels=["process"])
        for name, process in self._ops.supervisor().get("processes", {}).items():
            up.add_metric([name], float(process["pid"] is not None))
            restarts.add_metric([name], process["restarts"])
            if process["rss_bytes"] is not None:
                memory.add_metric([name], process["rss_bytes"])
        yield from (up, restarts, memory)
        yield GaugeMetricFamily("fedkd_disk_free_bytes", "Room on the state's disk.", value=self._ops.disk_free())
        ready = not self._ops.unready()
        yield GaugeMetricFamily("fedkd_server_ready", "1 while devices can be served.", value=float(ready))
        online = sum(1 for seen in dict(self._ops.gate.last_seen).values() if time.time() - seen < ONLINE_SECONDS)
        yield GaugeMetricFamily("fedkd_clients_online", "Clients heard of in the last minute.", value=float(online))


class Ops:
    """Serves the operator's tools."""

    def __init__(self, kit: ServerKit, gate: Gate, metrics: GateMetrics) -> None:
        self.kit, self.gate, self.metrics = kit, gate, metrics
        metrics.registry.register(RunMetrics(kit.runs))
        metrics.registry.register(ServerMetrics(self))

    def supervisor(self) -> dict[str, Any]:
        """Return what the supervisor last wrote."""
        return read_status(self.kit)

    def disk_free(self) -> int:
        """Bytes of room."""
        return shutil.disk_usage(self.kit.state).free

    def unready(self) -> list[str]:
        """Return why devices cannot be served; nothing if they can."""
        status = self.supervisor()
        reasons = []
        if not status or time.time() - float(status["at"]) > STALE_SECONDS:
            reasons.append("the supervisor is gone")
        elif status["phase"] != "ready":
            reasons.append(f"the server is {status['phase']}")
        if self.gate.disk_low:
            reasons.append("the disk is nearly full")
        return reasons

    def status(self) -> dict[str, Any]:
        """Return what `fedkd server status` adds to the supervisor's view."""
        now = time.time()
        return {
            "unready": self.unready(),
            "last_seen_seconds": {name: round(now - at, 1) for name, at in dict(self.gate.last_seen).items()},
            "bytes_today": {name: self.gate.usage.sent(name) for name in self.gate.members.names},
            "disk_free_bytes": self.disk_free(),
        }

    async def serve(self, listener: socket.socket) -> None:
        """Answer until cancelled."""
        server = await asyncio.start_server(self._connection, sock=listener)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=8192)
        with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
            async with asyncio.timeout(REQUEST_SECONDS):
                while (found := http.next_event()) is h11.NEED_DATA:
                    http.receive_data(await reader.read(8192))
                if isinstance(found, h11.Request):
                    status, kind, body = await asyncio.to_thread(self.answer, found.method, found.target)
                    headers = [("content-type", kind), ("content-length", str(len(body))), ("connection", "close")]
                    for part in (
                        h11.Response(status_code=status, headers=headers),
                        h11.Data(data=body if found.method == b"GET" else b""),
                        h11.EndOfMessage(),
                    ):
                        writer.write(http.send(part) or b"")
                    await writer.drain()
        writer.close()

    def answer(self, method: bytes, target: bytes) -> tuple[int, str, bytes]:
        """Return status, content type and body."""
        plain = "text/plain; charset=utf-8"
        if method != b"GET":
            return 405, plain, b""
        if target == b"/health/live":
            return 200, plain, b"live\n"
        if target == b"/health/ready":
            reasons = self.unready()
            return (503, plain, ("; ".join(reasons) + "\n").encode()) if reasons else (200, plain, b"ready\n")
        if target == b"/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(self.metrics.registry)
        if target == b"/status":
            return 200, "application/json", json.dumps(self.status()).encode()
        return 404, plain, b"try /health/live, /health/ready, /metrics or /status\n"


def read_status(kit: ServerKit) -> dict[str, Any]:
    """Return what the supervisor last wrote, nothing if it never did."""
    try:
        found = json.loads((kit.state / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
