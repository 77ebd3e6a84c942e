"""Fault 17 on real disks: a small file system that is full, or turns read-only, under a device and under a run."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import until
from inprocess import Network, experiment

from fedkd import simulate
from fedkd.deploy import run as runs
from fedkd.deploy import server
from fedkd.deploy.run import RunEnded
from fedkd.deploy.serve import Standing
from fedkd.errors import FedkdError
from fedkd.storage import StorageError
from simulations.benchmarks import soak
from simulations.benchmarks.loopback import Loopback, digits

CLIENTS = 3

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """Mount a file system of ``kib`` KiB at ``folder``; skips where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system is for root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Write until not a byte fits any more."""
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (65536, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    with pytest.raises(OSError) as caught:
        (disk / "one-more").write_bytes(bytes(4096))
    assert caught.value.errno == errno.ENOSPC
    (disk / "one-more").unlink()


def empty(disk: Path) -> None:
    (disk / "filler").unlink()


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def writable(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


FAULTS = {
    "full": (fill, empty, "No space left on device"),
    "read-only": (read_only, writable, "Read-only file system"),
}
Change = Callable[[Path], None]


def rows(folder: Path) -> list[dict[str, Any]]:
    return runs.read_rows(folder)


@pytest.mark.fault(17, "a real full or read-only disk under a device: it says so, and takes part again")
@pytest.mark.parametrize("fault", FAULTS)
def test_17_a_devices_disk(fault: str, tmp_path: Path) -> None:
    """It says so, the round goes on without it, and it takes part again: as if it had been silent for a round."""
    spoil, mend, words = FAULTS[fault]
    silent = Network(tmp_path / "silent", CLIENTS)
    silent.wire.twist = lambda wire, client, ask, honest: (
        "silence" if client == 1 and ask.round == 1 and ask.kind == "ask" else honest()
    )
    short = {"deployment": {"deadline_seconds": 1.0}}
    calm = silent.play(experiment(CLIENTS, **short), tmp_path / "calm").folder
    network = Network(tmp_path / "net", CLIENTS)
    with small_disk(network.kits[1].state / "runs", 4096) as disk:

        def watch(record: Any, rounds: int) -> None:
            if record["round"] == 0:
                spoil(disk)
            elif record["round"] == 1:
                mend(disk)

        folder = network.play(experiment(CLIENTS), tmp_path / "run", watch=watch).folder
    first, second, third = rows(folder)
    assert first["answered"] == third["answered"] == CLIENTS and second["answered"] == CLIENTS - 1
    (found,) = second["quarantined"]
    assert found["client"] == 1 and words in found["message"]
    assert (folder / simulate.STUDENT).read_bytes() == (calm / simulate.STUDENT).read_bytes()


@pytest.mark.fault(17, "a real full or read-only disk under a run: the reason, then the undisturbed student")
@pytest.mark.parametrize("fault", FAULTS)
def test_17_the_disk_of_a_run(fault: str, tmp_path: Path) -> None:
    """It ends with the reason, and goes on from its last completed round to the undisturbed student."""
    spoil, mend, words = FAULTS[fault]
    network = Network(tmp_path / "net", CLIENTS)
    calm = network.play(experiment(CLIENTS), tmp_path / "calm", token="w").folder
    with small_disk(tmp_path / "disk", 4096) as disk:
        folder = disk / "run"
        with pytest.raises(StorageError, match=words):
            network.play(
                experiment(CLIENTS), folder, watch=lambda record, n: spoil(disk) if not record["round"] else None
            )
        mend(disk)
        assert [row["round"] for row in rows(folder)][:1] == [0]
        network.play(experiment(CLIENTS), folder)
        assert [row["round"] for row in rows(folder)] == [0, 1, 2]
        assert (folder / simulate.STUDENT).read_bytes() == (calm / simulate.STUDENT).read_bytes()


@pytest.mark.fault(
    17, "the disk of a running server fills up: it and its run say so; with room, the undisturbed student"
)
def test_17_the_disk_of_a_running_server(tmp_path: Path) -> None:
    """SuperLink's database, the run's folder and the logs share it. Nothing is restarted by hand but the run."""
    torch.set_num_threads(1)
    wanted = soak.experiment(CLIENTS, 12, "ds_fl", "float32")
    calm = simulate.start(wanted, tmp_path / "calm").folder
    net = Loopback(tmp_path, CLIENTS, digits(CLIENTS, proxy=soak.PROXY), limits={"min_free_mib": 4})
    with small_disk(net.kit.state, 96 * 1024) as disk, net:
        net.start()
        supervisor = net.processes()["supervisor"]
        folder = runs.start(net.kit, wanted)
        until(lambda: rows(folder), 300)
        fill(disk)
        assert len(rows(folder)) < wanted.rounds, "the run was over before its disk was full"
        until(lambda: "the disk is nearly full" in server.status(net.kit)["unready"], 60)
        with pytest.raises(RunEnded, match=r"No space left|disk is full"):
            list(runs.follow(net.kit, folder))
        empty(disk)
        until(lambda: server.status(net.kit)["ready"], 120)
        assert net.processes()["supervisor"] == supervisor
        end = time.monotonic() + 600
        while Standing.read(folder).phase != "finished":
            assert time.monotonic() < end, Standing.read(folder)
            with contextlib.suppress(FedkdError):
                runs.resume(net.kit, folder.name)
            time.sleep(0.5)
        found = rows(folder)
        assert [row["round"] for row in found] == list(range(wanted.rounds))
        assert all(row["answered"] == CLIENTS and row["failed"] is None for row in found)
        assert soak.difference(folder, calm) < 1e-4
