"""Flower's own SuperNode beside a lean node, in one federation behind the gate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedkd import simulate
from fedkd.deploy import run as runs
from simulations.benchmarks.loopback import Loopback, digits
from simulations.benchmarks.soak import PROXY, difference, experiment


@pytest.mark.slow
def test_stock_nodes_and_a_lean_one_teach_the_simulators_student(tmp_path: Path) -> None:
    """Process isolation with a secret, node keys, the tunnel and the gate: as docs/deploy.md says."""
    torch.set_num_threads(1)
    wanted = experiment(3, 2, "ds_fl", "float32")
    calm = simulate.start(wanted, tmp_path / "calm").folder
    with Loopback(tmp_path, 3, digits(3, proxy=PROXY)) as net:
        net.start_server()
        net.start_client(net.clients[0])
        for kit in net.clients[1:]:
            net.start_stock(kit)
        folder = runs.start(net.kit, wanted)
        rows = list(runs.follow(net.kit, folder))
        for kit in net.clients[1:]:
            said = (kit.state / "logs" / "superexec.log").read_text()
            assert "flwr-clientapp" in said, said
    assert [(row["answered"], row["quarantined"], row["failed"]) for row in rows] == [(3, [], None)] * 2
    assert difference(folder, calm) < 1e-4
