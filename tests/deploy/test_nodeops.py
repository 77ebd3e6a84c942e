"""Health and metrics of a client, on its own loopback."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from devices import free_ports

from fedkd.deploy.node import Counters
from fedkd.deploy.nodeops import NodeOps
from fedkd.deploy.supervise import SuperviseError


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as cause:
        return cause.code, cause.read().decode()


def test_it_says_how_the_client_is(tmp_path: Path) -> None:
    node = SimpleNamespace(
        counters=Counters(answered=2), link=SimpleNamespace(online=False), trouble="fl.example.org:8443 cannot be reached",
        usage=SimpleNamespace(left=5), kit=SimpleNamespace(state=tmp_path),
    )  # fmt: skip
    (port,) = free_ports(1)
    ops = NodeOps(node, port)  # type: ignore[arg-type]
    try:
        assert get(port, "/health/live") == (200, "live\n")
        assert get(port, "/health/ready") == (503, "offline: fl.example.org:8443 cannot be reached\n")
        node.link.online = True
        assert get(port, "/health/ready") == (200, "ready\n")
        status, text = get(port, "/metrics")
        assert status == 200 and 'fedkd_client_requests_total{outcome="answered"} 2' in text
        assert get(port, "/")[0] == 404
        with pytest.raises(SuperviseError, match="choose another ops_port"):
            NodeOps(node, port)  # type: ignore[arg-type]
    finally:
        ops.close()
