"""Accuracy against megabytes, method by method: ``python -m simulations.benchmarks.methods``.

MNIST, 20 devices, Dirichlet 0.1, 10,000 private records, 10,000 unlabelled proxy images of which each round asks 1,000,
a small CNN, 20 rounds of 20 steps on own records for every method. Learning rate and server epochs were chosen on seed 0,
which is not among the seeds reported, the same for all methods. Finished runs in ``--out`` are reused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedkd.report.compare import compare
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
}


def main(argv: list[str] | None = None) -> None:
    """Run every method over the seeds, print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the runs")
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "methods.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "methods.svg")
    parser.add_argument("--only", default=",".join(POINTS), help="comma list of rows")
    parser.add_argument("--small", action="store_true", help="one quick round on the bundled digits")
    words = parser.parse_args(argv)
    seeds = [int(s) for s in words.seeds.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    for label in words.only.split(","):
        file, overrides = POINTS[label]
        rows[label] = run(HERE / file, overrides, seeds, words.out / label, words.small)
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
    console = Console(width=130)
    console.print(table)
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps({"seeds": seeds, "versions": made_with(), "rows": rows}, indent=1) + "\n")
    drawn = [words.out / label for label in rows if label not in ("local", "central")]
    if drawn:
        compare(drawn, Console(quiet=True), plot=words.picture, json_out=words.out / "picture.json")


if __name__ == "__main__":
    main()
