"""What a client's own tools read, on its loopback alone: /health/live, /health/ready and /metrics.

Plain text by hand: a metrics library would be a tenth of the memory of a client that only labels.
"""

from __future__ import annotations

import http.server
import os
import shutil
import socketserver
import threading
from typing import TYPE_CHECKING

from fedkd.deploy.kit import LOOPBACK
from fedkd.deploy.supervise import SuperviseError, rss_bytes

if TYPE_CHECKING:
    from fedkd.deploy.node import Node

PLAIN = "text/plain; charset=utf-8"


def metrics(node: Node) -> str:
    """Return the node's metrics in Prometheus' text format."""
    counters = node.counters
    rows: list[tuple[str, str, str, list[tuple[str, float]]]] = [
        ("online", "gauge", "1 while the server answers.", [("", float(node.link.online))]),
        (
            "requests_total",
            "counter",
            "Requests since the start.",
            [('{outcome="answered"}', counters.answered), ('{outcome="refused"}', counters.refused)],
        ),
        (
            "bytes_total",
            "counter",
            "Bytes of messages since the start.",
            [('{direction="in"}', counters.bytes_in), ('{direction="out"}', counters.bytes_out)],
        ),
        ("bytes_left_today", "gauge", "What policy.yaml leaves of this UTC day.", [("", node.usage.left)]),
        ("work_seconds_total", "counter", "Time spent on requests since the start.", [("", counters.work_seconds)]),
        ("memory_bytes", "gauge", "Resident memory.", [("", rss_bytes(os.getpid()) or 0)]),
        ("disk_free_bytes", "gauge", "Room on the state's disk.", [("", shutil.disk_usage(node.kit.state).free)]),
    ]
    lines = []
    for name, kind, about, values in rows:
        lines += [f"# HELP fedkd_client_{name} {about}", f"# TYPE fedkd_client_{name} {kind}"]
        lines += [f"fedkd_client_{name}{labels} {value!r}" for labels, value in values]
    return "\n".join(lines) + "\n"


class NodeOps:
    """Answers on 127.0.0.1 until it is closed.

    Raises:
        SuperviseError: the port is taken.
    """

    def __init__(self, node: Node, port: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10.0

            def do_GET(self) -> None:
                status, body = answer(node, self.path)
                self.send_response(status)
                self.send_header("content-type", PLAIN)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing: whoever asks is on this machine, and asks every few seconds."""

        class Server(socketserver.ThreadingTCPServer):
            # Not the HTTP server of the library, which looks its own name up in the network.
            allow_reuse_address = daemon_threads = True

        try:
            self._server = Server((LOOPBACK, port), Handler)
        except OSError as cause:
            raise SuperviseError(
                f"cannot listen on {LOOPBACK}:{port}: {cause.strerror or cause}; choose another ops_port in client.yaml"
            ) from cause
        self._thread = threading.Thread(target=self._server.serve_forever, name="ops", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


def answer(node: Node, path: str) -> tuple[int, bytes]:
    """Return status and body."""
    if path == "/health/live":
        return 200, b"live\n"
    if path == "/health/ready":
        if node.link.online:
            return 200, b"ready\n"
        return 503, f"offline: {node.trouble or 'not connected yet'}\n".encode()
    if path == "/metrics":
        return 200, metrics(node).encode()
    return 404, b"try /health/live, /health/ready or /metrics\n"
