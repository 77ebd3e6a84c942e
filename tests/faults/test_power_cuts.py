"""Fault 16 on real processes: a node is killed in the middle of an upload, and while it charges its privacy ledger."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedkd import simulate
from fedkd.deploy import client
from fedkd.deploy import run as runs
from fedkd.deploy.device import LEDGER
from fedkd.deploy.kit import ClientKit
from fedkd.deploy.supervise import PidFile
from fedkd.experiment import Experiment, validate
from fedkd.privacy.ledger import Ledger
from simulations.benchmarks.loopback import Loopback, digits, free_ports
from simulations.benchmarks.soak import difference

CLIENTS, VICTIM = 3, 1

pytestmark = pytest.mark.slow


def averaging(rounds: int, width: int) -> Experiment:
    """Return a FedAvg run on the digits; ``width`` hidden units make uploads of 300 bytes each."""
    model = f"mlp(hidden=[{width}])"
    return validate(
        {
            "name": "power-cut", "rounds": rounds, "seed": 1, "data": {"source": "digits"}, "proxy": None,
            "partition": {"clients": CLIENTS, "alpha": 0.5}, "algorithm": "fedavg",
            "models": {"student": model, "devices": model}, "training": {"epochs": 1},
            "evaluation": {"local_only": False}, "runner": {"kind": "serial"}, "deployment": {"probe_seconds": 2.0},
        }
    )  # fmt: skip


def private(rounds: int) -> Experiment:
    """Return a DS-FL run on the digits under DP-SGD."""
    return validate(
        {
            "name": "budget", "rounds": rounds, "seed": 1, "data": {"source": "digits"}, "proxy": {"size": 200},
            "partition": {"clients": CLIENTS, "alpha": 0.5}, "algorithm": "ds_fl", "training": {"epochs": 1},
            "privacy": {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.2},
            "evaluation": {"local_only": False}, "runner": {"kind": "serial"}, "deployment": {"probe_seconds": 2.0},
        }
    )  # fmt: skip


def kill(kit: ClientKit) -> None:
    """Send SIGKILL to a node and wait until it is gone."""
    process = PidFile(kit.state / client.PID).read()
    assert process is not None
    process.signal(9)
    while process.alive:
        time.sleep(0.01)


class Watchman:
    """Stands between a node and the gate, and calls ``cut`` once when one connection has sent more than ``most`` bytes."""

    def __init__(self, gate: int, most: int, cut: Callable[[], None]) -> None:
        self.gate, self.most, self.cut = gate, most, cut
        self.cuts = 0
        (self.port,) = free_ports(1)
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.gate))
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                if up and passed > self.most and not self.cuts:
                    self.cuts += 1
                    self.cut()
                    break
                target.sendall(data)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


@pytest.mark.fault(
    16, "a node's process is killed while it uploads: the same bytes come again, the student is the same"
)
def test_16_killed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    """The node comes back and sends the same bytes from its outbox; the student is the undisturbed one."""
    torch.set_num_threads(1)
    wanted = averaging(3, 3333)
    calm = simulate.start(wanted, tmp_path / "calm").folder
    cut = threading.Event()
    with Loopback(tmp_path, CLIENTS, digits(CLIENTS, proxy=None)) as net:
        kit = net.clients[VICTIM]

        def power_cut() -> None:
            kill(kit)
            cut.set()

        watchman = Watchman(net.kit.port, 400_000, power_cut)
        path = kit.path("client.yaml")
        path.write_text(path.read_text().replace(f"port: {net.kit.port}", f"port: {watchman.port}"))
        net.clients[VICTIM] = kit = ClientKit.read(kit.folder)
        net.start()
        folder = runs.start(net.kit, wanted)
        assert cut.wait(600)
        waiting = list((kit.state / "runs").glob("*/outbox/*.answer"))
        assert len(waiting) == 1
        before = waiting[0].read_bytes()
        net.start_client(kit)
        rows = list(runs.follow(net.kit, folder))
        watchman.close()
        assert not waiting[0].exists() or waiting[0].read_bytes() == before
        # Training is not done a second time: the log of the node that came back has no model of its own for that round.
        said = (kit.state / "logs/client.jsonl").read_text()
        assert "asked again: the same answer is sent again" in said or said.count("round 0 of") == 1, said
    assert watchman.cuts == 1
    assert [(row["answered"], row["quarantined"], row["failed"]) for row in rows] == [(CLIENTS, [], None)] * 3
    assert difference(folder, calm) < 1e-4


DIES = """
import os, signal, sys
from pathlib import Path
from fedkd.deploy import client
from fedkd.deploy.kit import ClientKit
at, torn, seen, sync = int(sys.argv[2]), sys.argv[3] == "torn", [], os.fsync
def dies(handle):
    if os.readlink(f"/proc/self/fd/{handle}").endswith("privacy/ledger.jsonl"):
        seen.append(handle)
        if len(seen) == at:
            if torn:
                os.ftruncate(handle, os.fstat(handle).st_size - 40)
            os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = dies
client.run(ClientKit.read(Path(sys.argv[1])))
"""
"""A node that is killed once it has written its ledger for the n-th time and not synced it: whole, or torn."""


@pytest.mark.fault(
    16, "a node's process is killed while it charges its ledger: every released round is charged, some twice"
)
def test_16_killed_while_budget_is_spent(tmp_path: Path) -> None:
    """Three deaths, in two rounds; each time it comes back, works and charges again. The ledger never says too little."""
    rounds = 3
    wanted = private(rounds)
    with Loopback(tmp_path, CLIENTS, digits(CLIENTS, proxy=200)) as net:
        kit = net.clients[VICTIM]
        ledger = kit.state / LEDGER
        net.start_server()
        for other in net.clients:
            if other is not kit:
                net.start_client(other)
        folder = runs.start(net.kit, wanted)
        for at, how in ((1, "whole"), (1, "torn"), (2, "whole")):
            command = [sys.executable, "-c", DIES, str(kit.folder), str(at), how]
            done = subprocess.run(command, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == -signal.SIGKILL, done.stderr
            # What was charged before the death stays charged, a torn line is none, and no answer waits to be sent.
            answered = {path.name[:6] for path in (kit.state / "runs").glob("*/outbox/*.answer")}
            charged = {f"{entry.round:06d}" for entry in Ledger(ledger).entries}
            assert answered <= charged
        net.start_client(kit)
        rows = list(runs.follow(net.kit, folder))
        assert [(row["answered"], row["quarantined"], row["failed"]) for row in rows] == [(CLIENTS, [], None)] * rounds
        mine, others = (Ledger(k.state / LEDGER) for k in (kit, net.clients[0]))
    charges = [entry.round for entry in mine.entries]
    assert set(charges) == set(range(rounds))
    once = len(others.entries)
    assert once % rounds == 0 and len(charges) > once
    assert mine.epsilon(1e-5, VICTIM) > others.epsilon(1e-5, 0)
