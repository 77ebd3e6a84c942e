"""Faults 16 to 20 where they meet a device or the round loop; 13 and 15 have tests of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import Network, Wire, digits, experiment

from fedkd import simulate, wire
from fedkd.codecs import codec
from fedkd.deploy.device import LEDGER
from fedkd.deploy.mail import Ask
from fedkd.payloads import SoftLabels
from fedkd.privacy.ledger import Ledger
from fedkd.storage import StorageError

CLIENTS = 3


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / simulate.ROWS).read_text().splitlines()]


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(tmp_path / "net", CLIENTS)


@pytest.mark.fault(16, "nothing had left; the work is charged again, and the ledger never says less than was spent")
def test_16_a_power_cut_after_the_charge_never_releases_twice(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Charged, trained, and cut off before the outbox: the work is done and charged again; nothing left before."""
    from fedkd.deploy import outbox

    put, cut = outbox.Outbox.put, []

    def torn(box: outbox.Outbox, round: int, key: str, answer: bytes) -> None:
        if not cut:
            cut.append(key)
            raise KeyboardInterrupt("power cut")
        put(box, round, key, answer)

    def twist(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        try:
            return honest()
        except KeyboardInterrupt:
            network.restart(client)
            return None

    monkeypatch.setattr(outbox.Outbox, "put", torn)
    network.wire.twist = twist
    privacy = {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.2}
    chosen = experiment(CLIENTS, rounds=2, privacy=privacy)
    assert all(row["answered"] == CLIENTS for row in rows(network.play(chosen, tmp_path / "run").folder))
    charges = [len(Ledger(kit.state / LEDGER).entries) for kit in network.kits.values()]
    once = min(charges)
    assert once > 0 and sorted(charges) == [once, once, once + once // 2]


def _full(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Let the disk be full for every file whose path holds ``where``."""
    replace_file = os.replace

    def refuse(source: Any, target: Any) -> None:
        if where in str(target):
            raise OSError(28, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.fault(17, "the device tells the server that its disk is full; the round goes on without it")
@pytest.mark.parametrize("where", ["/outbox/", "/models/", "/proxies/"])
def test_17_a_device_with_a_full_disk_says_so(
    where: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full(monkeypatch, f"client-1/state/{'runs/trial.t' if where != '/proxies/' else ''}{where}".replace("//", "/"))
    row = rows(network.play(experiment(CLIENTS, rounds=1), tmp_path / "run").folder)[0]
    assert row["answered"] == CLIENTS - 1 and row["failed"] is None
    (found,) = row["quarantined"]
    assert found["client"] == 1 and "No space left" in found["message"]


@pytest.mark.fault(17, "the run ends naming the full disk; resumed, its student equals the undisturbed run's")
def test_17_a_server_with_a_full_disk_stops_and_goes_on(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    whole = network.play(experiment(CLIENTS), tmp_path / "whole", token="w")
    with monkeypatch.context() as patched:
        _full(patched, "round-000002")
        with pytest.raises(StorageError, match="No space left"):
            network.play(experiment(CLIENTS), folder)
    found = network.play(experiment(CLIENTS), folder)
    assert [r["round"] for r in rows(folder)] == [0, 1, 2]
    assert (found.folder / simulate.STUDENT).read_bytes() == (whole.folder / simulate.STUDENT).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from fedkd import simulate
from fedkd.experiment import load
at, seen, sync = int(sys.argv[3]), [], os.fsync
def dies(handle):
    if "round-000002" in os.readlink(f"/proc/self/fd/{handle}"):
        seen.append(handle)
        if len(seen) == at:
            if os.path.isfile(f"/proc/self/fd/{handle}"):
                os.truncate(f"/proc/self/fd/{handle}", os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = dies
simulate.start(load(Path(sys.argv[1]))[0][1], Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.fault(
    15, "killed in the middle of a checkpoint's files and resumed: the student equals the undisturbed run's"
)
def test_15_a_kill_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    wanted = experiment(CLIENTS, runner={"kind": "serial", "threads": 1})
    whole = simulate.start(wanted, tmp_path / "whole")
    config = tmp_path / "wanted.yaml"
    config.write_text(wanted.dump())
    kills = 0
    for at in range(1, 20):
        folder = tmp_path / f"run-{at}"
        command = [sys.executable, "-c", KILLED, str(config), str(folder), str(at)]
        done = subprocess.run(command, capture_output=True, timeout=120)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        simulate.resume(folder)
        assert (folder / simulate.STUDENT).read_bytes() == (whole.folder / simulate.STUDENT).read_bytes(), at
        assert [r["round"] for r in rows(folder)] == [0, 1, 2]
    assert 2 < kills < 19


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def _pickle(file: Path) -> None:
    file.write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.")


def _path(file: Path) -> None:
    manifest = file.parent / "manifest.json"
    manifest.write_text(json.dumps({"sha256": {"../../x": "0" * 64}}))


@pytest.mark.fault(18, "the checkpoint is passed over for the one before; the student equals the undisturbed run's")
@pytest.mark.parametrize("damage", [_flip, _pickle, _path])
def test_18_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], network: Network, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    whole = network.play(experiment(CLIENTS), tmp_path / "whole", token="w")

    class Cut(Exception):
        pass

    def cut(record: Any, rounds: int) -> None:
        if record["round"] == 1:
            raise Cut

    with pytest.raises(Cut):
        network.play(experiment(CLIENTS), folder, watch=cut)
    damage(sorted((folder / simulate.CHECKPOINTS).glob("round-*"))[-1] / "server.safetensors")
    found = network.play(experiment(CLIENTS), folder)
    assert (found.folder / simulate.STUDENT).read_bytes() == (whole.folder / simulate.STUDENT).read_bytes()


def _poison(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Wire, int, Ask, Any], Any]:
    def twist(network: Wire, client: int, ask: Ask, honest: Any) -> Any:
        if client != 1:
            return honest()
        say = network.devices[client].handle(ask)
        if say.answer is None:
            return network.reply("", client, say)
        head = wire.read_head(say.answer)
        values = np.frombuffer(head.body, "<f4").reshape(100, 10)
        labels = torch.from_numpy(np.ascontiguousarray(change(values), "f4"))
        body = codec("float32").encode(SoftLabels(labels=labels), head.envelope)
        return network.reply("", client, replace(say, answer=body))

    return twist


@pytest.mark.fault(20, "valid lies pass the checks, and the rounds go on")
@pytest.mark.parametrize(
    "change",
    [
        lambda v: np.eye(10)[np.zeros(len(v), int)],
        lambda v: np.eye(10)[9 - v.argmax(1)],
        lambda v: np.eye(10)[v.argmin(1)],
        lambda v: np.tile(v.mean(0), (len(v), 1)),
    ],
    ids=["constant", "label flip", "loss-maximising", "class prior"],
)
def test_20_the_round_survives_colluders(
    change: Callable[[np.ndarray], np.ndarray], network: Network, tmp_path: Path
) -> None:
    """Poisoned labels are valid ones: the loop goes on. Whether the student resists is the aggregator's to show."""
    network.wire.twist = _poison(change)
    for row in rows(network.play(experiment(CLIENTS, rounds=2), tmp_path / "run").folder):
        assert row["failed"] is None and row["answered"] == CLIENTS


@pytest.mark.fault(20, "a device without records abstains")
def test_20_a_device_without_records_abstains(tmp_path: Path) -> None:
    data = digits(CLIENTS)
    data["part"]["partition"] = {"clients": CLIENTS, "kind": "shards", "shards_per_client": 1}
    network = Network(tmp_path / "net", CLIENTS, data)
    device = network.wire.devices[1]
    device._records = device.local.records().select(slice(0, 0))
    for row in rows(network.play(experiment(CLIENTS, rounds=2), tmp_path / "run").folder):
        assert row["failed"] is None and (row["answered"], row["abstained"]) == (CLIENTS - 1, 1)
