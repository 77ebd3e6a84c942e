"""Accuracy against megabytes, method by method: ``python -m simulations.benchmarks.methods``.

MNIST, 20 devices, Dirichlet 0.1, 10,000 private records, 10,000 unlabelled proxy images of which each round asks 1,000,
a small CNN, 20 rounds of 20 steps on own records for every method (FedKT: one round of 400). Learning rate and server epochs
were chosen on seed 0, which is not among the seeds reported, the same for all methods. Finished runs in ``--out`` are
reused, and with ``--only`` rows are added to those that the JSON file has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedkd.report.compare import Point, draw
from simulations.tables import HERE, made_with, percent, run

POINTS: dict[str, tuple[str, list[str]]] = {
    "local": ("mnist-local.yaml", []),
    "central": ("mnist-central.yaml", []),
    "fedavg": ("mnist-fedavg.yaml", []),
    "fedprox": ("mnist-fedprox.yaml", []),
    "fd": ("mnist-fd.yaml", []),
    "fedmd": ("mnist-fedmd.yaml", []),
    "dsfl": ("mnist-dsfl.yaml", ["evaluation.local_only=false"]),
    "dsfl-mean": ("mnist-dsfl.yaml", ["evaluation.local_only=false", "algorithm.aggregation=mean"]),
    "cfd": ("mnist-cfd.yaml", []),
    "cfd-float32": ("mnist-cfd.yaml", ["codec.up=float32", "codec.down=float32"]),
    "feddf": ("mnist-feddf.yaml", []),
    "fedproto": ("mnist-fedproto.yaml", []),
    "scarlet": ("mnist-scarlet.yaml", []),
    "selective_fd": ("mnist-selective-fd.yaml", []),
    "comet": ("mnist-comet.yaml", []),
    "fml": ("mnist-fml.yaml", []),
    "fedkd": ("mnist-fedkd.yaml", []),
    "fedaux": ("mnist-fedaux.yaml", []),
    "feded": ("mnist-feded.yaml", []),
    "fedgems": ("mnist-fedgems.yaml", []),
    "fedet": ("mnist-fedet.yaml", []),
    "fedkt": ("mnist-fedkt.yaml", []),
    "fedgkt": ("mnist-fedgkt.yaml", []),
    "fedhkd": ("mnist-fedhkd.yaml", []),
    "fedcache": ("mnist-fedcache.yaml", []),
}

LAST = ["evaluation.every=20"]  # what a row shows is the last round; the experiments themselves look every five

NAMES = {"dsfl": "ds_fl", "dsfl-mean": "ds_fl, no ERA", "cfd": "cfd, 1 bit", "cfd-float32": "cfd, float32"}


def point(label: str, row: dict[str, Any]) -> Point:
    """Return a row's place in the picture: the student's accuracy, or the devices' mean where there is no student."""
    kind = "student" if row["student"] is not None else "clients_mean"
    reached, sent = row[kind], row["bytes_up_per_device"] + row["bytes_down_per_device"]
    spread = None if reached["std"] is None else 100 * reached["std"]
    name = NAMES.get(label, label)
    return Point(label=name, kind=kind, megabytes=sent / 1e6, accuracy=100 * reached["mean"], spread=spread)


def main(argv: list[str] | None = None) -> None:
    """Run every method over the seeds, print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "methods.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "methods.svg")
    parser.add_argument("--only", default=",".join(POINTS), help="comma list of rows; the others stay as they are")
    parser.add_argument("--jobs", type=int, default=None, help="runs side by side")
    parser.add_argument("--small", action="store_true", help="one quick round on the bundled digits")
    words = parser.parse_args(argv)
    seeds = [int(s) for s in words.seeds.split(",")]
    rows: dict[str, dict[str, Any]] = json.loads(words.json.read_text())["rows"] if words.json.is_file() else {}
    for label in filter(None, words.only.split(",")):
        file, overrides = POINTS[label]
        found = run(HERE / file, [*overrides, *LAST], seeds, words.out / label, words.small, words.jobs)
        rows[label] = {**found, "versions": made_with()}
        rows = {name: rows[name] for name in POINTS if name in rows}
        # After each row, so that an interrupted benchmark keeps what it has.
        words.json.parent.mkdir(parents=True, exist_ok=True)
        words.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    table = Table(title="MNIST, 20 devices, Dirichlet 0.1" if not words.small else "small form: digits, one round")
    for name in ("method", "student %", "devices %", "own classes %", "ensemble %", "kB up", "kB down", "s"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for label, row in rows.items():
        table.add_row(
            label,
            percent(row["student"]),
            percent(row["clients_mean"]),
            percent(row["clients_own_classes_mean"]),
            percent(row["ensemble"]),
            f"{row['bytes_up_per_device'] / 1e3:.1f}",
            f"{row['bytes_down_per_device'] / 1e3:.1f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=130).print(table)
    draw([point(label, row) for label, row in rows.items() if label not in ("local", "central")], words.picture)


if __name__ == "__main__":
    main()
