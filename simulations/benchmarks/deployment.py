"""Memory, start-up, seconds and bytes of a real network on loopback: ``python -m simulations.benchmarks.deployment``.

A server and its nodes as `fedkd server start` and `fedkd client start` run them: TLS to the gate, node keys, SuperLink behind
it. The payload is FedAvg's weights, which travel down and up in every round: a perceptron on the digits whose width gives
10 kB, 1 MB or 50 MB, and which each device trains for one step, so that what is measured is the network's share of a round.

Seconds per round are the pace at which records appear, checkpoints included, without the first round (in which devices
build their models and are sent nothing that they have). CPU seconds are those of all processes together; where other work
shares the machine they tell what the seconds would be on a free one. Memory is resident memory of single processes, libraries
that they share counted in each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.deploy import client, server
from fedkd.deploy import run as runs
from fedkd.deploy.kit import ClientKit
from fedkd.deploy.serve import Standing
from fedkd.deploy.supervise import Process, rss_bytes
from fedkd.experiment import Experiment, validate
from simulations.benchmarks.loopback import Loopback, digits, scratch
from simulations.tables import HERE, made_with

PARAMETERS_PER_UNIT = 64 + 1 + 10
SIZES = {"10 kB": 10_000, "1 MB": 1_000_000, "50 MB": 50_000_000}
ROUNDS = {"10 kB": 11, "1 MB": 7, "50 MB": 3}
TICKS = os.sysconf("SC_CLK_TCK")


def experiment(size: str, clients: int, rounds: int | None = None) -> Experiment:
    """Return a FedAvg run whose weights have about that many bytes."""
    width = SIZES[size] // (4 * PARAMETERS_PER_UNIT)
    step = {"steps": 1, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.05}}
    return validate(
        {
            "name": f"network-{size.replace(' ', '')}-{clients}", "rounds": rounds or ROUNDS[size], "seed": 1,
            "data": {"source": "digits"}, "partition": {"clients": clients, "alpha": 10.0}, "proxy": None,
            "algorithm": "fedavg", "models": {"student": f"mlp(hidden=[{width}])", "devices": f"mlp(hidden=[{width}])"},
            "training": step, "evaluation": {"local_only": False}, "runner": {"kind": "serial"},
        }
    )  # fmt: skip


# ---- what processes cost --------------------------------------------------------------------------------------------
def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of the children that it has waited for; 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(fields[i]) for i in (11, 12, 13, 14)) / TICKS
    return 0.0


def peak_bytes(pid: int) -> int:
    """Most resident memory that a process has held; 0 if it is gone."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        for row in Path(f"/proc/{pid}/status").read_text().splitlines():
            if row.startswith("VmHWM:"):
                return int(row.split()[1]) * 1024
    return 0


def group(leader: int) -> list[int]:
    """Return the processes of a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == leader:
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def sampled(value: Callable[[], int]) -> Iterator[list[int]]:
    """Look at a value ten times a second; the list holds the largest seen."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            most[0] = max(most[0], value())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def until_online(net: Loopback, kit: ClientKit, began: float, seconds: float = 300) -> float:
    """Return the seconds from ``began`` until the gate has heard of a client.

    Raises:
        TimeoutError: it does not in time.
    """
    while time.monotonic() - began < seconds:
        row = next(row for row in server.status(net.kit)["clients"] if row["name"] == kit.name)
        if row["status"] == "online":
            return time.monotonic() - began
        time.sleep(0.1)
    raise TimeoutError(f"{kit.name} is not online after {seconds:.0f} s: see {kit.state}/logs")


# ---- measurements ---------------------------------------------------------------------------------------------------
def play(net: Loopback, chosen: Experiment, watched: Callable[[], Iterable[int]]) -> dict[str, Any]:
    """Run an experiment; returns pace, CPU time and bytes. ``watched``: the pids that work for it, but the run's own."""
    folder = runs.start(net.kit, chosen)
    moments, spent, sent, worker = [], [], [], 0
    for row in runs.follow(net.kit, folder):
        moments.append(time.monotonic())
        own = Standing.read(folder).pid
        worker = max(worker, peak_bytes(own))
        spent.append(sum(map(cpu_seconds, [*watched(), own])))
        sent.append(sum(one["bytes_today"] for one in server.status(net.kit)["clients"]))
        if row["failed"] or row["answered"] != row["asked"]:
            raise RuntimeError(f"round {row['round']} of {folder} is not whole: {row}")
    rows = runs.read_rows(folder)
    after, nodes = len(rows) - 1, len(net.clients)
    seconds = [row["seconds"] for row in rows[1:]]
    return {
        "rounds": after,
        "first_round_seconds": rows[0]["seconds"],
        "seconds_per_round": (moments[-1] - moments[0]) / after,
        "round_seconds_min": min(seconds),
        "round_seconds_median": float(np.median(seconds)),
        "cpu_seconds_per_round": (spent[-1] - spent[0]) / after,
        "bytes_up_per_device": sum(row["bytes_up"] for row in rows[1:]) / after / nodes,
        "bytes_down_per_device": sum(row["bytes_down"] for row in rows[1:]) / after / nodes,
        "gate_bytes_up_per_device": (sent[-1] - sent[0]) / after / nodes,
        "run_peak_bytes": worker,
        "database_bytes": sum(p.stat().st_size for p in net.kit.state.glob("superlink.db*")),
    }


def pace(folder: Path, nodes: int, sizes: Iterable[str], rounds: int | None) -> Iterator[dict[str, Any]]:
    """Measure rounds of ``nodes`` lean nodes."""
    with Loopback(folder, nodes, digits(nodes, proxy=None)) as net:
        net.start()
        for kit in net.clients:
            until_online(net, kit, time.monotonic())
        for size in sizes:
            load = os.getloadavg()[0]
            row = play(net, experiment(size, nodes, rounds), lambda: [p.pid for p in net.processes().values()])
            alive = net.processes()
            row |= {
                "payload": size, "nodes": nodes, "load": load,
                "node_peak_bytes": max(peak_bytes(alive[kit.name].pid) for kit in net.clients),
                "superlink_peak_bytes": peak_bytes(alive["superlink"].pid),
                "gate_peak_bytes": peak_bytes(alive["gate"].pid),
            }  # fmt: skip
            print(row_line(row), flush=True)
            yield row


def memory(folder: Path) -> dict[str, Any]:
    """Measure start-up and memory of a server, a lean node and a stock one, idle and at a 10 kB run."""
    with Loopback(folder, 2, digits(2, proxy=None)) as net:
        began = time.monotonic()
        net.start_server()
        found: dict[str, Any] = {"load": os.getloadavg()[0], "server_start_seconds": time.monotonic() - began}
        lean, stock = net.clients
        began = time.monotonic()
        client.start(lean)
        found["lean_start_seconds"] = until_online(net, lean, began)
        began = time.monotonic()
        parts = net.start_stock(stock)
        found["stock_start_seconds"] = until_online(net, stock, began)
        time.sleep(5)
        processes = net.processes()
        server_parts = {n: p for n, p in processes.items() if n != lean.name}
        node = processes[lean.name]
        found["server_idle_bytes"] = {n: rss_bytes(p.pid) for n, p in server_parts.items()}
        found["lean_idle_bytes"] = rss_bytes(node.pid)
        found["stock_idle_bytes"] = {n: rss_bytes(p.pid) for n, p in parts.items()}
        with sampled(lambda: _held(parts)) as most:
            run = play(net, experiment("10 kB", 2, 4), lambda: [p.pid for p in net.processes().values()])
        found |= {
            "stock_seconds_per_round": run["seconds_per_round"],
            "server_peak_bytes": {n: peak_bytes(p.pid) for n, p in server_parts.items()},
            "run_peak_bytes": run["run_peak_bytes"],
            "lean_training_bytes": peak_bytes(node.pid),
            "stock_training_bytes": most[0],
        }
    print(memory_table(found), flush=True)
    return found


def _held(parts: dict[str, Process]) -> int:
    return sum(rss_bytes(pid) or 0 for process in parts.values() for pid in group(process.pid))


# ---- tables ---------------------------------------------------------------------------------------------------------
def row_line(row: dict[str, Any]) -> str:
    """Return one row of the table of rounds."""
    return (
        f"| {row['payload']} | {row['nodes']} | {row['seconds_per_round']:.2f} | {row['round_seconds_min']:.2f} | "
        f"{row['cpu_seconds_per_round']:.2f} | {row['bytes_up_per_device'] / 1e6:.3f} | "
        f"{row['bytes_down_per_device'] / 1e6:.3f} | {row['gate_bytes_up_per_device'] / 1e6:.3f} | "
        f"{row['node_peak_bytes'] / 1e6:.0f} | {row['superlink_peak_bytes'] / 1e6:.0f} | {row['run_peak_bytes'] / 1e6:.0f} | "
        f"{row['load']:.0f} |"
    )


HEAD = (
    "| payload | nodes | s/round | fastest round, s | CPU s/round | MB up | MB down | MB up at the gate | node, MB | "
    "SuperLink, MB | run, MB | load |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def memory_table(found: dict[str, Any]) -> str:
    """Return the table of memory and start-up."""

    def parts(values: dict[str, int]) -> str:
        each = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in values.items())
        return f"{sum(values.values()) / 1e6:.0f} ({each})"

    rows = [
        ("server", found["server_start_seconds"], parts(found["server_idle_bytes"]),
         f"{parts(found['server_peak_bytes'])}; the run {found['run_peak_bytes'] / 1e6:.0f}"),
        ("lean node", found["lean_start_seconds"], f"{found['lean_idle_bytes'] / 1e6:.0f}",
         f"{found['lean_training_bytes'] / 1e6:.0f}"),
        ("stock node", found["stock_start_seconds"], parts(found["stock_idle_bytes"]),
         f"{found['stock_training_bytes'] / 1e6:.0f}"),
    ]  # fmt: skip
    head = "| | start-up, s | idle, MB | at work, peak, MB |\n|---|---|---|---|"
    return "\n".join([head, *(f"| {name} | {start:.1f} | {idle} | {peak} |" for name, start, idle, peak in rows)])


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables and write JSON; what the file holds of other cells stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[2, 20], help="none: only memory and start-up")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, help=f"of each cell; default: {ROUNDS}")
    parser.add_argument("--no-memory", action="store_true", help="Leave out memory and start-up.")
    parser.add_argument("--work", type=Path, help="An empty folder to work in, which stays; default: a temporary one.")
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "deployment.json")
    words = parser.parse_args(argv)
    known = json.loads(words.json.read_text()) if words.json.exists() else {"rounds": []}
    words.json.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        words.json.write_text(json.dumps(known, indent=1) + "\n")

    with scratch(words.work) as folder:
        if not words.no_memory:
            known["memory"] = memory(folder / "memory") | {"versions": made_with()}
            keep()
        if words.nodes:
            print(HEAD, flush=True)
        for nodes in words.nodes:
            for row in pace(folder / f"nodes-{nodes}", nodes, words.sizes, words.rounds):
                cell = (nodes, row["payload"])
                others = [old for old in known["rounds"] if (old["nodes"], old["payload"]) != cell]
                known["rounds"] = sorted([*others, row | {"versions": made_with()}], key=_place)
                keep()


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return int(row["nodes"]), SIZES[row["payload"]]


if __name__ == "__main__":
    main()
