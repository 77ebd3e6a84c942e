"""Ten thousand devices on one small machine: ``python -m simulations.benchmarks.scale``.

MNIST's 60,000 training records, 1,000 of them set aside as the proxy set and the rest dealt to the devices; DS-FL with soft
labels of 100 proxy samples a round. Every row is a process of its own, so that its peak memory is its own; each row
says how many bytes travelled and what lay on disk.

Two questions are asked. What do 10,000 devices take, at 5 % and at full participation (``runs``)? And does a device cost
the same among 10,000 as among 100 (``growth``: the same number of records per device, every device in every round,
the server's own training left out, because it does not depend on the number of devices; rows are interleaved)? Seconds are
those of the clock and of the processor: where other work shares the machine, the second is the one to read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
GIB, MB = 2**30, 1e6
FLAT_FROM = 100  # devices whose cost the others' is divided by
RECORDS_PER_DEVICE = 5  # so that there are enough for 10,000 devices beside the proxy set

BASE: dict[str, Any] = {
    "name": "scale",
    "algorithm": "ds_fl",
    "data": {"source": "mnist"},
    "partition": {"kind": "iid"},
    "proxy": {"size": 1000},
    "proxy_per_round": 100,
    "training": {"epochs": 1, "batch_size": 32},
    "digest": {"epochs": 1, "batch_size": 32},
    "server": {"epochs": 5, "batch_size": 50},
    "evaluation": {"every": 5, "local_only": False, "clients_sample": 50},
    "runner": {"kind": "stacked", "threads": 1},
}


def runs(words: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the first question."""
    rows = []
    for model in words.models:
        for share, rounds in ((0.05, words.rounds), (1.0, words.full_rounds or words.rounds)):
            experiment = _with(words, model, words.clients, None)
            experiment |= {"rounds": rounds, "population": {"participation": share}}
            rows.append(measure(experiment, words))
            print(_line(rows[-1]), flush=True)
    return rows


def growth(words: argparse.Namespace) -> dict[str, Any]:
    """Return the rows of the second question: medians over the passes, and their ratio to that of ``FLAT_FROM``."""
    passes: dict[int, list[dict[str, Any]]] = {count: [] for count in words.growth}
    for _ in range(words.passes):
        for count, found in passes.items():
            experiment = _with(words, words.models[0], count, count * RECORDS_PER_DEVICE)
            # Enough rounds to last a while; the first warms up and does not count.
            experiment["rounds"] = 1 + max(1, min(20, words.device_rounds // count))
            experiment["server"] = {"epochs": 0}
            experiment["evaluation"] |= {"every": 1000, "clients_sample": 1}
            found.append(measure(experiment, words))
            print(_line(found[-1]), flush=True)
    # Among ten devices nothing is shared yet, so the promise that the cost is flat starts at a hundred.
    least = min((count for count in passes if count >= FLAT_FROM), default=min(passes))
    result: dict[str, Any] = {"model": words.models[0]}
    for name in ("ms_per_device_round", "cpu_ms_per_device_round"):
        cost = {count: statistics.median(r[name] for r in found) for count, found in passes.items()}
        result[name] = {str(count): value for count, value in cost.items()}
        result[f"{name}_ratio"] = {str(count): value / cost[least] for count, value in cost.items()}
    return result | {
        "peak_gib": {str(c): max(r["peak_gib"] for r in found) for c, found in passes.items()},
        "passes": {str(count): found for count, found in passes.items()},
    }


def _with(words: argparse.Namespace, model: str, clients: int, records: int | None) -> dict[str, Any]:
    experiment: dict[str, Any] = json.loads(json.dumps(BASE))
    experiment["models"] = {"student": model, "devices": [model]}
    experiment["partition"]["clients"] = clients
    experiment["runner"]["memory_gib"] = words.memory_gib
    experiment["checkpoint"] = {"every": words.checkpoint_every}
    if words.data is not None:
        experiment["data"]["source"] = words.data
        experiment["proxy"]["size"] = 100
    if records is not None:
        experiment["data"]["train_size"] = records + experiment["proxy"]["size"]
    return experiment


# ---- one row --------------------------------------------------------------------------------------------------------
def measure(experiment: Mapping[str, Any], words: argparse.Namespace) -> dict[str, Any]:
    """Run an experiment in a process of its own and return what it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="fedkd-scale-", dir=words.scratch) as scratch:
        order = json.dumps({"experiment": experiment, "folder": scratch, "limit_gib": words.limit_gib})
        command = [sys.executable, "-m", "simulations.benchmarks.scale", "--row", order]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a row failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run one experiment in this process."""
    from fedkd import simulate
    from fedkd.experiment import validate

    if order["limit_gib"]:
        import resource

        # Not the address space, which mapped files and shared libraries fill; what is really taken.
        limit = int(order["limit_gib"] * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    experiment = validate(order["experiment"])
    folder = Path(order["folder"]) / "run"
    began, before = time.perf_counter(), time.process_time()
    ends: list[float] = []
    busy: list[float] = []
    sizes: list[int] = []

    def watch(record: Mapping[str, Any], rounds: int) -> None:
        ends.append(time.perf_counter())
        busy.append(time.process_time())
        sizes.append(sum(path.stat().st_blocks * 512 for path in (folder / "states").glob("*")))

    summary = simulate.start(experiment, folder, watch).summary
    whole = time.perf_counter() - began
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    # From the end of a round to that of the next: checkpoints and all.
    worked = [r["asked"] for r in rounds]

    def each(clock: list[float]) -> float:
        taken = [later - earlier for earlier, later in itertools.pairwise(clock)]
        return statistics.median(1000 * seconds / count for seconds, count in zip(taken, worked[1:], strict=True))

    return {
        "model": experiment.models.student,
        "clients": experiment.partition.clients,
        "participation": experiment.population.participation,
        "rounds": len(rounds),
        "device_rounds": sum(worked),
        "seconds": whole,
        "cpu_seconds": time.process_time() - before,
        "seconds_to_first_round_end": ends[0] - began,
        "ms_per_device_round": each(ends),
        "cpu_ms_per_device_round": each(busy),
        "peak_gib": _peak_bytes() / GIB,
        "disk_gib": max(sizes) / GIB,
        "mb_up": sum(r["bytes_up"] for r in rounds) / MB,
        "mb_down": sum(r["bytes_down"] for r in rounds) / MB,
        "student_accuracy": summary["accuracy"]["student"],
    }


def _peak_bytes() -> int:
    """The most memory that was resident at once, mapped files included."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would give the parent's peak where that is larger.
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- what is printed ------------------------------------------------------------------------------------------------
def _line(found: Mapping[str, Any]) -> str:
    return (
        f"{found['model']}: {found['clients']} devices, {found['participation']:.0%} of them, {found['rounds']} rounds: "
        f"{found['seconds']:.0f} s ({found['cpu_seconds']:.0f} of CPU), {found['ms_per_device_round']:.2f} ms per "
        f"device-round ({found['cpu_ms_per_device_round']:.2f} of CPU), peak {found['peak_gib']:.2f} GiB"
    )


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a result."""
    made = []
    if result.get("runs"):
        table = Table(title="DS-FL on MNIST, all devices on this machine")
        names = (
            "model",
            "devices",
            "asked",
            "rounds",
            "s",
            "CPU s",
            "CPU ms / device-round",
            "peak GiB",
            "on disk GiB",
        )
        for name in (*names, "MB up", "MB down", "student %"):
            table.add_column(name, justify="left" if name == "model" else "right")
        for r in result["runs"]:
            table.add_row(
                r["model"], str(r["clients"]), f"{r['participation']:.0%}", str(r["rounds"]), f"{r['seconds']:.0f}",
                f"{r['cpu_seconds']:.0f}",
                f"{r['cpu_ms_per_device_round']:.2f}", f"{r['peak_gib']:.2f}", f"{r['disk_gib']:.2f}", f"{r['mb_up']:.0f}",
                f"{r['mb_down']:.0f}", f"{100 * r['student_accuracy']:.1f}",
            )  # fmt: skip
        made.append(table)
    if result.get("growth"):
        growth = result["growth"]
        table = Table(title=f"Cost of a device as their number grows ({growth['model']}, medians)")
        for name in ("devices", "ms / device-round", "ratio", "CPU ms / device-round", "ratio", "peak GiB"):
            table.add_column(name, justify="right")
        for count in growth["peak_gib"]:
            cells = [count]
            for name in ("ms_per_device_round", "cpu_ms_per_device_round"):
                cells += [f"{growth[name][count]:.2f}", f"{growth[f'{name}_ratio'][count]:.2f}"]
            table.add_row(*cells, f"{growth['peak_gib'][count]:.2f}")
        made.append(table)
    return made


def main(argv: list[str] | None = None) -> None:
    """Measure, print the tables and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=HERE / "scale.json")
    parser.add_argument("--only", choices=["runs", "growth"], help="one of the two questions; all other rows stay")
    parser.add_argument("--models", default="mlp,lenet", type=lambda text: text.split(","))
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--full-rounds", type=int, help="rounds at full participation; default as --rounds")
    parser.add_argument(
        "--growth", default=[10, 100, 1000, 10_000], type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--device-rounds", type=int, default=4000, help="growth: device-rounds of a row, about")
    parser.add_argument("--memory-gib", type=float, default=2.0, help="runner.memory_gib")
    parser.add_argument("--limit-gib", type=float, default=8.0, help="a row that takes more memory fails; 0: no limit")
    parser.add_argument("--checkpoint-every", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="folder for the runs, which are removed again")
    parser.add_argument("--data", help="another data set than mnist, such as digits")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    words = parser.parse_args(argv)
    if words.row is not None:
        print(json.dumps(row(json.loads(words.row))))
        return
    result = json.loads(words.json.read_text()) if words.only and words.json.is_file() else {}
    from simulations.tables import made_with

    if words.only != "growth":
        kept = [r for r in result.get("runs", []) if r["model"] not in words.models]
        result["runs"] = kept + runs(words)
    if words.only != "runs":
        result["growth"] = growth(words)
    result |= {"cores": os.cpu_count(), "processor": platform.processor(), "versions": made_with()}
    console = Console(width=140)
    for table in tables(result):
        console.print(table)
    words.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
